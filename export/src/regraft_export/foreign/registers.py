"""Registers in a surveyed file: the rows that are appended, and which tensors grow with them.

A patched file and the graphs that find neurons have this in common.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from regraft.errors import RewriteError
from regraft_export.foreign.survey import Survey
from regraft_export.graph.dims import Dims
from regraft_export.graph.document import Editor, consumers
from regraft_export.graph.token_axis import TokenAxis


def follow(found: Survey, registers: int) -> TokenAxis:
    """Walks the stack's nodes, as if registers had been appended; nothing is changed.

    Raises:
        RewriteError: a token count cannot be decided.
    """
    entry, width = found.entry, found.stack.mlps[0].width
    start = entry.dims(found.image.batch, width, registers)
    known = found.shapes.shapes
    axis = TokenAxis(entry.tokens, (entry.count, width), registers, start=start, known=known)
    for node in found.view.graph.nodes:
        if id(node) in found.inside:
            axis.visit(node)
    return axis


def grown(found: Survey, axis: TokenAxis) -> dict[int, Dims]:
    """Dimensions of what has grown. What enters is as long as it was; what was padded grows."""
    return {key: dims for key, dims in axis.dims.items() if key != id(found.entry.tokens)}


def append(found: Survey, registers: int) -> gs.Variable:
    """Zero rows behind the tokens, for whatever in the stack reads them."""
    editor, entry = Editor(found.view.graph), found.entry
    tokens = entry.tokens
    readers = [n for n in consumers(tokens) if id(n) in found.inside]
    numbers = np.zeros((2, 3), dtype=np.int64)  # in front and behind, by axis
    numbers[1, entry.axis] = registers
    pads = editor.constant("regraft.pads", numbers.ravel())
    padded = editor.node("Pad", "regraft.append_register", [tokens, pads], {"mode": "constant"})
    for node in readers:
        node.inputs = [padded if t is tokens else t for t in node.inputs]
    return padded


@dataclass(frozen=True)
class Along:
    """How tokens lie in a tensor: along ``axis`` of three, or ``flat`` in rows (batch, T)."""

    axis: int
    flat: bool


def along(found: Survey, axis: TokenAxis, value: gs.Tensor, what: str) -> Along:
    """How tokens lie in one that has a vector for each.

    Raises:
        RewriteError: in another way; the message begins with ``what``.
    """
    dims = axis.dims[id(value)]
    flat = len(dims.before) == 2
    where = [k for k in range(len(dims.before)) if dims.carries(k)]
    if not flat and (len(dims.before) != 3 or where not in ([0], [1])):
        raise RewriteError(
            f"{what} {value.name!r} has shape {dims.before}; expected (batch, T, hidden) or rows "
            "of it"
        )
    if flat and found.entry.axis != 1:
        raise RewriteError(f"{what} {value.name!r} has rows of (T, batch); expected (batch, T)")
    return Along(1 if flat else where[0], flat)
