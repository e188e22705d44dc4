"""The search for the fewest units that pass a judge: fewest layers first, then fewest units.

Units come in the order of their scores, layers in the order of their summed positive scores (of
the ``max_neurons`` best units):

1. Each of the six strongest layers alone, then the two, three, ... strongest together, until the
   best 4, 16, 64, ... units of these layers pass. Fewer layers come first because the cost of a
   patched model is per layer.
2. From a set of more than two layers, each layer is left out in turn, weakest first, and stays
   out if what is left can still pass.
3. Bisection for the fewest best units of these layers that pass.
4. Units that turn out not to be needed are dropped, weakest first: in slices of an eighth, then
   smaller, then one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from regraft_export.finding.judge import Judge, Limits, Unit
from regraft_export.finding.score import Scores

_SINGLE_LAYERS = 6
_GROWTH = 4
_PRUNING_TRIALS = 200


class Search:
    """Steps 1 to 4, for one set of limits at a time."""

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
