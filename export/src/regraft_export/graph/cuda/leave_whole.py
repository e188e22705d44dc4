"""Rewrite: the registers are not cut off on the card but by the copy back.

A cut is a pass over (B, T, D), two nodes and a Cast (22 microseconds for a ViT-B/16 at batch 64 on
an H100, and 1.2 % of the time at batch 1); copying part of every image costs what copying all does.
::

    x -> Slice tokens    -> Cast -> last_hidden_state
    x -> Slice registers -> Cast -> test_time_registers

becomes::

    x -> Cast -> regraft.whole           and the parts' names in the graph's metadata

What pools one token of the cut reads it from the whole, where it stands later by as many tokens as
the cut leaves out before it; what pools all of them keeps its Slice.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from regraft.engines.parts import Part
from regraft_export.graph.document import Editor, consumers, dtype_of, maker

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
        found = _cut(output, tokens)
        if found is None:
            outputs.append(output)
            continue
        cut, start, stop = found
        full = cut.inputs[0]
        if id(full) not in wholes:
            wholes[id(full)] = _leave(editor, full, ["batch", tokens, *output.shape[2:]])
            outputs.append(wholes[id(full)])
        parts[output.name] = Part(wholes[id(full)].name, start, stop)
        _read_single_tokens_from(editor, full, cut, (start, stop))
    graph.outputs = outputs
    return parts


def _cut(output: gs.Variable, tokens: int) -> tuple[gs.Node, int, int] | None:
    """The Slice over tokens behind an output, and its bounds."""
    node = maker(output)
    if node is not None and node.op == "Cast":
        node = maker(node.inputs[0])
    if node is None or node.op != "Slice" or not node.name.startswith("regraft.cut."):
        return None
    bounds = [t.values.tolist() for t in node.inputs[1:] if isinstance(t, gs.Constant)]
    if len(bounds) != 3 or bounds[2] != [1]:
        return None
    start, stop = int(bounds[0][0]), int(bounds[1][0])
    # Counted from the end, or to whatever the end is: the runtime wants numbers.
    return (node, start, stop) if 0 <= start < stop <= tokens else None


def _leave(editor: Editor, full: gs.Variable, shape: list[int | str]) -> gs.Variable:
    if dtype_of(full) == np.float32:
        whole = full
    else:
        whole = editor.node("Cast", WHOLE, [full], {"to": 1}, dtype=np.float32)
    whole.name = editor.names.new(WHOLE)
    whole.dtype, whole.shape = np.dtype(np.float32), shape
    return whole


def _read_single_tokens_from(
    editor: Editor, full: gs.Variable, cut: gs.Node, bounds: tuple[int, int]
) -> None:
    start, stop = bounds
    for node in consumers(cut.outputs[0]):
        if (
            node.op != "Gather"
            or node.attrs.get("axis", 0) != 1
            or cut.outputs[0] is node.inputs[1]
        ):
            continue
        index = node.inputs[1]
        if isinstance(index, gs.Constant) and _below(index, stop - start):
            node.inputs[0] = full
            if start:
                # Not by the editor, which makes a vector of a single number.
                later = np.asarray(index.values + start, index.values.dtype)
                node.inputs[1] = gs.Constant(editor.names.new(f"{WHOLE}.token"), later)


def _below(index: gs.Constant, tokens: int) -> bool:
    """Whether it counts from the front."""
    return bool(((index.values >= 0) & (index.values < tokens)).all())
