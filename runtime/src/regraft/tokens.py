"""How the tokens of one model lie in a sequence.

A sequence is: prefix tokens (CLS, distillation token, trained registers), then the patches in row
order, then, on the patched graph inside the network only, the test-time registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regraft.json_values import integer, truth


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
        """Reads what :meth:`to_json` wrote.

        Raises:
            KeyError: a field is missing.
            ValueError: a field is malformed; the message names it.
        """
        grid, class_token = data["grid"], data["class_token"]
        if not isinstance(grid, list | tuple) or len(grid) != 2:
            raise ValueError(f"tokens.grid is {grid!r}; expected two positive integers")
        return cls(
            class_token=truth("tokens.class_token", class_token),
            prefix=integer("tokens.prefix", data["prefix"], least=int(class_token)),
            grid=(integer("tokens.grid[0]", grid[0], 1), integer("tokens.grid[1]", grid[1], 1)),
            width=integer("tokens.width", data["width"], 1),
            depth=integer("tokens.depth", data["depth"], 1),
            heads=integer("tokens.heads", data["heads"], 1),
            test_time_registers=integer("tokens.test_time_registers", data["test_time_registers"]),
        )
