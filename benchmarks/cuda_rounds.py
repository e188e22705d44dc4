"""How the rivals of ``benchmarks.cuda_overhead`` take turns on a card.

A card that is kept busy wavers: its clock follows its limit of power and its warmth. What costs
half a percent is found only where both are run within the same few milliseconds, many times. And
one opening of a graph differs from the next for as long as it is open, on an H200 mostly by some
tenths of a percent, at batch 1 by up to 3. So our own graphs are compared closely, and opened
several times; PyTorch's, which differ more, at the pace at which each runs alone. What is compared
closely runs at one clock: what a graph costs by drawing more power shows at its own pace alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from regraft.timing import Ratio, Times, compare

Rival = Callable[[int], float]  # runs in a row -> seconds per run
SAMPLE = 0.01  # seconds of runs in a row that make one figure
# Runs that fill the card take it to its limit of power, and it needs some 20 ms to settle at a
# clock: at that of whoever ran before, until then.
FULL = 0.002  # seconds of a run, from which on that is so
SETTLED = 0.05  # seconds of runs in a row before those that make the figure, and of those
CLOSE = 0.005  # seconds of runs in a row, compared closely
CLOSE_ROUNDS, FEW_ROUNDS = 60, 20  # at least: of short runs, and of those that take longer


def fills_the_card(rival: Rival) -> bool:
    """Whether a run of it takes so long that the card's clock follows."""
    return rival(3) > FULL


def at_their_pace(
    rivals: Mapping[str, Rival], full: bool, *, seconds: float, rounds: int
) -> tuple[dict[str, Times], dict[str, Times]]:
    """Runs in a row, settled if they fill the card, and single runs with the time to start them."""
    sample = SETTLED if full else SAMPLE
    runs = {name: max(1, round(sample / rival(3))) for name, rival in rivals.items()}
    settled = {name: partial(_settled, rival, runs[name], full) for name, rival in rivals.items()}
    singles = {name: partial(rival, 1) for name, rival in rivals.items()}
    times = compare(settled, seconds=seconds, rounds=rounds)
    return times, compare(singles, seconds=seconds / 3, rounds=rounds)


def closely(graphs: Mapping[str, Sequence[Rival]], *, seconds: float) -> dict[str, list[Times]]:
    """Each graph as often as it is open, in turns of :data:`CLOSE` seconds.

    Args:
        graphs: name -> the same graph, opened several times.
        seconds: how long to go on.

    Returns:
        Name -> times of each, over the same rounds.
    """
    each = {name: same[0](3) for name, same in graphs.items()}
    turns = {
        f"{name} {i}": partial(rival, max(1, round(CLOSE / each[name])))
        for name, same in graphs.items()
        for i, rival in enumerate(same)
    }
    few = max(each.values()) > CLOSE
    times = compare(turns, seconds=seconds, rounds=FEW_ROUNDS if few else CLOSE_ROUNDS)
    return {name: [times[f"{name} {i}"] for i in range(len(same))] for name, same in graphs.items()}


def ratio(first: Sequence[Times], second: Sequence[Times]) -> Ratio:
    """Of two graphs that were compared closely: in each round, the mean of all that are open."""

    def mean(same: Sequence[Times]) -> Times:
        return Times(np.mean([one.seconds for one in same], axis=0))

    return Ratio.of(mean(first), mean(second))


def _settled(rival: Rival, runs: int, full: bool) -> float:
    if full:
        rival(runs)
    return rival(runs)
