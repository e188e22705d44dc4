"""Rewrite: the bias of the keys of a MultiHeadAttention is dropped.

A key bias b adds q . b to every score of the query q: the same number to all keys, which softmax
does not see. Exact for plain attention only. Where anything stands between the linear product and
the attention (rotary embedding, a norm of the keys), the keys do not come from an Add of a bias,
and nothing is dropped.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.fuse_attention import OP
from regraft_export.graph.document import consumers

KEY = 1


def drop_key_bias(graph: gs.Graph) -> int:
    """Drops the biases; returns how many."""
    dropped = 0
    for node in (n for n in graph.nodes if n.op == OP):
        if (found := biased_product(node.inputs[KEY])) is not None and reads_once(node, KEY):
            node.inputs[KEY] = found[0]
            dropped += 1
    return dropped


def biased_product(value: gs.Tensor) -> tuple[gs.Variable, gs.Constant] | None:
    """The MatMul's output and the bias (N,) whose sum a tensor is; None for anything else."""
    add = value.inputs[0] if value.inputs else None
    if add is None or add.op != "Add":
        return None
    bias = next((t for t in add.inputs if isinstance(t, gs.Constant)), None)
    product = next((t for t in add.inputs if isinstance(t, gs.Variable)), None)
    if bias is None or product is None or bias.values.ndim != 1:
        return None
    made_by = product.inputs[0] if product.inputs else None
    if made_by is None or made_by.op != "MatMul":
        return None
    if not isinstance(made_by.inputs[1], gs.Constant):
        return None
    return product, bias


def reads_once(node: gs.Node, slot: int) -> bool:
    """Whether a tensor enters a node in this slot and no other."""
    return sum(t is node.inputs[slot] for t in node.inputs) == 1 and bool(
        consumers(node.inputs[slot])
    )
