"""The report: its figures, its controls, its gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from regraft.errors import GateError, InputError, ModelError
from regraft.neurons import Neurons, RegisterNeuron
from regraft_export.finding.outliers import Detection, detect
from regraft_export.finding.pytorch import PyTorchSubject
from regraft_export.finding.report import Report, make_report, random_neurons
from regraft_export.finding.score import Scores, gather_norms, score_neurons
from regraft_export.finding.subject import Floats
from regraft_export.vit.structure import VisionTransformer, from_module

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = [(2, 5), (2, 60), (2, 100)]


def tiny_vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 5}
    settings |= {"num_heads": 3, "num_classes": 0, **options}
    return timm.models.vision_transformer.VisionTransformer(**settings).eval()


@pytest.fixture(scope="module")
def pixels(pictures: Callable[..., Tensor]) -> Floats:
    return pictures(8, 3).numpy()


@pytest.fixture(scope="module")
def vit(planter: Callable[..., Any], pictures: Callable[..., Tensor]) -> VisionTransformer:
    return planter(tiny_vit(), pictures(16, 1), UNITS).vit


@pytest.fixture(scope="module")
def detection(vit: VisionTransformer, pixels: Floats) -> Detection:
    return detect(gather_norms(PyTorchSubject(vit), [pixels]))


@pytest.fixture(scope="module")
def scores(vit: VisionTransformer, pixels: Floats, detection: Detection) -> Scores:
    return score_neurons(PyTorchSubject(vit), [pixels], detection)


NEURONS = Neurons(tuple(RegisterNeuron(layer, index) for layer, index in UNITS))


@pytest.fixture(scope="module")
def made(vit: VisionTransformer, pixels: Floats, detection: Detection, scores: Scores) -> Report:
    return make_report(PyTorchSubject(vit), pixels, detection, scores, NEURONS, batch_size=3)


def test_figures(made: Report) -> None:
    assert made.images == 8
    assert made.output == "pooled"
    assert made.before["outlier_tokens"] == 16
    assert made.before["outlier_share"] == pytest.approx(2 / 64)
    assert made.before["images_with_outliers"] == 8
    assert 6 < made.before["largest_over_median"] < 10
    assert made.after["outlier_tokens"] == 0
    assert made.after["removed"] == 1
    assert made.after["largest_over_median"] < 1.5
    assert 0.9 < made.after["output_cosine_smallest"] <= made.after["output_cosine_median"] <= 1
    # The register now carries what the two outliers did, up to LayerNorm's taste.
    assert made.after["register_norm"] == pytest.approx(made.before["largest_norm"], rel=0.2)
    made.check()
    assert made.left_later(2) == []


def test_profile(made: Report) -> None:
    assert [entry["layer"] for entry in made.layers] == [0, 1, 2, 3, 4]
    assert [entry["outliers_before"] for entry in made.layers] == [0, 0, 16, 16, 16]
    assert [entry["outliers_after"] for entry in made.layers] == [0, 0, 0, 0, 0]
    for entry in made.layers:
        assert entry["median_before"] == pytest.approx(entry["median_after"], rel=0.05)
    assert set(made.to_json()) == {"images", "output", "before", "after", "controls", "layers"}


def test_a_model_without_pooled_output_is_compared_by_its_class_token(
    vit: VisionTransformer, pixels: Floats, detection: Detection, scores: Scores
) -> None:
    tokens_only = nn.Module()
    tokens_only.inner = vit.module
    tokens_only.forward = lambda x: vit.module.forward_features(x)  # type: ignore[method-assign]
    seen = from_module(tokens_only, (64, 64))
    report = make_report(PyTorchSubject(seen), pixels, detection, scores, NEURONS)
    assert report.output == "class token"
    assert report.after["removed"] == 1
    headless = replace(seen, layout=replace(seen.layout, class_token=False))
    assert (
        make_report(PyTorchSubject(headless), pixels, detection, scores, NEURONS).output
        == "mean patch"
    )


def test_random_neurons_are_others_of_the_same_layers(scores: Scores) -> None:
    selected = Neurons((RegisterNeuron(1, 3), RegisterNeuron(2, 5), RegisterNeuron(2, 60)))
    drawn = random_neurons(selected, scores, seed=4)
    assert [len(drawn.of(layer)) for layer in (1, 2)] == [1, 2]
    assert drawn == random_neurons(selected, scores, seed=4)
    assert drawn != random_neurons(selected, scores, seed=5)
    for seed in range(50):
        units = {(n.layer, n.index) for n in random_neurons(selected, scores, seed).neurons}
        assert not units & {(1, 3), (2, 5), (2, 60)}


def test_gate_says_which_figure_failed(made: Report) -> None:
    few = replace(made, after={**made.after, "removed": 0.875})
    with pytest.raises(GateError, match=r"87\.5% of 16 outlier tokens are gone, expected .* 90%"):
        few.check()
    changed = replace(made, after={**made.after, "output_cosine_median": 0.93})
    with pytest.raises(GateError, match=r"\(pooled\) .* is 0\.9300, expected at least 0\.95"):
        changed.check()
    both = replace(made, after={**made.after, "removed": 0.5, "output_cosine_median": 0.5})
    with pytest.raises(GateError, match=r"50\.0% of 16 .* and the median cosine"):
        both.check()


def test_outliers_left_at_later_layers(made: Report) -> None:
    layers = [dict(entry) for entry in made.layers]
    layers[4]["outliers_after"] = 2
    assert replace(made, layers=tuple(layers)).left_later(2) == [4]
    layers[4]["outliers_after"] = 1
    assert replace(made, layers=tuple(layers)).left_later(2) == []


def test_images_without_outliers(
    vit: VisionTransformer, detection: Detection, scores: Scores
) -> None:
    with pytest.raises(InputError, match=r"none of the 3 images for the report has an outlier"):
        make_report(
            PyTorchSubject(vit), torch.randn(3, 3, 64, 64).numpy(), detection, scores, NEURONS
        )


def test_outputs_that_are_not_finite(
    vit: VisionTransformer, pixels: Floats, detection: Detection, scores: Scores
) -> None:
    broken = replace(vit, module=_WithNan(vit.module))
    with pytest.raises(ModelError, match=r"NaN or infinite values on 1 of 8 images"):
        make_report(PyTorchSubject(broken), pixels, detection, scores, NEURONS)


class _WithNan(nn.Module):
    """Spoils the output of the second image of a batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        output = self.inner(x).clone()
        output[1] = torch.nan
        return output


def test_median_cosine_is_over_images() -> None:
    from regraft_export.finding.report import Run, _figures

    norms = np.ones((1, 3, 4), np.float32)
    norms[0, :, 0] = 9
    before = Run(norms, np.eye(3, dtype=np.float32), "pooled", np.zeros((1, 3, 0), np.float32))
    turned = np.array([[1, 0, 0], [0, 1, 1], [0, 1, 0]], np.float32)
    after = Run(norms, turned, "pooled", np.full((1, 3, 1), 5.0, np.float32))
    where: Any = SimpleNamespace(layer=0, threshold=3.0)
    figures = _figures(after, before, where)
    assert figures["output_cosine_median"] == pytest.approx(0.5**0.5)
    assert figures["output_cosine_smallest"] == pytest.approx(0)
    assert figures["removed"] == 0
    assert figures["register_norm"] == 5
