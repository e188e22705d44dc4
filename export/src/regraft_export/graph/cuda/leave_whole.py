"""Rewrite: the registers are not cut off on the card but by the copy back.

A cut is a pass over (B, T, D), two nodes and a Cast (22 microseconds for a ViT-B/16 at batch 64 on
an H100, and 1.2 % of the time at batch 1); copying part of every image costs what copying all does.
::

    x -> Slice tokens    -> Cast -> last_hidden_state
    x -> Slice registers -> Cast -> test_time_registers

becomes::

    x -> Cast -> regraft.whole           and the parts' names in the graph's metadata

What pools one token of the cut reads it from the whole; what pools all of them keeps its Slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from regraft.engines.parts import Part
from regraft_export.graph.document import Editor, consumers, dtype_of

WHOLE = "regraft.whole"


def leave_whole(graph: gs.Graph, tokens: int) -> dict[str, Part]:
    """Rewrites every output that is a cut.

    Args:
        graph: changed in place; its outputs are float32.
        tokens: T + R.

    Returns:
        Output name -> part, in the order of the outputs.
    """
    editor, parts = Editor(graph), dict[str, Part]()
    wholes: dict[int, gs.Variable] = {}
    outputs: list[gs.Variable] = []
    for output in graph.outputs:
        found = _cut(output)
        if found is None:
            outputs.append(output)
            continue
        cut, start, stop = found
        full = cut.inputs[0]
        if id(full) not in wholes:
            wholes[id(full)] = _leave(editor, full, ["batch", tokens, *output.shape[2:]])
            outputs.append(wholes[id(full)])
        parts[output.name] = Part(wholes[id(full)].name, start, stop)
        _read_single_tokens_from(full, cut, stop - start)
    graph.outputs = outputs
    return parts


def _cut(output: gs.Variable) -> tuple[gs.Node, int, int] | None:
    """The Slice over tokens behind an output, and its bounds."""
    node = output.inputs[0] if output.inputs else None
    if node is not None and node.op == "Cast":
        node = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if node is None or node.op != "Slice" or not node.name.startswith("regraft.cut."):
        return None
    bounds = [t.values.tolist() for t in node.inputs[1:] if isinstance(t, gs.Constant)]
    if len(bounds) != 3 or bounds[2] != [1]:
        return None
    return node, int(bounds[0][0]), int(bounds[1][0])


def _leave(editor: Editor, full: gs.Variable, shape: list[int | str]) -> gs.Variable:
    if dtype_of(full) == np.float32:
        whole = full
    else:
        whole = editor.node("Cast", WHOLE, [full], {"to": 1}, dtype=np.float32)
    whole.name = editor.names.new(WHOLE)
    whole.dtype, whole.shape = np.dtype(np.float32), shape
    return whole


def _read_single_tokens_from(full: gs.Variable, cut: gs.Node, tokens: int) -> None:
    for node in consumers(cut.outputs[0]):
        if (
            node.op != "Gather"
            or node.attrs.get("axis", 0) != 1
            or cut.outputs[0] is node.inputs[1]
        ):
            continue
        if _below(node.inputs[1:], tokens):
            node.inputs[0] = full


def _below(indices: Sequence[gs.Tensor], tokens: int) -> bool:
    """Whether these are constants that count from the front."""
    return all(
        isinstance(t, gs.Constant) and bool(((t.values >= 0) & (t.values < tokens)).all())
        for t in indices
    )
