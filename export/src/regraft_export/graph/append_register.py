"""Rewrite: the test-time registers enter the network as zero tokens, appended last.

1. ``tokens`` (B, T, D) is padded with R zero rows: one Pad node, which needs no batch size.
2. Every baked token count between the token entry and ``final`` becomes T + R.

Before::  tokens -> block 0            After::  tokens -> Pad -> block 0
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from regraft.errors import RewriteError
from regraft_export.graph.anchors import Anchors
from regraft_export.graph.document import Editor, ancestors, consumers, replace_uses, tensor
from regraft_export.graph.token_axis import TokenAxis


def append_register(
    graph: gs.Graph, anchors: Anchors, shape: tuple[int, int], registers: int
) -> list[str]:
    """Appends the registers.

    Args:
        graph: a traced graph, changed in place.
        anchors: its places.
        shape: (T, D) of the tokens.
        registers: R.

    Returns:
        The mended constants, as ``node: before -> after``.

    Raises:
        RewriteError: a token count cannot be decided, or tokens leave the network on a way other
            than through ``final``.
    """
    graph.toposort()
    tokens = tensor(graph, anchors.tokens)
    inside = _nodes_of_the_network(graph, anchors)
    axis = TokenAxis(tokens, shape, registers)
    for node in graph.nodes:
        if id(node) in inside:
            axis.visit(node)
    _refuse_leaks(graph, anchors, axis, inside)
    mended = mend(graph, axis)
    editor = Editor(graph)
    pads = editor.constant("regraft.pads", np.array([0, 0, 0, 0, registers, 0], dtype=np.int64))
    padded = editor.node("Pad", "regraft.append_register", [tokens, pads], {"mode": "constant"})
    replace_uses(graph, tokens, padded, keep=editor.added)
    return mended


def _nodes_of_the_network(graph: gs.Graph, anchors: Anchors) -> set[int]:
    ends = [tensor(graph, name) for name in (*anchors.hidden, anchors.final)]
    return {id(node) for end in ends for node in ancestors(end)}


def _refuse_leaks(graph: gs.Graph, anchors: Anchors, axis: TokenAxis, inside: set[int]) -> None:
    for node in graph.nodes:
        for output in node.outputs:
            if id(output) not in axis.dims or output.name == anchors.final:
                continue
            # Outputs of the trace itself (an Identity for a tensor that leaves twice) read nothing.
            outside = [n for n in consumers(output) if id(n) not in inside and n.op != "Identity"]
            dims = axis.dims[id(output)]
            if outside and any(dims.carries(k) for k in range(len(dims.before))):
                raise RewriteError(
                    f"node {outside[0].name!r} ({outside[0].op}) reads the tokens "
                    f"{output.name!r} inside the network; expected all features to leave through "
                    f"{anchors.final!r}, so it would see the register"
                )


def mend(graph: gs.Graph, axis: TokenAxis) -> list[str]:
    """Gives every baked token count that the analysis settled its new value; says which."""
    editor = Editor(graph)
    done: list[str] = []
    by_use: dict[tuple[int, int], tuple[gs.Node, int, dict[int, int]]] = {}
    for baked, value in axis.settled.items():
        if baked.node.inputs[baked.slot].values.flat[baked.index] != value:
            entry = by_use.setdefault((id(baked.node), baked.slot), (baked.node, baked.slot, {}))
            entry[2][baked.index] = value
    for node, slot, changes in by_use.values():
        # A constant of its own: other nodes may share the old one and mean another number.
        values = node.inputs[slot].values.copy()
        for index, value in changes.items():
            done.append(f"{node.name}: {values.flat[index]} -> {value}")
            values.flat[index] = value
        node.inputs[slot] = editor.constant(f"{node.name}.tokens", values)
    return done
