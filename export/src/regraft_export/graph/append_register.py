"""Rewrite: the test-time registers enter the network as zero tokens, appended last.

1. ``tokens`` (B, T, D) is padded with R zero rows: one Pad node, which needs no batch size.
2. Every baked token count between the token entry and ``final`` becomes T + R; so does every one
   that is computed from something else than the tokens.
3. Tables of rotary positions get R rows that rotate nothing.

Before::  tokens -> block 0            After::  tokens -> Pad -> block 0
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from regraft.errors import RewriteError
from regraft_export.graph.anchors import Anchors
from regraft_export.graph.document import Editor, ancestors, consumers, replace_uses, tensor
from regraft_export.graph.rotary_tables import RotaryTable, bind_rotary_tables, table_dims
from regraft_export.graph.shape_values import Baked, elements_of
from regraft_export.graph.token_axis import TokenAxis


def append_register(
    graph: gs.Graph,
    anchors: Anchors,
    shape: tuple[int, int],
    registers: int,
    tables: Mapping[str, RotaryTable] | None = None,
) -> list[str]:
    """Appends the registers.

    Args:
        graph: a traced graph, changed in place.
        anchors: its places.
        shape: (T, D) of the tokens.
        registers: R.
        tables: of rotary positions, by name of the graph's input.

    Returns:
        The mended constants, as ``node: before -> after``.

    Raises:
        RewriteError: a token count cannot be decided, or tokens leave the network on a way other
            than through ``final``.
    """
    graph.toposort()
    tokens = tensor(graph, anchors.tokens)
    inside = _nodes_of_the_network(graph, anchors)
    axis = TokenAxis(tokens, shape, registers, dims=table_dims(graph, tables or {}, registers))
    for node in graph.nodes:
        if id(node) in inside:
            axis.visit(node)
    _refuse_leaks(graph, anchors, axis, inside)
    mended = mend(graph, axis)
    bind_rotary_tables(graph, tables or {}, registers)
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
    """Gives every token count that was found its new value; returns them in words."""
    editor = Editor(graph)
    done: list[str] = []
    for node, slot, changes in _by_use(
        (baked, value)
        for baked, value in axis.settled.items()
        if baked.node.inputs[baked.slot].values.flat[baked.index] != value
    ):
        # A constant of its own: other nodes may share the old one and mean another number.
        values = node.inputs[slot].values.copy()
        for index, value in changes.items():
            done.append(f"{node.name}: {values.flat[index]} -> {value}")
            values.flat[index] = value
        node.inputs[slot] = editor.constant(f"{node.name}.tokens", values)
    return done + _grow(editor, axis)


def _grow(editor: Editor, axis: TokenAxis) -> list[str]:
    """Adds R to token counts that the graph computes; one node for all who read the same."""
    done: list[str] = []
    sums: dict[tuple[int, bytes], gs.Variable] = {}
    for node, slot, changes in _by_use(axis.grown.items()):
        target = node.inputs[slot]
        elements = elements_of(axis.elements[id(target)])
        more = np.zeros(len(elements), dtype=np.int64)
        for index, count in changes.items():
            more[index] = count
            before = elements[index].before
            done.append(f"{node.name}: {before} -> {before + count}, computed")
        key = (id(target), more.tobytes())
        if key not in sums:
            added = editor.constant(f"{node.name}.registers", more)
            sums[key] = editor.node("Add", f"{node.name}.tokens", [target, added], dtype=np.int64)
        node.inputs[slot] = sums[key]
    return done


def _by_use(
    items: Iterable[tuple[Baked, int]],
) -> list[tuple[gs.Node, int, dict[int, int]]]:
    """(node, slot, {element: number}) of elements that one node reads of one input."""
    by_use: dict[tuple[int, int], tuple[gs.Node, int, dict[int, int]]] = {}
    for baked, number in items:
        entry = by_use.setdefault((id(baked.node), baked.slot), (baked.node, baked.slot, {}))
        entry[2][baked.index] = number
    return list(by_use.values())
