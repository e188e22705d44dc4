"""The search for the fewest units that pass a judge: fewest layers first, then fewest units.

1. The best 4, 16, 64, ... units of all layers, until they pass, then bisection: the shortest head
   of the ranking that passes (arXiv 2506.08010 sweeps its length likewise).
2. The pool is that head and as many units again (eight at least). No other unit may stand in:
   enough units that have nothing to do with outliers wreck the features of an early layer so
   thoroughly that the outliers go too. On the ViT that ships with the package, 81 such units of
   layer 0 did.
3. Fewer layers come first, because the cost of a patched model is per layer: of the six layers
   with the largest summed scores in the pool, each alone, then each pair, then the three, four, ...
   strongest together, as long as that is fewer layers than the head touches. Failing that, layers
   of the head are left out one after the other, weakest first, where the pool's units in the
   others can do without.
4. Of the pool's units in these layers, the fewest that bring the largest norm within 5 % of what
   any number of them can, by bisection; then units that turn out not to be needed for that are
   dropped, weakest first: in slices of an eighth, then smaller, then one by one.
5. Notable units of these layers stay, or are taken too where the set still passes: those that
   write at least a hundredth of an average outlier. Some write the whole outlier, in few images,
   of which a small select part may have none, and a unit costs next to nothing once its layer is
   touched. On the ViT that ships, the fewest units for 16 images left outliers in 16 others with
   2 of 20 seeds (largest norm 2.1 times the median); with all notable ones it was 1.7 at most.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from regraft_export.finding.judge import Judge, Limits, Unit
from regraft_export.finding.score import Scores

_COMBINED_LAYERS = 6
_GROWTH = 4
_SPARE_UNITS = 8
_WITHIN = 1.05
_PRUNING_TRIALS = 200


class Search:
    """The steps above, for one set of limits at a time."""

    def __init__(
        self,
        judge: Judge,
        scores: Scores,
        ranking: Sequence[Unit],
        notable: Collection[Unit] = (),
        advance: Callable[[int], None] = lambda images: None,
    ) -> None:
        """Runs nothing yet.

        Args:
            judge: says whether a set of units passes.
            scores: of all units.
            ranking: the units that may be chosen, best first.
            notable: those of them that are chosen with their layer.
            advance: told how many images were run.
        """
        self._judge, self._scores = judge, scores
        self._ranking, self._notable, self._advance = ranking, frozenset(notable), advance

    def smallest(self, limits: Limits) -> list[Unit]:
        """The chosen units, best first; empty if nothing reaches ``limits``."""
        head = self._head(self._ranking, limits)
        if not head:
            return []
        pool = self._ranking[: len(head) + max(len(head), _SPARE_UNITS)]
        layers = self._fewer_layers(head, pool, limits) or self._needed_layers(head, pool, limits)
        units = [unit for unit in pool if unit[0] in layers]
        reachable = replace(limits, norm=min(limits.norm, _WITHIN * self._lowest(units, limits)))
        found = self._pruned(self._head(units, reachable), reachable)
        stays = {u for u in self._notable if u[0] in layers} | set(found)
        whole = [unit for unit in self._ranking if unit in stays]
        return whole if self._passes(whole, limits) else found

    def _passes(self, units: Sequence[Unit], limits: Limits) -> bool:
        before = self._judge.runs
        verdict = self._judge.passes(units, limits)
        self._advance(self._judge.runs - before)
        return verdict

    def _head(self, units: Sequence[Unit], limits: Limits) -> list[Unit]:
        """The fewest first ones of ``units`` that pass; empty if none do."""
        low = high = 0
        for size in sizes(len(units)):
            if self._passes(units[:size], limits):
                high = size
                break
            low = size
        while high - low > 1:
            middle = (low + high) // 2
            if self._passes(units[:middle], limits):
                high = middle
            else:
                low = middle
        return list(units[:high])

    def _lowest(self, units: Sequence[Unit], limits: Limits) -> float:
        """The lowest largest norm that first ones of ``units`` leave within ``limits``."""
        lowest = limits.norm
        for size in sizes(len(units)):
            if self._passes(units[:size], limits):
                lowest = min(lowest, self._judge.run(units[:size]).largest)
        return lowest

    def _fewer_layers(
        self, head: Sequence[Unit], pool: Sequence[Unit], limits: Limits
    ) -> tuple[int, ...]:
        """Fewer layers than the head has, in which the pool's units pass; empty if there are none.

        Of as many layers, those that pass with the fewest units.
        """
        strength: dict[int, float] = {}
        for layer, index in pool:
            strength[layer] = strength.get(layer, 0.0) + float(self._scores.score[layer][index])
        layers = sorted(strength, key=lambda layer: (-strength[layer], layer))
        for count in range(1, len({layer for layer, _ in head})):
            passing: dict[tuple[int, ...], int] = {}
            for chosen in _combined(layers, count):
                units = [unit for unit in pool if unit[0] in chosen]
                if self._passes(units, limits):
                    passing[chosen] = len(self._head(units, limits))
            if passing:
                return min(passing, key=lambda chosen: passing[chosen])
        return ()

    def _needed_layers(
        self, head: Sequence[Unit], pool: Sequence[Unit], limits: Limits
    ) -> tuple[int, ...]:
        """The head's layers, best first, without those that are not needed."""
        kept = tuple(dict.fromkeys(layer for layer, _ in head))
        for layer in reversed(kept):
            rest = tuple(other for other in kept if other != layer)
            if self._passes([unit for unit in pool if unit[0] in rest], limits):
                kept = rest
        return kept

    def _pruned(self, units: list[Unit], limits: Limits) -> list[Unit]:
        """The units without those that are not needed."""
        size, trials = max(1, len(units) // 8), 0
        while trials < _PRUNING_TRIALS:
            end = len(units)
            while end > 0 and len(units) > 1 and trials < _PRUNING_TRIALS:
                rest = units[: max(0, end - size)] + units[end:]
                trials += 1
                if self._passes(rest, limits):
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


def _combined(layers: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    """Which ``count`` of the layers (strongest first) are tried together."""
    if count <= 2:
        yield from combinations(layers[:_COMBINED_LAYERS], count)
    elif count <= len(layers):
        yield tuple(layers[:count])
