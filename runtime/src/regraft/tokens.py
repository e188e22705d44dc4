"""How the tokens of one model lie in a sequence.

A sequence is: prefix tokens (CLS, distillation token, trained registers), then the patches in row
order, then, on the patched graph inside the network only, the test-time registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TokenLayout:
    """Token counts and sizes of one Vision Transformer at one image size.

    Attributes:
        class_token: whether token 0 is CLS.
        prefix: number of prefix tokens, CLS included (0 without any).
        grid: patch grid (rows, cols).
        width: D, the size of a token.
        depth: number of blocks.
        heads: attention heads per block.
        test_time_registers: how many registers the patched graph appends.
    """

    class_token: bool
    prefix: int
    grid: tuple[int, int]
    width: int
    depth: int
    heads: int
    test_time_registers: int = 1

    @property
    def patches(self) -> int:
        """Number of patch tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def count(self) -> int:
        """Number of tokens without test-time registers: P + patches."""
        return self.prefix + self.patches

    def to_json(self) -> dict[str, Any]:
        """The layout as plain JSON values."""
        return {**asdict(self), "grid": list(self.grid)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenLayout:
        """Reads what :meth:`to_json` wrote."""
        rows, cols = data["grid"]
        return cls(
            class_token=bool(data["class_token"]),
            prefix=int(data["prefix"]),
            grid=(int(rows), int(cols)),
            width=int(data["width"]),
            depth=int(data["depth"]),
            heads=int(data["heads"]),
            test_time_registers=int(data["test_time_registers"]),
        )
