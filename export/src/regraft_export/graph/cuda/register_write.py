"""How a patched graph adds to the registers' rows: the form that the redirect leaves behind.

``y = alone + row * column`` with row (B, 1, D) and column (1, T + R, 1), zero but on registers; or,
with ``value = constant``, a bias (T + R, D) whose rows differ on the registers alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft_export.graph.document import maker


@dataclass(frozen=True)
class RegisterWrite:
    """One place where something is added to the registers' rows.

    Attributes:
        add: the node that adds.
        alone: (B, T + R, D), without it.
        row: (B, 1, D), what is added.
        first: position of the first register.
        scales: (R,), factor of each register.
        dtype: of all these.
    """

    add: gs.Node
    alone: gs.Variable
    row: gs.Variable
    first: int
    scales: NDArray[np.float64]
    dtype: np.dtype[np.generic]


def register_writes(graph: gs.Graph) -> Iterator[RegisterWrite]:
    """Every such place; the graph may be changed between two of them."""
    for add in [node for node in graph.nodes if node.op == "Add"]:
        for slot in (0, 1):
            placed, alone = add.inputs[slot], add.inputs[1 - slot]
            made_by = maker(placed)
            if made_by is None or made_by.op != "Mul" or not isinstance(alone, gs.Variable):
                continue
            column = next((t for t in made_by.inputs if isinstance(t, gs.Constant)), None)
            row = next((t for t in made_by.inputs if isinstance(t, gs.Variable)), None)
            if column is None or row is None or (found := on_last_tokens(column)) is None:
                continue
            yield RegisterWrite(add, alone, row, *found, dtype=column.values.dtype)
            break


@dataclass(frozen=True)
class ConstantWrite:
    """A bias that differs on the registers, as ``value = constant`` leaves it.

    Attributes:
        add: the node that adds it.
        product: (B, T + R, D), without it.
        bias: (D,), of every other token.
        rows: (R, D), what the registers get besides.
        first: position of the first register.
    """

    add: gs.Node
    product: gs.Variable
    bias: NDArray[np.float64]
    rows: NDArray[np.float64]
    first: int


def constant_writes(graph: gs.Graph) -> Iterator[ConstantWrite]:
    """Every bias (T + R, D) that is the same on all tokens but the last ones."""
    for add in [node for node in graph.nodes if node.op == "Add"]:
        constant = next((t for t in add.inputs if isinstance(t, gs.Constant)), None)
        product = next((t for t in add.inputs if isinstance(t, gs.Variable)), None)
        if constant is None or product is None or constant.values.ndim != 2:
            continue
        values = np.asarray(constant.values, np.float64)
        differs = np.flatnonzero((values != values[0]).any(axis=1))
        if len(differs):
            first = int(differs[0])
            yield ConstantWrite(add, product, values[0], values[first:] - values[0], first)


def on_last_tokens(column: gs.Constant) -> tuple[int, NDArray[np.float64]] | None:
    """First token and factors, of a column (1, T + R, 1) that is zero before them."""
    values = np.asarray(column.values, np.float64)
    if values.ndim != 3 or values.shape[0] != 1 or values.shape[2] != 1 or values.shape[1] < 2:
        return None
    nonzero = np.flatnonzero(values[0, :, 0])
    if not len(nonzero):
        return None
    first = int(nonzero[0])
    # A register of factor zero in between belongs to the others.
    return (first, values[0, first:, 0]) if first > 0 else None
