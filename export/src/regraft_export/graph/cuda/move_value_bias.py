"""Rewrite: the bias of the values of a MultiHeadAttention moves behind the output projection.

Attention weights sum to 1, so a value bias b comes out of the attention as it went in, and
``(a + b) W + c = a W + (c + b W)``: one bias instead of two. Constant values of the variant kv are
stored less the bias then.

Exact only where the attention's output goes straight into the projection's MatMul and nowhere
else. A norm before the projection, a second reader, or values that are more than a linear product
leave the bias where it is.

Before::  MatMul Wv -> Add b -> attention -> MatMul W -> Add c
After::   MatMul Wv ----------> attention -> MatMul W -> Add (c + b W)
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.drop_key_bias import reads_once, unbiased
from regraft_export.graph.cuda.fuse_attention import OP
from regraft_export.graph.cuda.join_constants import VALUE
from regraft_export.graph.document import Editor, consumers


def move_value_bias(graph: gs.Graph) -> int:
    """Moves the biases; returns how many."""
    moved = 0
    for node in [n for n in graph.nodes if n.op == OP]:
        projection = _projection(node.outputs[0], graph)
        if projection is None or not reads_once(node, VALUE):
            continue
        found = unbiased(graph, node.inputs[VALUE])
        if found is None:
            continue
        node.inputs[VALUE], bias = found
        weight = np.asarray(projection.inputs[1].values, np.float64)
        _add(graph, projection, np.asarray(bias, np.float64) @ weight)
        moved += 1
    return moved


def _projection(attended: gs.Variable, graph: gs.Graph) -> gs.Node | None:
    """The one MatMul by a constant matrix that reads the attention's output."""
    readers = consumers(attended)
    if len(readers) != 1 or any(attended is t for t in graph.outputs):
        return None
    node = readers[0]
    plain = node.op == "MatMul" and node.inputs[0] is attended
    weighted = plain and isinstance(node.inputs[1], gs.Constant)
    return node if weighted and node.inputs[1].values.ndim == 2 else None


def _add(graph: gs.Graph, projection: gs.Node, more: np.ndarray) -> None:
    """Adds to the projection's bias, or gives it one."""
    editor, stem = Editor(graph), f"{projection.name}.bias"
    dtype = projection.inputs[1].values.dtype
    product = projection.outputs[0]
    readers = consumers(product)
    add = readers[0] if len(readers) == 1 and readers[0].op == "Add" else None
    old = None if add is None else next((t for t in add.inputs if isinstance(t, gs.Constant)), None)
    if add is not None and old is not None and old.values.shape == more.shape:
        total = np.asarray(old.values, np.float64) + more
        constant = editor.constant(stem, total.astype(dtype))
        add.inputs = [constant if t is old else t for t in add.inputs]
        return
    alone = gs.Variable(editor.names.new(f"{stem}.without"), dtype=product.dtype)
    projection.outputs = [alone]
    editor.node("Add", f"{stem}.add", [alone, editor.constant(stem, more.astype(dtype))])
    editor.added[-1].outputs = [product]
