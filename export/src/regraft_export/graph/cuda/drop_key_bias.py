"""Rewrite: the bias of the keys of a MultiHeadAttention is dropped.

A key bias b adds q . b to every score of the query q: the same number to all keys, which softmax
does not see. Constant keys of the variant kv are then stored less the bias. Exact for plain
attention only: where anything stands between the linear product and the attention (rotary
embedding, a norm of the keys), the keys do not come from an Add of a bias, and nothing is dropped.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft_export.graph.cuda.fuse_attention import OP
from regraft_export.graph.cuda.join_constants import KEY, joined, without_bias
from regraft_export.graph.document import consumers, maker


def drop_key_bias(graph: gs.Graph) -> int:
    """Drops the biases; returns how many."""
    dropped = 0
    for node in [n for n in graph.nodes if n.op == OP]:
        if reads_once(node, KEY) and (found := unbiased(graph, node.inputs[KEY])) is not None:
            node.inputs[KEY] = found[0]
            dropped += 1
    return dropped


def unbiased(graph: gs.Graph, value: gs.Tensor) -> tuple[gs.Variable, NDArray[np.generic]] | None:
    """Keys or values without the bias of their product, and the bias; None where there is none."""
    constants = joined(value)
    found = biased_product(value if constants is None else constants.tokens)
    if found is None:
        return None
    product, bias = found[0], found[1].values
    if constants is not None:
        product = without_bias(graph, constants, product, bias)
    return product, bias


def biased_product(value: gs.Tensor) -> tuple[gs.Variable, gs.Constant] | None:
    """The MatMul's output and the bias (N,) whose sum a tensor is; None for anything else."""
    add = maker(value)
    if add is None or add.op != "Add":
        return None
    bias = next((t for t in add.inputs if isinstance(t, gs.Constant)), None)
    product = next((t for t in add.inputs if isinstance(t, gs.Variable)), None)
    if bias is None or product is None or bias.values.ndim != 1:
        return None
    made_by = maker(product)
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
