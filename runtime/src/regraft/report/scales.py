"""From numbers to places on an axis or a colour bar, and the ticks that name them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["linear", "log"]


@dataclass(frozen=True)
class Scale:
    """A range of numbers and how it is spread over a length of 1.

    Attributes:
        lo: the number at 0.
        hi: the number at 1, above ``lo``.
        kind: linear, or logarithmic with ``lo`` above 0.
    """

    lo: float
    hi: float
    kind: Kind = "linear"

    def __post_init__(self) -> None:
        if not self.lo < self.hi or (self.kind == "log" and self.lo <= 0):
            raise ValueError(f"no {self.kind} scale runs from {self.lo} to {self.hi}")

    def place(self, values: Any) -> NDArray[np.float64]:
        """Where numbers lie, from 0 to 1; those outside the range go to its ends.

        Args:
            values: any shape.

        Returns:
            float64 of the same shape.
        """
        clipped = np.clip(np.asarray(values, np.float64), self.lo, self.hi)
        if self.kind == "log":
            share = np.log(clipped / self.lo) / math.log(self.hi / self.lo)
            return np.asarray(np.clip(share, 0, 1))  # rounding may pass the ends
        return np.asarray((clipped - self.lo) / (self.hi - self.lo))

    def ticks(self, gap: float = 0.12) -> list[float]:
        """Round numbers within the range, ascending, at least ``gap`` apart in place."""
        if self.kind == "linear":
            return self._multiples(_round_step((self.hi - self.lo) * gap))
        chosen: list[float] = []
        for tick in self._round_numbers():
            if all(abs(self.place(tick) - self.place(other)) >= gap for other in chosen):
                chosen.append(tick)
        return sorted(chosen)

    def _round_numbers(self) -> list[float]:
        """Round numbers within a logarithmic range, the roundest first."""
        decades = range(math.floor(math.log10(self.lo)), math.ceil(math.log10(self.hi)) + 1)
        every = [factor * 10.0**decade for factor in (1, 3, 2, 5) for decade in decades]
        inside = [tick for tick in every if self.lo * 0.999 <= tick <= self.hi * 1.001]
        # Less than a decade may hold one of these, which would not tell the range.
        return inside if len(inside) > 3 else self._multiples(_round_step((self.hi - self.lo) / 8))

    def _multiples(self, step: float) -> list[float]:
        first, last = math.ceil(self.lo / step - 1e-9), math.floor(self.hi / step + 1e-9)
        digits = 12 - math.floor(math.log10(step))  # as many of a small number as of a large one
        return [round(i * step, digits) for i in range(first, last + 1)]


def log_scale(values: Sequence[float] | NDArray[Any], margin: float = 1.0) -> Scale:
    """A logarithmic scale that holds all positive numbers among ``values``.

    Args:
        values: finite numbers; zeros, which have no logarithm, go to the lower end.
        margin: factor by which the range is wider at both ends.
    """
    array = np.asarray(values, np.float64)
    positive = array[array > 0]
    lo, hi = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    if hi < lo * 1.05:  # all alike: the range needs some width
        lo, hi = lo / 1.05, hi * 1.05
    return Scale(float(lo) / margin, float(hi) * margin, "log")


def zero_scale(largest: float) -> Scale:
    """A linear scale from 0 to a round number at or above ``largest``."""
    if largest <= 0:
        return Scale(0.0, 1.0)
    step = _round_step(largest / 5)
    return Scale(0.0, math.ceil(largest / step - 1e-9) * step)


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= least * (1 - 1e-9))
