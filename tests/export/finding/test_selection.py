"""Selection: fewest layers first, then fewest units; what is judged, and what cannot be reached."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from regraft.errors import GateError, InputError
from regraft.redirect import RedirectOptions
from regraft_export.finding import judge as judge_module
from regraft_export.finding.judge import Judge, Limits, Outcome, Unit, register_neurons
from regraft_export.finding.outliers import Detection, detect
from regraft_export.finding.passes import patch_norms, run_until
from regraft_export.finding.pytorch import PyTorchSubject
from regraft_export.finding.score import Scores, gather_norms, score_neurons
from regraft_export.finding.search import Search, sizes
from regraft_export.finding.selection import select
from regraft_export.finding.subject import Floats
from regraft_export.vit.hooks import redirected
from regraft_export.vit.structure import VisionTransformer

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = [(2, 5), (2, 60), (2, 100), (2, 130)]
NEGATIVE = [(2, 130)]


def tiny_vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 5}
    settings |= {"num_heads": 3, "num_classes": 0, **options}
    return timm.models.vision_transformer.VisionTransformer(**settings).eval()


@pytest.fixture(scope="module")
def pixels(pictures: Callable[..., Tensor]) -> Floats:
    return pictures(10, 3).numpy()


@pytest.fixture(scope="module")
def vit(planter: Callable[..., Any], pictures: Callable[..., Tensor]) -> VisionTransformer:
    return planter(tiny_vit(), pictures(16, 1), UNITS, negative=NEGATIVE).vit


@pytest.fixture(scope="module")
def detection(vit: VisionTransformer, pixels: Floats) -> Detection:
    return detect(gather_norms(PyTorchSubject(vit), [pixels]))


@pytest.fixture(scope="module")
def scores(vit: VisionTransformer, pixels: Floats, detection: Detection) -> Scores:
    return score_neurons(PyTorchSubject(vit), [pixels], detection)


class PretendJudge:
    """A judge that knows by a rule which units are needed, and counts what it is asked."""

    def __init__(self, enough: Callable[[set[Unit]], bool]) -> None:
        self.enough, self.runs, self.asked = enough, 0, 0

    def passes(self, units: Sequence[Unit], limits: Limits) -> bool:
        self.asked += 1
        return self.run(units).within(limits)

    def run(self, units: Sequence[Unit]) -> Outcome:
        return Outcome(0, 1.0 if self.enough(set(units)) else 3.0, True)


def search(
    scored: dict[Unit, float],
    enough: Callable[[set[Unit]], bool],
    max_neurons: int = 512,
    notable: Collection[Unit] = (),
) -> tuple[list[Unit], PretendJudge]:
    depth = 1 + max(layer for layer, _ in scored)
    values = [np.zeros(600) for _ in range(depth)]
    for (layer, index), value in scored.items():
        values[layer][index] = value
    judge = PretendJudge(enough)
    scores = Scores("contribution", tuple(values), tuple(values), 1, 1, 1)
    ranking = scores.ranking()[:max_neurons]
    found = Search(judge, scores, ranking, notable).smallest(Limits(0, 2.0))  # type: ignore[arg-type]
    return found, judge


def test_one_layer_that_suffices_comes_before_fewer_units_in_two() -> None:
    scored = {(0, i): 10.0 - i for i in range(8)} | {(1, 0): 30.0, (1, 1): 29.0}
    both = {(0, 0), (1, 0)}
    alone = {(0, i) for i in range(6)}
    found, _ = search(scored, lambda units: units >= both or units >= alone)
    assert set(found) == alone


def test_of_single_layers_the_one_with_fewest_units_wins() -> None:
    scored = {(0, 0): 60.0, (1, 0): 59.0} | {(0, i): 50.0 - i for i in range(1, 6)}
    scored |= {(1, i): 42.5 - i for i in range(1, 4)}
    in_0, in_1, both = {(0, i) for i in range(5)}, {(1, 0), (1, 1), (1, 3)}, {(0, 0), (1, 0)}
    found, _ = search(scored, lambda u: u >= in_0 or u >= in_1 or u >= both)
    assert set(found) == in_1


def test_layers_that_are_not_needed_are_left_out() -> None:
    scored = {(layer, i): 10.0 * (layer + 1) - i for layer in range(4) for i in range(5)}
    needed = {(3, 0), (1, 1)}
    found, _ = search(scored, lambda units: units >= needed)
    assert set(found) == needed


@pytest.mark.parametrize("needed", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 100])
def test_fewest_units_in_score_order(needed: int) -> None:
    scored = {(0, i): 1000.0 - i for i in range(300)}
    found, judge = search(scored, lambda units: units >= {(0, i) for i in range(needed)})
    assert found == [(0, i) for i in range(needed)]
    assert judge.asked < 30 + 3 * needed


def test_units_that_are_not_needed_are_dropped() -> None:
    scored = {(0, i): 1000.0 - i for i in range(100)}
    needed = {(0, 3), (0, 40), (0, 41)}
    found, judge = search(scored, lambda units: units >= needed)
    assert set(found) == needed
    assert judge.asked < 80


def test_most_neurons_that_may_be_chosen() -> None:
    scored = {(0, i): 1000.0 - i for i in range(100)}
    found, _ = search(scored, lambda units: len(units) >= 50, max_neurons=49)
    assert found == []
    found, _ = search(scored, lambda units: len(units) >= 50, max_neurons=50)
    assert len(found) == 50


def test_units_beyond_the_pool_cannot_stand_in() -> None:
    # Two true units in two layers; three hundred others of layer 0 would do as well.
    scored = {(1, 0): 50.0, (2, 0): 40.0} | {(0, i): 1.0 - i / 1000 for i in range(300)}
    true, others = {(1, 0), (2, 0)}, {(0, i) for i in range(100)}
    found, _ = search(scored, lambda units: units >= true or units >= others)
    assert set(found) == true


def test_notable_units_of_the_chosen_layers_stay_where_they_do_no_harm() -> None:
    scored = {(layer, i): 100.0 - i - layer / 2 for layer in (0, 1) for i in range(20)}
    notable = {(0, 5), (0, 9), (1, 0)}
    needed = {(0, 0), (0, 2)}
    found, _ = search(scored, lambda units: units >= needed, notable=notable)
    assert found == [(0, 0), (0, 2), (0, 5), (0, 9)]
    harm = (0, 9)
    found, _ = search(scored, lambda units: units >= needed and harm not in units, notable=notable)
    assert found == [(0, 0), (0, 2)]


def test_three_layers_are_left_where_none_is_spare() -> None:
    scored = {(layer, i): 10.0 - layer - i for layer in range(5) for i in range(4)}
    needed = {(0, 1), (2, 0), (4, 0)}
    found, _ = search(scored, lambda units: units >= needed)
    assert set(found) == needed


def test_sizes_that_are_tried() -> None:
    assert sizes(0) == []
    assert sizes(3) == [3]
    assert sizes(4) == [4]
    assert sizes(70) == [4, 16, 64, 70]


def test_units_and_signs(
    vit: VisionTransformer, pixels: Floats, detection: Detection, scores: Scores
) -> None:
    chosen = select(PyTorchSubject(vit), pixels, detection, scores)
    signs = {(n.layer, n.index): n.sign for n in chosen.neurons.neurons}
    assert signs == {unit: -1 if unit in NEGATIVE else 1 for unit in UNITS}
    assert chosen.before == 20
    assert chosen.outcome.outliers == 0
    assert chosen.outcome.complete
    assert chosen.outcome.largest < 1.5 * chosen.median
    assert chosen.limits.norm == pytest.approx(1.8 * chosen.median)
    by_score = [n.score for n in chosen.neurons.neurons]
    assert by_score == sorted(by_score, reverse=True)


def test_value_is_what_the_register_receives(
    vit: VisionTransformer, pixels: Floats, detection: Detection, scores: Scores
) -> None:
    neurons = select(PyTorchSubject(vit), pixels, detection, scores, batch_size=3).neurons
    hidden: list[Tensor] = []
    with redirected(vit, neurons), torch.no_grad():
        down = vit.blocks[2].down
        # In front of the redirect's own hook: the activations as the network made them.
        hook = down.register_forward_pre_hook(lambda m, a: hidden.append(a[0]), prepend=True)
        vit.module(torch.from_numpy(pixels))
        hook.remove()
    for n in neurons.neurons:
        over_tokens = hidden[0][:, :, n.index] * n.sign
        assert n.value == pytest.approx(float((over_tokens.amax(1) * n.sign).mean()), rel=1e-5)
    values = {(n.layer, n.index): n.value for n in neurons.neurons}
    assert values[(2, 5)] == pytest.approx(12, rel=0.1)
    assert values[(2, 130)] == pytest.approx(-0.17, rel=0.02)


def test_constant_value_does_the_same(
    vit: VisionTransformer, pixels: Floats, detection: Detection, scores: Scores
) -> None:
    neurons = select(PyTorchSubject(vit), pixels, detection, scores).neurons
    outputs = []
    with torch.no_grad():
        for value in ("per-neuron", "constant"):
            with redirected(vit, neurons, RedirectOptions(value=value)):
                outputs.append(vit.module(torch.from_numpy(pixels)))
    assert torch.cosine_similarity(*outputs).min() > 0.9999


def test_judge_gives_up_early_and_remembers(
    vit: VisionTransformer, pixels: Floats, detection: Detection, scores: Scores
) -> None:
    judge = Judge(PyTorchSubject(vit), pixels, detection, scores, batch_size=2)
    limits = judge.limits()
    assert [round(entry.norm / judge.median, 3) for entry in limits] == [1.8, 2.0]
    assert limits[0].outliers == 0
    before = judge.runs
    assert not judge.passes([(0, 0)], limits[0])
    assert judge.runs - before == 2  # the first images alone
    assert not judge.passes([(0, 0)], limits[0])
    assert not judge.passes([(0, 0)], limits[1])  # what it saw rules this out as well
    assert judge.runs - before == 2
    assert judge.passes(UNITS, limits[0])
    assert judge.runs - before == 12
    assert judge.passes(list(reversed(UNITS)), limits[1])
    assert judge.runs - before == 12


def test_judge_agrees_with_a_plain_pass(
    vit: VisionTransformer, pixels: Floats, detection: Detection, scores: Scores
) -> None:
    judge = Judge(PyTorchSubject(vit), pixels, detection, scores, batch_size=3)
    some = UNITS[:2]
    with redirected(vit, register_neurons(some, scores)):
        tokens = run_until(vit, torch.from_numpy(pixels), detection.layer).tokens
        norms = patch_norms(vit, tokens)
    outcome = judge.run(some)
    assert outcome.complete
    assert outcome.outliers == int((norms > detection.threshold).sum())
    assert outcome.largest == pytest.approx(float(norms.max()), rel=1e-5)


def hf_vit(planter: Callable[..., Any], pictures: Callable[..., Tensor]) -> VisionTransformer:
    """Blocks of another library, which are called with keywords and may return tuples."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=5, num_attention_heads=3, image_size=64, patch_size=8
    )
    return planter(transformers.Dinov2Model(config).eval(), pictures(16, 1), UNITS[:3]).vit


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_passes_begin_at_the_first_touched_layer_and_give_the_same(
    vit: VisionTransformer,
    pixels: Floats,
    library: str,
    planter: Callable[..., Any],
    pictures: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if library == "transformers":
        vit = hf_vit(planter, pictures)
    detection = detect(gather_norms(PyTorchSubject(vit), [pixels]))
    scores = score_neurons(PyTorchSubject(vit), [pixels], detection)
    widths: list[int] = []
    vit_before = dict(vars(vit.blocks[0].module))
    handle = vit.blocks[0].down.register_forward_pre_hook(lambda m, a: widths.append(len(a[0])))
    sets = [UNITS[:1], UNITS[:3], [(0, 3), *UNITS[:2]], UNITS[:2], [(2, 9)], [(1, 4), (2, 5)]]
    found, ran = [], []
    for room in (1 << 30, 0):
        monkeypatch.setattr(judge_module, "MAX_KEPT_BYTES", room)
        judge = Judge(PyTorchSubject(vit), pixels, detection, scores, batch_size=4)
        widths.clear()
        found.append([judge.run(units) for units in sets])
        ran.append(sum(widths))
        assert all("forward" not in vars(block.module) for block in vit.blocks)
    handle.remove()
    assert found[0] == found[1]
    # Kept: once for sets that begin at layer 2, once for layer 1; layer 0 is touched by one.
    assert ran == [3 * len(pixels), len(sets) * len(pixels)]
    assert vars(vit.blocks[0].module).keys() == vit_before.keys()


def test_no_more_is_kept_than_there_is_room_for(
    vit: VisionTransformer,
    pixels: Floats,
    detection: Detection,
    scores: Scores,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_image = (vit.layout.count + 1) * vit.layout.width * 4
    monkeypatch.setattr(judge_module, "MAX_KEPT_BYTES", 6 * one_image)
    judge = Judge(PyTorchSubject(vit), pixels, detection, scores, batch_size=4)
    for units in (UNITS[:1], [(1, 4), (2, 5)]):
        judge.run(units)
    assert sum(output.numel() * 4 for output in judge._starts.values()) == 6 * one_image


def test_ordinary_patches_beyond_twice_the_median_set_the_last_limit(
    vit: VisionTransformer, pixels: Floats, detection: Detection, scores: Scores
) -> None:
    judge = Judge(PyTorchSubject(vit), pixels, detection, scores)
    judge.largest_ordinary = 2.6 * judge.median
    assert [round(entry.norm / judge.median, 2) for entry in judge.limits()] == [1.8, 2.0, 2.63]


def test_outcome_with_nan_fails() -> None:
    assert not Outcome(0, float("nan"), True).within(Limits(0, 10.0))


def test_nothing_removes_the_outliers(
    vit: VisionTransformer, pixels: Floats, detection: Detection, scores: Scores
) -> None:
    silent = tuple(s.copy() for s in scores.score)
    for layer, index in UNITS[:3]:
        silent[layer][index] = 0
    without = Scores("contribution", silent, scores.activation, 20, 10, 10)
    with pytest.raises(GateError) as caught:
        select(PyTorchSubject(vit), pixels, detection, without, max_neurons=20)
    message = str(caught.value)
    assert "no set of at most 20 units removes the outlier tokens at layer 2" in message
    assert "remove 0.0% of 20 and leave the largest patch norm at" in message
    assert "expected 99% and 2 times: try a larger --max-neurons" in message


def test_no_positive_score(
    vit: VisionTransformer, pixels: Floats, detection: Detection, scores: Scores
) -> None:
    none = Scores(
        "contribution", tuple(-abs(s) for s in scores.score), scores.activation, 20, 10, 10
    )
    with pytest.raises(GateError, match="no unit has a positive score"):
        select(PyTorchSubject(vit), pixels, detection, none)


def test_images_without_outliers(
    vit: VisionTransformer, detection: Detection, scores: Scores
) -> None:
    noise = torch.randn(4, 3, 64, 64).numpy()
    with pytest.raises(InputError, match=r"none of the 4 images for selection has an outlier"):
        select(PyTorchSubject(vit), noise, detection, scores)
    with pytest.raises(InputError, match="max neurons is 0; expected at least 1"):
        select(PyTorchSubject(vit), noise, detection, scores, max_neurons=0)


def test_two_layers_that_write_one_after_the_other(
    planter: Callable[..., Any], pictures: Callable[..., Tensor]
) -> None:
    # The units of layer 3 answer to what those of layer 1 wrote, so that layer 1 suffices.
    units = [(1, 5), (1, 60), (3, 7), (3, 9)]
    vit = planter(tiny_vit(), pictures(16, 1), units).vit
    pixels = pictures(10, 3).numpy()
    detection = detect(gather_norms(PyTorchSubject(vit), [pixels]))
    assert detection.layer == 3
    scores = score_neurons(PyTorchSubject(vit), [pixels], detection)
    assert set(scores.ranking()[:4]) == set(units)
    chosen = select(PyTorchSubject(vit), pixels, detection, scores)
    assert chosen.neurons.layers == (1,)
    assert {(n.layer, n.index) for n in chosen.neurons.neurons} <= set(units)
