"""Rewrite: biases, Split, SiLU and product of a packed SwiGLU are one node of regraft's own.

ONNX Runtime has no kernel for them together, and passes over (B, T, 2 H) again and again: 13 passes
over (B, T, H) where three do::

    x -> Add bias -> Split -> gate, value;  gate * Sigmoid (gate) * value
    x -> BiasedSwiGlu (x, bias)
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.drop_key_bias import biased_product
from regraft_export.graph.cuda.redirect_operator import DOMAIN, operator
from regraft_export.graph.document import consumers


def gate_by_operator(graph: gs.Graph, tokens: int) -> int:
    """Rewrites every such MLP.

    Args:
        graph: changed in place.
        tokens: T + R.

    Returns:
        How many were rewritten.
    """
    done = 0
    for index, node in enumerate(graph.nodes):
        found = _packed(node) if node.op == "Mul" else None
        if found is None:
            continue
        product, bias = found
        name, outputs = f"regraft.cuda.{node.name}", list(node.outputs)
        # No inference knows the operator, and without shapes nothing behind it works in place.
        outputs[0].shape = ["batch", tokens, len(bias.values) // 2]
        outputs[0].dtype = product.dtype
        node.inputs, node.outputs = [], []
        graph.nodes[index] = gs.Node(
            operator("BiasedSwiGlu", product), name, {}, [product, bias], outputs, domain=DOMAIN
        )
        done += 1
    return done


def _packed(product: gs.Node) -> tuple[gs.Variable, gs.Constant] | None:
    """What the gated product's Split cuts, without its bias, and the bias."""
    for slot in (0, 1):
        gate = _gate(product.inputs[slot])
        value = product.inputs[1 - slot]
        if gate is None or not value.inputs or len(consumers(product.inputs[slot])) != 1:
            continue
        split = value.inputs[0]
        halves = split.outputs if split.op == "Split" else []
        if len(halves) != 2 or halves[0] is not gate or halves[1] is not value:
            continue
        alone = len(consumers(gate)) == 2 and len(consumers(value)) == 1
        found = biased_product(split.inputs[0])
        if not alone or found is None or len(consumers(split.inputs[0])) != 1:
            continue
        wide, bias = found
        length = bias.values.shape[-1]
        sizes = split.inputs[1] if len(split.inputs) > 1 else None
        even = sizes is None or (
            isinstance(sizes, gs.Constant) and sizes.values.tolist() == [length // 2] * 2
        )
        if even and split.attrs.get("axis", 0) in (2, -1) and length % 16 == 0:
            return wide, bias
    return None


def _gate(value: gs.Tensor) -> gs.Variable | None:
    """``x`` of ``x * Sigmoid (x)``."""
    node = value.inputs[0] if value.inputs else None
    if node is None or node.op != "Mul":
        return None
    for slot in (0, 1):
        x, other = node.inputs[slot], node.inputs[1 - slot]
        sigmoid = other.inputs[0] if other.inputs else None
        if sigmoid is not None and sigmoid.op == "Sigmoid" and sigmoid.inputs[0] is x:
            single = len(consumers(other)) == 1 and isinstance(x, gs.Variable)
            return x if single else None
    return None
