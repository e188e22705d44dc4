"""Rewrite: the registers are cut off before anything pools or leaves the graph.

1. ``final`` (B, T + R, D) is sliced to its first T tokens; whatever read it reads the slice.
2. Every other requested block output is sliced the same way.
3. The registers themselves become the output ``test_time_registers``, where asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from regraft_export.graph.document import Editor, replace_uses, tensor

REGISTERS = "test_time_registers"


def remove_register(
    graph: gs.Graph, final: str, hidden: Sequence[str], tokens: int, registers: int
) -> tuple[dict[str, gs.Variable], gs.Variable]:
    """Cuts the registers off.

    Args:
        graph: the graph with registers appended; changed in place.
        final: name of the tensor that becomes ``last_hidden_state``.
        hidden: names of block outputs that leave the graph.
        tokens: T.
        registers: R.

    Returns:
        The tensors without registers by the name of the tensor they were cut from, and the
        registers (B, R, D).
    """
    editor = Editor(graph)
    full = tensor(graph, final)
    cut = _tokens(editor, full, "final", 0, tokens)
    last = _tokens(editor, full, REGISTERS, tokens, tokens + registers)
    replace_uses(graph, full, cut, keep=editor.added)
    without: dict[str, gs.Variable] = {final: cut}
    for name in hidden:
        if name not in without:
            without[name] = _tokens(editor, tensor(graph, name), name, 0, tokens)
    return without, last


def _tokens(editor: Editor, value: gs.Variable, stem: str, start: int, end: int) -> gs.Variable:
    bounds = [
        editor.constant(f"regraft.cut.{stem}.{what}", np.array([n], dtype=np.int64))
        for what, n in (("start", start), ("end", end), ("axis", 1))
    ]
    return editor.node("Slice", f"regraft.cut.{stem}", [value, *bounds])


def set_outputs(
    graph: gs.Graph, outputs: Mapping[str, tuple[gs.Variable, Sequence[object]]]
) -> None:
    """Makes tensors the graph's outputs, float32, under given names and shapes.

    Args:
        graph: changed in place.
        outputs: output name -> (tensor, declared shape).
    """
    editor = Editor(graph)
    results: list[gs.Variable] = []
    for name, (value, shape) in outputs.items():
        # A file may not record a tensor's type; a Cast to what it is already costs nothing.
        needs_cast = value.dtype != np.float32
        if needs_cast or any(value is t for t in results) or not value.inputs:
            attrs = {"to": 1} if needs_cast else {}
            value = editor.node(
                "Cast" if needs_cast else "Identity", f"regraft.output.{name}", [value], attrs
            )
        # The tensor that has the name so far may be the very one that was just cast.
        existing = graph.tensors().get(name)
        if existing is not None and existing is not value:
            existing.name = editor.names.new(f"{name}.inner")
        value.name, value.dtype, value.shape = name, np.dtype(np.float32), list(shape)
        results.append(value)
    graph.outputs = results
