"""The scores: equal to their definition, whatever the batches, and cheap in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from regraft.errors import InputError, ModelError
from regraft_export.finding import pytorch, score
from regraft_export.finding.judge import in_batches
from regraft_export.finding.outliers import Detection, detect
from regraft_export.finding.pytorch import PyTorchSubject
from regraft_export.finding.score import gather_norms, score_neurons
from regraft_export.finding.subject import Floats
from regraft_export.vit.structure import VisionTransformer

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = [(2, 5), (2, 60), (3, 7)]
NEGATIVE = [(3, 7)]


def tiny_vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 5}
    settings |= {"num_heads": 3, "num_classes": 0, **options}
    return timm.models.vision_transformer.VisionTransformer(**settings).eval()


@pytest.fixture(scope="module")
def pixels(pictures: Callable[..., Tensor]) -> Floats:
    return pictures(12, 3).numpy()


@pytest.fixture(scope="module")
def vit(planter: Callable[..., Any], pixels: Floats) -> VisionTransformer:
    model = tiny_vit(init_values=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.uniform_(0.2, 1.5)
    return planter(model, torch.from_numpy(pixels), UNITS, negative=NEGATIVE).vit


@pytest.fixture(scope="module")
def detection(vit: VisionTransformer, pixels: Floats) -> Detection:
    return detect(gather_norms(PyTorchSubject(vit), [pixels]))


def by_definition(
    vit: VisionTransformer, pixels: Floats, detection: Detection
) -> dict[str, list[np.ndarray]]:
    """The scores by loops over images and tokens, in float64, from activations of plain hooks."""
    hidden: dict[int, Tensor] = {}
    tokens: dict[int, Tensor] = {}
    hooks = []
    for i, block in enumerate(vit.blocks):
        keep = lambda m, a, i=i: hidden.update({i: a[0].double()})  # noqa: E731
        out = lambda m, a, o, i=i: tokens.update({i: o.double()})  # noqa: E731
        hooks += [block.down.register_forward_pre_hook(keep)]
        hooks += [block.module.register_forward_hook(out)]
    with torch.no_grad():
        vit.module(torch.from_numpy(pixels))
    for hook in hooks:
        hook.remove()
    prefix = vit.layout.prefix
    final = tokens[detection.layer][:, prefix:]
    result: dict[str, list[np.ndarray]] = {"contribution": [], "activation": []}
    for layer in range(detection.layer + 1):
        block = vit.blocks[layer]
        gamma = 1 if block.scale is None else block.scale.detach().double()
        write = (gamma * block.down.weight.detach().double().T).numpy()
        at, elsewhere, means = [], [], []
        for image in range(len(pixels)):
            h = hidden[layer][image, prefix:].numpy()
            x = final[image].numpy()
            norms = np.linalg.norm(x, axis=1)
            outliers = np.flatnonzero(norms > detection.threshold)
            if len(outliers) == 0:
                continue
            units = [x[t] / norms[t] for t in outliers]
            mean = np.mean(units, axis=0)
            mean /= np.linalg.norm(mean)
            for t, u in zip(outliers, units, strict=True):
                at.append(h[t] * (write @ u))
            ordinary = sorted(set(range(len(x))) - set(outliers))
            elsewhere += [h[t] * (write @ mean) for t in ordinary]
            means.append(h[outliers].mean(axis=0))
        result["contribution"].append(np.mean(at, axis=0) - np.mean(elsewhere, axis=0))
        result["activation"].append(np.mean(means, axis=0))
    return result


@pytest.mark.parametrize("kind", ["contribution", "activation"])
def test_scores_equal_their_definition(
    vit: VisionTransformer, pixels: Floats, detection: Detection, kind: score.Score
) -> None:
    # One image without an outlier: it adds nothing to any sum.
    mixed = np.concatenate([pixels[:5], torch.randn(1, *pixels.shape[1:]).numpy()])
    got = score_neurons(PyTorchSubject(vit), [mixed[:4], mixed[4:]], detection, kind=kind)
    expected = by_definition(vit, mixed, detection)[kind]
    assert (got.images, got.images_with_outliers, got.outliers) == (6, 5, 10)
    assert len(got.score) == detection.layer + 1
    for values, wanted in zip(got.score, expected, strict=True):
        assert values == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_contribution_ranks_the_true_units_first(
    vit: VisionTransformer, pixels: Floats, detection: Detection
) -> None:
    scores = score_neurons(PyTorchSubject(vit), [pixels], detection)
    assert set(scores.ranking()[: len(UNITS)]) == set(UNITS)
    layer, index = NEGATIVE[0]
    assert scores.score[layer][index] > 0 > scores.activation[layer][index]


def test_activation_cannot_see_units_that_act_through_negative_values(
    vit: VisionTransformer, pixels: Floats, detection: Detection
) -> None:
    ranking = score_neurons(PyTorchSubject(vit), [pixels], detection, kind="activation").ranking()
    assert set(ranking[:2]) == set(UNITS) - set(NEGATIVE)
    assert NEGATIVE[0] not in ranking


def test_layer_cap(vit: VisionTransformer, pixels: Floats, detection: Detection) -> None:
    capped = score_neurons(PyTorchSubject(vit), [pixels], detection, kind="activation", max_layer=2)
    assert {layer for layer, _ in capped.ranking()} == {0, 1, 2}
    with pytest.raises(InputError, match=r"max layer is 4; expected 0 to 3, the detection layer"):
        score_neurons(PyTorchSubject(vit), [pixels], detection, max_layer=4)


@settings(max_examples=8, deadline=None)
@given(size=st.integers(1, 12), kept=st.sampled_from([1, 3_000_000, 1 << 30]))
def test_scores_do_not_depend_on_the_batches(
    vit: VisionTransformer, pixels: Floats, detection: Detection, size: int, kept: int
) -> None:
    whole = score_neurons(PyTorchSubject(vit), [pixels], detection)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "MAX_KEPT_BYTES", kept)
        parts = score_neurons(PyTorchSubject(vit), in_batches(pixels, size), detection)
    for a, b in zip(whole.score, parts.score, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    assert parts.ranking()[:10] == whole.ranking()[:10]


def test_activations_kept_stay_under_the_bound(
    vit: VisionTransformer, pixels: Floats, detection: Detection, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    run_until = pytorch.run_until

    def spy(vit: Any, batch: Tensor, *rest: Any) -> Any:
        partial = run_until(vit, batch, *rest)
        seen.append(sum(h.nbytes for h in partial.hidden.values()))
        return partial

    monkeypatch.setattr(pytorch, "run_until", spy)
    monkeypatch.setattr(score, "MAX_KEPT_BYTES", 700_000)
    score_neurons(PyTorchSubject(vit), [pixels], detection)
    # 65 tokens, 192 units, 4 layers, 4 bytes: 199,680 an image, so three fit.
    assert seen == [599_040] * 4


def test_nothing_is_retained_per_image(
    vit: VisionTransformer, pixels: Floats, detection: Detection
) -> None:
    def live_bytes() -> int:
        gc.collect()
        # Plain tensors: a trace in the same process leaves fake ones without storage behind.
        tensors = [o for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter)]
        storages = [t.untyped_storage() for t in tensors]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    held: list[int] = []

    def stream(count: int) -> Iterator[Floats]:
        for _ in range(count):
            held.append(live_bytes())
            yield pixels[:2]

    gather_norms(PyTorchSubject(vit), stream(6))
    score_neurons(PyTorchSubject(vit), stream(6), detection)
    norms, scores = held[:6], held[6:]
    assert max(norms[2:]) <= norms[1]
    assert max(scores[2:]) <= scores[1]
    # Between batches there are the last sums (4 layers, 4 times 192 float64), no activations: of
    # one image alone are 199,680 bytes.
    assert 4 * 4 * 192 * 8 <= max(scores) - min(norms) < 60_000


def test_forward_passes_used(vit: VisionTransformer, pixels: Floats, detection: Detection) -> None:
    calls = [0] * len(vit.blocks)
    hooks = []
    for i, block in enumerate(vit.blocks):

        def count(m: Any, a: Any, i: int = i) -> None:
            calls[i] += len(a[0])

        hooks.append(block.module.register_forward_pre_hook(count))
    gather_norms(PyTorchSubject(vit), [pixels])
    score_neurons(PyTorchSubject(vit), [pixels], detection)
    for hook in hooks:
        hook.remove()
    # Detection runs every block once, scoring those up to the detection layer (3) once more.
    assert calls == [24, 24, 24, 24, 12]


def test_no_outliers_in_the_images(vit: VisionTransformer, detection: Detection) -> None:
    noise = torch.randn(4, 3, 64, 64).numpy()
    with pytest.raises(ModelError, match=r"at layer 3 in the 4 images used for scoring"):
        score_neurons(PyTorchSubject(vit), [noise], detection)


def test_features_that_are_not_finite(
    vit: VisionTransformer, pixels: Floats, detection: Detection
) -> None:
    broken = pixels.copy()
    broken[3, 0, 0, 0] = np.nan
    with pytest.raises(ModelError, match=r"layer 0: 64 of 768 patch norms .* NaN or infinite"):
        gather_norms(PyTorchSubject(vit), [broken])


def test_hooks_are_gone_afterwards(
    vit: VisionTransformer, pixels: Floats, detection: Detection
) -> None:
    score_neurons(PyTorchSubject(vit), [pixels], detection)
    gather_norms(PyTorchSubject(vit), [pixels])
    for module in vit.module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
