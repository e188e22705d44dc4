"""Where the tokens enter a stack, and which of them are patches."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from regraft.errors import ModelError
from regraft_export.foreign.constants import is_constant
from regraft_export.foreign.mlp import PASSES
from regraft_export.foreign.reach import Reach
from regraft_export.foreign.shapes import Shapes
from regraft_export.foreign.stacks import Stack
from regraft_export.foreign.trial import Image
from regraft_export.graph.dims import Dims

_NORMS = frozenset(["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"])


@dataclass(frozen=True)
class Entry:
    """Where the tokens enter.

    Attributes:
        tokens: after the position embedding, before a norm in front of the first block.
        axis: along which they lie: 1 in (B, T, D), 0 in (T, B, D).
        count: T, at the size the graph was walked.
        grid: of the patches (rows, cols), the last T - prefix tokens; None if the graph does not
            show that the patches come last.
    """

    tokens: gs.Variable
    axis: int
    count: int
    grid: tuple[int, int] | None

    @property
    def prefix(self) -> int | None:
        """How many tokens come before the patches."""
        return None if self.grid is None else self.count - self.grid[0] * self.grid[1]

    def dims(self, batch: int, width: int, registers: int) -> Dims:
        """Dimensions of the tokens before and after the registers are appended."""
        before = (batch, self.count, width) if self.axis == 1 else (self.count, batch, width)
        after = tuple(n + registers * (k == self.axis) for k, n in enumerate(before))
        return Dims(before, after)


def find_entry(stack: Stack, image: Image, shapes: Shapes, reach: Reach) -> Entry:
    """Finds it.

    Raises:
        ModelError: what enters the first block is no token sequence.
    """
    tokens = before_norm(stack.start) or stack.start
    shape = shapes.of(tokens)
    grid = _grid(tokens, shapes, reach)
    axis = _axis(shape, image.batch, stack.mlps[0].width)
    if shape is None or axis is None:
        raise ModelError(
            f"what enters the first block, {tokens.name!r}, has shape {shape} at batch "
            f"{image.batch}; expected tokens (batch, T, {stack.mlps[0].width})"
        )
    count = shape[axis]
    if grid is not None and not _patches_last(tokens, count, grid, shapes):
        grid = None
    return Entry(tokens, axis, count, grid)


def before_norm(value: gs.Variable) -> gs.Variable | None:
    """What a tensor was before the norm that made it; None if no norm did."""
    while len(value.inputs) == 1:
        node = value.inputs[0]
        if node.op in _NORMS:
            return _as_variable(node.inputs[0])
        if node.op == "Div":
            return _centred(node.inputs[0])
        if node.op in ("Cast", "Identity", "Dropout"):
            value = node.inputs[0]
        elif node.op in ("Add", "Mul"):
            others = [t for t in node.inputs if not is_constant(t)]
            if len(others) != 1:
                return None
            value = others[0]
        else:
            return None
    return None


def _centred(value: gs.Tensor) -> gs.Variable | None:
    """x of ``x - mean(x)``."""
    while len(value.inputs) == 1 and value.inputs[0].op in ("Cast", "Identity"):
        value = value.inputs[0].inputs[0]
    if len(value.inputs) != 1 or value.inputs[0].op != "Sub":
        return None
    x, mean = value.inputs[0].inputs
    while len(mean.inputs) == 1 and mean.inputs[0].op in ("Cast", "Identity"):
        mean = mean.inputs[0].inputs[0]
    by_mean = len(mean.inputs) == 1 and mean.inputs[0].op == "ReduceMean"
    return _as_variable(x) if by_mean and mean.inputs[0].inputs[0] is x else None


def _as_variable(value: gs.Tensor) -> gs.Variable | None:
    return value if isinstance(value, gs.Variable) else None


def _axis(shape: tuple[int, ...] | None, batch: int, width: int) -> int | None:
    if shape is None or len(shape) != 3 or shape[2] != width:
        return None
    if shape[0] == batch and shape[1] > 1:
        return 1
    return 0 if shape[1] == batch and shape[0] > 1 else None


def _grid(tokens: gs.Variable, shapes: Shapes, reach: Reach) -> tuple[int, int] | None:
    shape = shapes.of(tokens)
    most = max(shape) if shape else 0
    grids = []
    for node in reach.nodes_of(reach.behind(tokens)):
        made = shapes.of(node.outputs[0]) if node.op == "Conv" else None
        if made is not None and len(made) == 4 and 1 < made[2] * made[3] <= most:
            grids.append((made[2], made[3]))
    return grids[-1] if grids else None


def _patches_last(tokens: gs.Variable, count: int, grid: tuple[int, int], shapes: Shapes) -> bool:
    """Whether the last tokens are the patches: walked back to where the prefix was put on."""
    patches = grid[0] * grid[1]
    if count == patches:
        return True
    pending: list[gs.Tensor] = [tokens]
    while pending:
        value = pending.pop()
        if len(value.inputs) != 1:
            continue
        node = value.inputs[0]
        if node.op == "Concat":
            shape = shapes.of(node.inputs[-1]) or ()
            return patches in shape[:-1]
        if node.op in PASSES or node.op in _NORMS:
            pending.append(node.inputs[0])
        elif node.op in ("Add", "Mul"):
            # Of two that are whole, one is a position embedding, which no Concat ends in.
            whole = shapes.of(node.outputs[0])
            pending += [t for t in node.inputs if shapes.of(t) == whole]
    return False
