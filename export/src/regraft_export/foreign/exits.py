"""Rewrite: the registers are cut off wherever tokens leave the stack.

Whatever is read outside the stack (the final norm, pooling, outputs of inner blocks or attention
maps) reads a slice to the tokens that were there before. An output keeps its name.

Before::  block -> norm          After::  block -> Slice -> norm
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from regraft.errors import RewriteError
from regraft_export.graph.dims import Dims
from regraft_export.graph.document import Editor, consumers
from regraft_export.graph.token_axis import TokenAxis


def cut_exits(
    graph: gs.Graph, axis: TokenAxis, inside: Collection[int], *, open_count: bool
) -> list[str]:
    """Cuts them off.

    Args:
        graph: changed in place, before the registers are appended.
        axis: dimensions of what is inside.
        inside: nodes of the stack and before it, by id.
        open_count: whether T is open until run time.

    Returns:
        The tensors that were cut, as ``name (reader, ...)``.

    Raises:
        RewriteError: a tensor leaves in a form from which registers cannot be cut.
    """
    editor, cut = Editor(graph), []
    nodes = {id(n) for n in graph.nodes}
    for node in [n for n in graph.nodes if id(n) in inside]:
        for value in node.outputs:
            if value is axis.tokens:
                continue
            outside = [n for n in consumers(value) if id(n) not in inside]
            leaves = any(value is t for t in graph.outputs)
            if not outside and not leaves:
                continue
            if axis.differs(value):
                raise RewriteError(
                    f"node {outside[0].name!r} ({outside[0].op}) computes with the token count "
                    f"{value.name!r} of the network, which would include the registers"
                )
            dims = axis.dims.get(id(value))
            if dims is None or dims.before == dims.after:
                continue
            if any(id(n) not in nodes for n in outside):
                raise RewriteError(
                    f"the tokens {value.name!r} are read inside a branch or loop; expected plain "
                    "nodes alone"
                )
            readers = [n.name for n in outside] + (["output"] if leaves else [])
            _cut(graph, editor, value, dims, axis, outside, open_count)
            cut.append(f"{value.name} ({', '.join(readers)})")
    return cut


def _cut(
    graph: gs.Graph,
    editor: Editor,
    value: gs.Variable,
    dims: Dims,
    axis: TokenAxis,
    outside: list[gs.Node],
    open_count: bool,
) -> None:
    T, R = axis.shape[0], axis.registers
    axes = [k for k in range(len(dims.before)) if dims.carries(k)]
    if any(dims.pairs()[k] != (T, T + R) for k in axes):
        raise RewriteError(
            f"the tensor {value.name!r} {dims.before} leaves the network with tokens merged into "
            "another dimension; registers cannot be cut off there"
        )
    ends = [-R if open_count else T] * len(axes)
    bounds = [
        editor.constant(f"regraft.cut.{what}", np.array(numbers, dtype=np.int64))
        for what, numbers in (("start", [0] * len(axes)), ("end", ends), ("axis", axes))
    ]
    result = editor.node("Slice", f"regraft.cut.{value.name}", [value, *bounds])
    for node in outside:
        node.inputs = [result if t is value else t for t in node.inputs]
    if any(value is t for t in graph.outputs):
        name = value.name
        value.name = editor.names.new(f"{name}.with_registers")
        result.name, result.shape = name, value.shape
        graph.outputs = [result if t is value else t for t in graph.outputs]
