"""A tensor's dimensions before and after the register is appended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Dims:
    """A tensor's dimensions before and after the register is appended."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def carries(self, axis: int) -> bool:
        """Whether tokens lie along an axis."""
        return self.before[axis] != self.after[axis]

    def pairs(self) -> list[tuple[int, int]]:
        """(before, after) by axis."""
        return list(zip(self.before, self.after, strict=True))


def from_pairs(pairs: Sequence[tuple[int, int]]) -> Dims:
    """Dimensions from (before, after) by axis."""
    return Dims(tuple(b for b, _ in pairs), tuple(a for _, a in pairs))
