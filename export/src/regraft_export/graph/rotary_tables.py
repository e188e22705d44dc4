"""Rewrite: tables of rotary positions become constants, with a row for each register.

The trace leaves each table an input of the graph, so that no folding hides where it is used.

1. The input becomes a constant of the same values.
2. In a patched graph it has R further rows that rotate nothing, behind those of the patches, where
   the registers stand.

Before::  input table (N, m) -> Mul        After::  constant (N + R, m) -> Mul
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft_export.graph.dims import Dims
from regraft_export.graph.document import Editor, replace_uses, tensor


@dataclass(frozen=True)
class RotaryTable:
    """One table.

    Attributes:
        values: (..., N, m), a row for each patch.
        neutral: (1, m), the row that rotates nothing.
    """

    values: NDArray[np.generic]
    neutral: NDArray[np.generic]

    def extended(self, registers: int) -> NDArray[np.generic]:
        """(..., N + R, m)."""
        shape = (*self.values.shape[:-2], registers, self.values.shape[-1])
        return np.concatenate([self.values, np.broadcast_to(self.neutral, shape)], axis=-2)


def table_dims(
    graph: gs.Graph, tables: Mapping[str, RotaryTable], registers: int
) -> dict[int, Dims]:
    """By the tensor's id, what becomes of each table's dimensions."""
    return {
        id(tensor(graph, name)): Dims(table.values.shape, table.extended(registers).shape)
        for name, table in tables.items()
    }


def bind_rotary_tables(graph: gs.Graph, tables: Mapping[str, RotaryTable], registers: int) -> None:
    """Makes the tables constants.

    Args:
        graph: changed in place; its inputs of the tables' names go.
        tables: by name of the input.
        registers: R; 0 for a baseline.
    """
    editor = Editor(graph)
    for name, table in tables.items():
        given = tensor(graph, name)
        constant = editor.constant(f"{name}.rows", table.extended(registers))
        replace_uses(graph, given, constant)
        graph.inputs = [t for t in graph.inputs if t is not given]
