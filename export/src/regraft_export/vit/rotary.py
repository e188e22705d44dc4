"""Rotary positions: the cosines and sines that a model hands to its blocks beside the tokens.

Two layouts are in use. transformers gives a pair ``(cos, sin)``, each (..., patches, m); timm gives
one tensor (..., patches, 2 m), the sines first. Both rotate the last rows of the sequence, as many
as the table has, so a register behind the patches needs rows of its own: cos = 1 and sin = 0, which
rotate nothing. Without them every patch would get its neighbour's position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """How the blocks of a model take their tables.

    Attributes:
        place: the block's argument: a keyword, or a position (the tokens are at 0).
        given: what each block was given at the model's image size; often one object for all.
    """

    place: str | int
    given: tuple[Any, ...]

    def distinct(self) -> list[Any]:
        """The arguments without repetition: most models give all blocks the same."""
        return list({_identity(value): value for value in self.given}.values())

    def tables(self) -> list[Tensor]:
        """The tensors of all distinct arguments, one after another."""
        return [table for value in self.distinct() for table in tables_of(value)]

    def index(self, block: int) -> int:
        """Which of the distinct arguments a block is given."""
        identities = [_identity(value) for value in self.distinct()]
        return identities.index(_identity(self.given[block]))

    def replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with the table changed."""
        if isinstance(self.place, str):
            return args, {**kwargs, self.place: change(kwargs[self.place])}
        before, after = args[: self.place], args[self.place + 1 :]
        return (*before, change(args[self.place]), *after), kwargs


def _identity(value: Any) -> tuple[Any, ...]:
    # Slices of one tensor, as a model with a table for each block makes them, are other objects at
    # each look.
    return tuple((t.data_ptr(), tuple(t.shape)) for t in tables_of(value))


def is_rotary(value: Any, patches: int) -> bool:
    """Whether an argument of a block is a table of rotary positions, one row per patch."""
    halves = _cos_and_sin(value)
    if halves is None:
        return False
    cos, sin = (half.detach().float() for half in halves)
    off_circle = (cos.square() + sin.square() - 1).abs()  # bfloat16 rounds it by up to 0.02
    return cos.shape[-2] == patches and bool((off_circle < 3e-2).all())


def tables_of(value: Any) -> list[Tensor]:
    """The tensors of an argument that :func:`is_rotary`: one, or cosines and sines."""
    return [value] if isinstance(value, Tensor) else list(value)


def argument_of(tables: Sequence[Tensor]) -> Any:
    """The argument that holds these tensors."""
    return tables[0] if len(tables) == 1 else tuple(tables)


def neutral_rows(tables: Sequence[Tensor]) -> list[Tensor]:
    """For each table the row that rotates nothing, (1, m) or (1, 2 m)."""
    if len(tables) == 1:
        row = tables[0].new_zeros(1, tables[0].shape[-1])
        row[:, row.shape[1] // 2 :] = 1
        return [row]
    cos, sin = tables
    return [cos.new_ones(1, cos.shape[-1]), sin.new_zeros(1, sin.shape[-1])]


def extended(value: Any, registers: int) -> Any:
    """The same argument with ``registers`` further rows that rotate nothing."""
    tables = tables_of(value)
    pairs = zip(tables, neutral_rows(tables), strict=True)
    return argument_of([_with_rows(table, row, registers) for table, row in pairs])


def _cos_and_sin(value: Any) -> tuple[Tensor, Tensor] | None:
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[-1] % 2 == 0:
        sin, cos = value.chunk(2, dim=-1)
        return cos, sin
    if isinstance(value, tuple | list) and len(value) == 2:
        cos, sin = value
        both = isinstance(cos, Tensor) and isinstance(sin, Tensor)
        if both and cos.shape == sin.shape and cos.ndim >= 2:
            return cos, sin
    return None


def _with_rows(table: Tensor, row: Tensor, count: int) -> Tensor:
    return torch.cat([table, row.expand(*table.shape[:-2], count, -1)], dim=-2)
