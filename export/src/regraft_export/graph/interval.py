"""Numbers between which all elements of a tensor lie, and what a type makes of them.

Integers wrap around beyond what their type holds, and floating-point types round: of a result, only
what is true in spite of both is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

_MOST = 256  # integers up to it are exact in every type, bfloat16 among them


@dataclass(frozen=True)
class Bounds:
    """What is known of every element of a tensor, none of which is NaN.

    Attributes:
        low, high: the elements lie between them, both included; of booleans 0 and 1.
        boolean: whether they are booleans.
    """

    low: float
    high: float
    boolean: bool = False

    @property
    def zero(self) -> bool:
        """Whether every element is the number 0."""
        return self.low == self.high == 0 and not self.boolean

    @property
    def true(self) -> bool:
        """Whether every element is true."""
        return self.boolean and self.low == 1

    @property
    def false(self) -> bool:
        """Whether every element is false."""
        return self.boolean and self.high == 0


def of_array(values: NDArray[np.generic]) -> Bounds | None:
    """Bounds of a constant; None if it is empty, has a NaN or is not of numbers."""
    if not values.size or values.dtype.kind in "OUSc":
        return None
    if values.dtype == np.bool_:
        return Bounds(float(values.min()), float(values.max()), boolean=True)
    wide = values.astype(np.float64)
    return None if np.isnan(wide).any() else Bounds(float(wide.min()), float(wide.max()))


def hull(parts: list[Bounds | None]) -> Bounds | None:
    """Bounds of all parts together; None if one is unknown, or if only some are booleans."""
    known = [b for b in parts if b is not None]
    if not known or len(known) < len(parts) or len({b.boolean for b in known}) > 1:
        return None
    return Bounds(min(b.low for b in known), max(b.high for b in known), known[0].boolean)


def in_type(given: Bounds, kind: np.dtype[np.generic]) -> Bounds | None:
    """Bounds of the elements once they are cast; None if they may wrap around."""
    if kind == np.bool_:
        nothing, something = given.low == given.high == 0, given.low > 0 or given.high < 0
        return Bounds(float(something), float(not nothing), boolean=True)
    if kind.kind == "f" or kind.name == "bfloat16":
        return _held_by(kind, given)
    if kind.kind not in "iu" or not (is_exact(given.low) and is_exact(given.high)):
        return None
    width = np.iinfo(kind.name)  # beyond it, numbers wrap around
    return given if width.min <= given.low and given.high <= width.max else None


def _held_by(kind: np.dtype[np.generic], given: Bounds) -> Bounds:
    """Numbers in a floating-point type; those that it cannot hold may be anything beyond."""
    with np.errstate(over="ignore"):
        low, high = (float(np.float64(x).astype(kind)) for x in (given.low, given.high))
    return Bounds(low if low == given.low else -inf, high if high == given.high else inf)


def rounded(low: float, high: float) -> Bounds:
    """Numbers, of which those that some type cannot hold may be anything beyond."""
    return Bounds(low if is_exact(low) else -inf, high if is_exact(high) else inf)


def is_exact(number: float) -> bool:
    """Whether it is an integer that no type rounds."""
    return number.is_integer() and abs(number) <= _MOST


def held(given: Bounds, least: int, most: int) -> Bounds:
    """Bounds of integers, as far as their type reaches; integers, since floats are not exact."""
    low = int(given.low) if is_exact(given.low) else least
    return Bounds(low, int(given.high) if is_exact(given.high) else most)
