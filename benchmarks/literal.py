"""The paper's Algorithm 2 translated to ONNX word for word: the folded form's competitor.

The whole activation h (B, T + 1, hidden) is sliced into tokens and register, masked, and
concatenated again, as a reader of arXiv 2506.08010 would write it.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from regraft.neurons import Neurons
from regraft.tokens import TokenLayout
from regraft_export.graph import anchors as places
from regraft_export.graph.anchors import DownProjection
from regraft_export.graph.append_register import append_register
from regraft_export.graph.document import Editor, read, tensor, write
from regraft_export.graph.patch import LAST, POOLED, Traced
from regraft_export.graph.remove_register import remove_register, set_outputs


def literal_graph(traced: Traced, neurons: Neurons) -> onnx.ModelProto:
    """The patched model, default options, in the literal form."""
    graph = read(traced.proto)
    layout = traced.layout
    downs = {
        layer: places.down_projection(
            places.block_span(graph, traced.anchors, layer), traced.down[layer], layer
        )
        for layer in neurons.layers
    }
    pooled = next((t for t in graph.outputs if t.name == POOLED), None)
    final = tensor(graph, traced.anchors.final)
    append_register(graph, traced.anchors, (layout.count, layout.width), 1)
    for layer, down in downs.items():
        _redirect(Editor(graph), down, [n.index for n in neurons.of(layer)], layout)
    cut, _ = remove_register(graph, final.name, [], layout.count, 1)
    outputs: dict[str, tuple[gs.Variable, tuple[int | str, ...]]] = {
        LAST: (cut[final.name], ("batch", layout.count, layout.width))
    }
    if pooled is not None:
        outputs[POOLED] = (pooled, ("batch", *(traced.pooled or ())))
    set_outputs(graph, outputs)
    return write(graph, shapes_changed=True)


def _redirect(
    editor: Editor, down: DownProjection, indices: list[int], layout: TokenLayout
) -> None:
    h, hidden = down.activation, down.weight.shape[0]
    dtype = down.weight.dtype
    mask = np.ones(hidden, dtype)
    mask[indices] = 0
    place = np.zeros((len(indices), hidden), dtype)
    place[range(len(indices)), indices] = 1
    columns = editor.constant("literal.indices", np.array(indices, dtype=np.int64))
    gathered = editor.node("Gather", "literal.columns", [h, columns], {"axis": 2})
    axis = editor.constant("literal.axis", np.array([1], dtype=np.int64))
    value = editor.node("ReduceMax", "literal.max", [gathered, axis], {"keepdims": 1})
    masked = editor.node("Mul", "literal.mask", [h, editor.constant("literal.keep", mask)])
    tokens = _rows(editor, masked, 0, layout.count)
    register = _rows(editor, masked, layout.count, layout.count + 1)
    spread = editor.node("MatMul", "literal.spread", [value, editor.constant("literal.to", place)])
    filled = editor.node("Add", "literal.fill", [register, spread])
    down.matmul.inputs[0] = editor.node("Concat", "literal.join", [tokens, filled], {"axis": 1})


def _rows(editor: Editor, value: gs.Variable, start: int, end: int) -> gs.Variable:
    bounds = [
        editor.constant("literal.bound", np.array([n], dtype=np.int64)) for n in (start, end, 1)
    ]
    return editor.node("Slice", "literal.rows", [value, *bounds])
