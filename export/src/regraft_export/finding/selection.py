"""The smallest set of units whose redirect removes the outlier tokens.

Judged on at most 32 images that were not used for scoring, with the redirect applied by hooks: at
least 99 % of the outlier tokens must be gone and the largest patch norm must come under twice the
median, both at the detection layer.

The search, over units in the order of their scores and layers in the order of their summed
positive scores (of the ``max_neurons`` best units):

1. Each of the six strongest layers alone, then the two, three, ... strongest together, until the
   best 4, 16, 64, ... units of these layers pass. Fewer layers come first because the cost of a
   patched model is per layer.
2. From a set of more than two layers, each layer is left out in turn, weakest first, and stays
   out if what is left can still pass.
3. Bisection for the fewest best units of these layers that pass.
4. Units that turn out not to be needed are dropped, weakest first: in slices of an eighth, then
   smaller, then one by one.

The smallest set that just passes on a few images would fail on others, so twice the median is
first asked for with a tenth to spare, then exactly. Where ordinary patches alone go beyond twice
the median, no redirect can help that: then, last, the limit is the largest norm that ordinary
patches had before.

A set is judged on four images first, those with the largest norms, and given up as soon as it has
failed: most sets cost one short pass over these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import GateError, InputError
from regraft.neurons import Neurons, RegisterNeuron
from regraft_export.finding.outliers import Detection
from regraft_export.finding.passes import patch_norms, run_until
from regraft_export.finding.score import Scores
from regraft_export.vit.hooks import redirected
from regraft_export.vit.structure import VisionTransformer

REMOVED = 0.99
TIMES_MEDIAN = 2.0
TO_SPARE = 0.9
_FIRST_IMAGES = 4
_SINGLE_LAYERS = 6
_GROWTH = 4
_PRUNING_TRIALS = 200

Unit = tuple[int, int]
"""(layer, index)."""


def register_neurons(units: Sequence[Unit], scores: Scores) -> Neurons:
    """The units as register neurons, best first, with their scores and signs."""
    rows = [
        RegisterNeuron(
            layer=layer,
            index=index,
            score=float(scores.score[layer][index]),
            sign=-1 if scores.activation[layer][index] < 0 else 1,
        )
        for layer, index in units
    ]
    return Neurons(tuple(sorted(rows, key=lambda n: (-n.score, n.layer, n.index))))


@dataclass(frozen=True)
class Limits:
    """What a redirect must reach.

    Attributes:
        outliers: at most so many outlier tokens may be left.
        norm: below which the largest patch norm must come.
    """

    outliers: int
    norm: float


@dataclass(frozen=True)
class Outcome:
    """What a redirect reached; lower bounds if it was given up before the last image.

    Attributes:
        outliers: outlier tokens left.
        largest: largest patch norm.
        complete: whether all images were run.
    """

    outliers: int
    largest: float
    complete: bool

    def within(self, limits: Limits) -> bool:
        """Whether it reached ``limits`` as far as it was run."""
        return self.outliers <= limits.outliers and self.largest < limits.norm


class Judge:
    """Runs redirects on the select part and remembers what they reached.

    Attributes:
        before: outlier tokens without a redirect.
        median: median patch norm without one.
        largest_ordinary: largest norm of a patch that is no outlier, without one.
        runs: passes made so far, in images.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        pixels: Tensor,
        detection: Detection,
        scores: Scores,
        batch_size: int = 16,
    ) -> None:
        """Runs the model as it is.

        Args:
            vit: the model.
            pixels: (N, 3, H, W), the select part.
            detection: which tokens are outliers.
            scores: for the signs of the units.
            batch_size: images per pass.

        Raises:
            InputError: these images have no outlier tokens.
        """
        self._vit, self._detection, self._scores = vit, detection, scores
        self.runs = 0
        norms = torch.cat([self._norms(part) for part in torch.split(pixels, batch_size)])
        is_outlier = norms > detection.threshold
        self.before = int(is_outlier.sum())
        if self.before == 0:
            raise InputError(
                f"none of the {len(pixels)} images for selection has an outlier token (patch norm "
                f"above {detection.threshold:.4g} at layer {detection.layer}); expected some: "
                "give more images, or another --seed"
            )
        self.median = float(norms.median())
        self.largest_ordinary = float(norms.masked_fill(is_outlier, 0).max())
        order = norms.amax(dim=1).argsort(descending=True, stable=True)
        first, rest = order[:_FIRST_IMAGES], order[_FIRST_IMAGES:]
        self._batches = [pixels[i] for i in (first, *torch.split(rest, batch_size)) if len(i)]
        self._seen: dict[frozenset[Unit], Outcome] = {}

    def limits(self) -> list[Limits]:
        """From the strictest to the most lenient, see the module."""
        left = int((1 - REMOVED) * self.before + 1e-9)
        twice = TIMES_MEDIAN * self.median
        norms = [TO_SPARE * twice, twice]
        if self.largest_ordinary >= twice:
            # "Not above" what ordinary patches had, with room for rounding.
            norms.append(self.largest_ordinary * 1.01)
        return [Limits(left, norm) for norm in norms]

    def passes(self, units: Sequence[Unit], limits: Limits) -> bool:
        """Whether redirecting ``units`` reaches ``limits`` on all images."""
        if not units:
            return False
        known = self._seen.get(frozenset(units))
        if known is not None and (known.complete or not known.within(limits)):
            return known.within(limits)
        return self.run(units, limits).within(limits)

    def run(self, units: Sequence[Unit], limits: Limits | None = None) -> Outcome:
        """Redirects ``units``; with ``limits``, no further than to the first image that fails."""
        outliers, largest, done = 0, 0.0, 0
        with redirected(self._vit, register_neurons(units, self._scores)):
            for batch in self._batches:
                norms = self._norms(batch)
                outliers += int((norms > self._detection.threshold).sum())
                largest = max(largest, float(norms.max()))
                done += 1
                # A comparison with NaN is false: features that are not finite fail at once.
                if limits and not Outcome(outliers, largest, False).within(limits):
                    break
        outcome = Outcome(outliers, largest, done == len(self._batches))
        self._seen[frozenset(units)] = outcome
        return outcome

    def _norms(self, pixels: Tensor) -> Tensor:
        """(B, patches) at the detection layer, on the CPU."""
        self.runs += len(pixels)
        tokens = run_until(self._vit, pixels, self._detection.layer).tokens
        return patch_norms(self._vit, tokens).cpu()


@dataclass(frozen=True)
class Selection:
    """The chosen register neurons and how they were judged.

    Attributes:
        neurons: best first, each with its ``value``.
        limits: what they reached.
        before: outlier tokens without a redirect.
        outcome: what was left with it.
        median: median patch norm without it.
        runs: images passed through the model during the search.
    """

    neurons: Neurons
    limits: Limits
    before: int
    outcome: Outcome
    median: float
    runs: int


def select(
    vit: VisionTransformer,
    pixels: Tensor,
    detection: Detection,
    scores: Scores,
    *,
    max_neurons: int = 512,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda images: None,
) -> Selection:
    """Chooses register neurons.

    Args:
        vit: the model.
        pixels: (N, 3, H, W), images not used for scoring.
        detection: which tokens are outliers.
        scores: of all units up to the detection layer.
        max_neurons: at most so many are chosen.
        batch_size: images per pass.
        advance: told how many images were run, for a progress bar.

    Raises:
        InputError: the images have no outlier tokens, or ``max_neurons`` is below 1.
        GateError: no set of units reaches the limits; the message has the best figures.
    """
    if max_neurons < 1:
        raise InputError(f"max neurons is {max_neurons}; expected at least 1")
    judge = Judge(vit, pixels, detection, scores, batch_size)
    search = _Search(judge, scores, max_neurons, advance)
    for limits in judge.limits():
        units = search.smallest(limits)
        if units:
            neurons = _with_values(vit, pixels, register_neurons(units, scores), batch_size)
            outcome = judge.run(units)
            return Selection(neurons, limits, judge.before, outcome, judge.median, judge.runs)
    raise GateError(_not_removed(judge, search, detection))


class _Search:
    """Steps 1 to 4 of the module's search, for one set of limits at a time."""

    def __init__(
        self, judge: Judge, scores: Scores, max_neurons: int, advance: Callable[[int], None]
    ) -> None:
        self.judge, self.max_neurons, self.advance = judge, max_neurons, advance
        self.ranking = scores.ranking()
        strength: dict[int, float] = {}
        for layer, index in self.ranking[:max_neurons]:
            strength[layer] = strength.get(layer, 0.0) + float(scores.score[layer][index])
        self.layers = sorted(strength, key=lambda layer: (-strength[layer], layer))

    def smallest(self, limits: Limits) -> list[Unit]:
        """The chosen units, best first; empty if nothing reaches ``limits``."""
        alone = [self.fewest([layer], limits) for layer in self.layers[:_SINGLE_LAYERS]]
        found = min((units for units in alone if units), key=len, default=[])
        for count in range(2, len(self.layers) + 1):
            if found:
                break
            if self.enough(self.layers[:count], limits):
                found = self.fewest(self.without_spare(self.layers[:count], limits), limits)
        return self.pruned(found, limits)

    def units_of(self, layers: Sequence[int]) -> list[Unit]:
        """The best units of these layers, best first."""
        return [unit for unit in self.ranking if unit[0] in layers][: self.max_neurons]

    def passes(self, units: Sequence[Unit], limits: Limits) -> bool:
        """As :meth:`Judge.passes`, and tells the progress bar."""
        before = self.judge.runs
        verdict = self.judge.passes(units, limits)
        self.advance(self.judge.runs - before)
        return verdict

    def enough(self, layers: Sequence[int], limits: Limits) -> int:
        """How many of the best units of these layers pass, in steps; 0 if none do."""
        units = self.units_of(layers)
        for size in sizes(len(units)):
            if self.passes(units[:size], limits):
                return size
        return 0

    def without_spare(self, layers: Sequence[int], limits: Limits) -> list[int]:
        """The layers without those that are not needed (step 2)."""
        kept = list(layers)
        for layer in reversed(layers):
            rest = [other for other in kept if other != layer]
            if rest and self.enough(rest, limits):
                kept = rest
        return kept

    def fewest(self, layers: Sequence[int], limits: Limits) -> list[Unit]:
        """The fewest best units of these layers that pass (step 3); empty if none do."""
        high = self.enough(layers, limits)
        low = high // _GROWTH  # did not pass, or 0
        units = self.units_of(layers)
        while high - low > 1:
            middle = (low + high) // 2
            if self.passes(units[:middle], limits):
                high = middle
            else:
                low = middle
        return units[:high]

    def pruned(self, units: list[Unit], limits: Limits) -> list[Unit]:
        """The units without those that are not needed (step 4)."""
        size, trials = max(1, len(units) // 8), 0
        while units and trials < _PRUNING_TRIALS:
            end = len(units)
            while end > 0 and len(units) > 1 and trials < _PRUNING_TRIALS:
                rest = units[: max(0, end - size)] + units[end:]
                trials += 1
                if self.passes(rest, limits):
                    units = rest
                end -= size
            if size == 1:
                break
            size //= 2
        return units


def sizes(available: int) -> list[int]:
    """How many units are tried: 4, 16, 64, ... and all that are available."""
    steps = []
    size = _GROWTH
    while size < available:
        steps.append(size)
        size *= _GROWTH
    return [*steps, available] if available else []


def _not_removed(judge: Judge, search: _Search, detection: Detection) -> str:
    units = search.units_of(search.layers)
    if not units:
        return "no unit has a positive score, so nothing can be selected; try the other --score"
    tried = {size: judge.run(units[:size]) for size in sizes(len(units))}
    size, best = min(tried.items(), key=lambda item: (item[1].outliers, item[1].largest))
    removed = 1 - best.outliers / judge.before
    return (
        f"no set of at most {len(units)} units removes the outlier tokens at layer "
        f"{detection.layer}: the best {size} remove {removed:.1%} of {judge.before} and leave the "
        f"largest patch norm at {best.largest / judge.median:.2f} times the median; expected "
        f"{REMOVED:.0%} and {TIMES_MEDIAN:g} times: try --max-neurons above {search.max_neurons}, "
        "another --detection-layer, or more images"
    )


def _with_values(
    vit: VisionTransformer, pixels: Tensor, neurons: Neurons, batch_size: int
) -> Neurons:
    """The neurons with ``value``: what the register receives, averaged over images."""
    sums: dict[int, Tensor] = {}
    with redirected(vit, neurons):
        handles = [
            vit.blocks[layer].down.register_forward_pre_hook(_adder(sums, layer, vit.layout.count))
            for layer in neurons.layers
        ]
        try:
            for part in torch.split(pixels, batch_size):
                run_until(vit, part, neurons.layers[-1])
        finally:
            for handle in handles:
                handle.remove()
    return Neurons(tuple(_valued(n, sums, len(pixels)) for n in neurons.neurons))


def _adder(sums: dict[int, Tensor], layer: int, register: int) -> Callable[..., None]:
    # Registered after the redirect's own hook, so it sees what the register was given.
    def add(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        received = args[0][:, register].double().sum(dim=0)
        sums[layer] = sums.get(layer, torch.zeros_like(received)) + received

    return add


def _valued(neuron: RegisterNeuron, sums: Mapping[int, Tensor], images: int) -> RegisterNeuron:
    value = float(sums[neuron.layer][neuron.index]) / images
    return RegisterNeuron(neuron.layer, neuron.index, neuron.score, neuron.sign, value)
