"""Timing rivals fairly: side by side in one run, in an order that changes every round.

With a fixed order the first of each round measured 20 % faster on two shared cores; and a machine
that slows down half-way would favour whoever was measured before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WARM_UP = 2
_RESAMPLES = 2000


@dataclass(frozen=True)
class Times:
    """How long one rival took.

    Attributes:
        seconds: one figure per round.
    """

    seconds: NDArray[np.float64]

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return float(np.median(self.seconds))

    @property
    def p99(self) -> float:
        """99th percentile in seconds; with fewer than 100 rounds, near the maximum."""
        return float(np.quantile(self.seconds, 0.99))


@dataclass(frozen=True)
class Ratio:
    """How two rivals compare: over the ratios of their times in each round.

    Attributes:
        median: above 1 the first is slower.
        low: lower end of the median's 95 % interval (bootstrap over rounds).
        high: upper end.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Times, second: Times, seed: int = 0) -> Ratio:
        """The ratio of two rivals that were timed in the same rounds."""
        ratios = first.seconds / second.seconds
        rng = np.random.default_rng(seed)
        draws = np.median(rng.choice(ratios, (_RESAMPLES, len(ratios))), axis=1)
        low, high = np.quantile(draws, (0.025, 0.975))
        return cls(float(np.median(ratios)), float(low), float(high))


def race(
    rivals: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    rounds: int = 10,
    warm_up: int = _WARM_UP,
    check: Callable[[str, object], None] | None = None,
    seed: int = 0,
) -> dict[str, Times]:
    """Runs every rival once per round until time is up, by the clock on the wall.

    Args:
        rivals: name -> what to time.
        seconds: how long to go on.
        rounds: how many rounds at least.
        warm_up: runs of each rival before them, off the clock.
        check: called off the clock with each timed run's name and result; raises if it is wrong.
        seed: of the order.

    Returns:
        Name -> times, one per round, in seconds.
    """

    def timed(name: str) -> Callable[[], float]:
        def once() -> float:
            start = time.perf_counter()
            result = rivals[name]()
            taken = time.perf_counter() - start
            if check:
                check(name, result)
            return taken

        return once

    for rival in rivals.values():
        for _ in range(warm_up):
            rival()
    own = {name: timed(name) for name in rivals}
    return compare(own, seconds=seconds, rounds=rounds, seed=seed)


def compare(
    rivals: Mapping[str, Callable[[], float]], *, seconds: float, rounds: int = 10, seed: int = 0
) -> dict[str, Times]:
    """As :func:`race`, for rivals that time themselves: each returns its seconds; not warmed up."""
    rng = np.random.default_rng(seed)
    times: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    end, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < end:
        order = _another_order(order, rng)
        for name in order:
            times[name].append(rivals[name]())
        done += 1
    return {name: Times(np.array(taken)) for name, taken in times.items()}


def _another_order(order: list[str], rng: np.random.Generator) -> list[str]:
    while len(order) > 1:
        shuffled = [order[i] for i in rng.permutation(len(order))]
        if shuffled != order:
            return shuffled
    return order
