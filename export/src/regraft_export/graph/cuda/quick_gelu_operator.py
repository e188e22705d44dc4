"""Rewrite: a bias and CLIP's GELU, ``x * sigmoid(1.702 x)``, are a node of regraft's own.

ONNX Runtime passes over (B, T, H) for the bias and again for what follows::

    x -> MatMul -> Add bias -> h;  h -> Mul 1.702 -> Sigmoid;  h * . -> y
    x -> MatMul -> BiasedQuickGelu (., bias)                        -> y

Sources: ``regraft/engines/ort_cuda/operators`` of the runtime.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.drop_key_bias import biased_product
from regraft_export.graph.cuda.inferred_shapes import Shapes
from regraft_export.graph.cuda.product_operator import fits, put, tokens_of
from regraft_export.graph.document import consumers, maker

_FACTOR = 1.702


def quick_gelus_by_operator(graph: gs.Graph, shapes: Shapes) -> int:
    """Rewrites every such MLP; as :func:`~.product_operator.products_by_operator`."""
    done = 0
    for node in [n for n in graph.nodes if n.op == "Mul" and not n.domain]:
        h = _opened(node)
        found = biased_product(h) if h is not None else None
        if h is None or found is None or any(h is t for t in graph.outputs):
            continue
        product, bias = found
        tokens = tokens_of(h, shapes) or tokens_of(node.outputs[0], shapes)
        if tokens is None or not fits(bias, 1) or len(consumers(product)) != 1:
            continue
        shape = ["batch", tokens, len(bias.values)]
        put(graph, node, "BiasedQuickGelu", [product, bias], node.outputs[0], shape)
        done += 1
    return done


def _opened(node: gs.Node) -> gs.Variable | None:
    """h of ``h * sigmoid(1.702 h)``, if nobody else reads it."""
    for h, other in (node.inputs, node.inputs[::-1]):
        sigmoid = _maker(other, "Sigmoid")
        inner = _maker(sigmoid.inputs[0], "Mul") if sigmoid is not None else None
        if sigmoid is None or inner is None or not isinstance(h, gs.Variable):
            continue
        factors = [t for t in inner.inputs if t is not h]
        readers = {id(n) for n in consumers(h)}
        if len(factors) == 1 and _is_factor(factors[0]) and readers == {id(node), id(inner)}:
            return h
    return None


def _maker(value: gs.Tensor, op: str) -> gs.Node | None:
    node = maker(value)
    return node if node is not None and node.op == op and len(consumers(value)) == 1 else None


def _is_factor(value: gs.Tensor) -> bool:
    """1.702 as the constant's dtype rounds it: 1.7 is another function."""
    if not isinstance(value, gs.Constant) or value.values.size != 1:
        return False
    return bool(value.values.item() == np.asarray(_FACTOR).astype(value.values.dtype).item())
