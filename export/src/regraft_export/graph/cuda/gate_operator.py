"""Rewrite: biases, SiLU and product of a SwiGLU are one node of regraft's own.

ONNX Runtime has no kernel for them together, and passes over (B, T, 2 H) again and again: 13 passes
over (B, T, H) where three do::

    x -> MatMul -> Add bias -> Split -> gate, value;  gate * Sigmoid (gate) * value
    x -> MatMul -> BiasedSwiGlu (., bias)

Where gate and value come from two products of the same x, their weights become one.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.drop_key_bias import biased_product
from regraft_export.graph.cuda.inferred_shapes import Shapes
from regraft_export.graph.cuda.redirect_operator import DOMAIN, operator
from regraft_export.graph.document import Editor, consumers, maker


def gate_by_operator(graph: gs.Graph, tokens: int, shapes: Shapes) -> int:
    """Rewrites every such MLP.

    Args:
        graph: changed in place.
        tokens: T + R.
        shapes: tensor name -> shape, as far as known.

    Returns:
        How many were rewritten.
    """
    done = 0
    for node in [n for n in graph.nodes if n.op == "Mul"]:
        halves = _halves(node)
        if halves is not None and len(shapes.get(halves[0].name, ())) != 3:
            continue  # the operator wants (B, T, 2 H)
        found = None if halves is None else (_packed(*halves) or _pack(graph, *halves))
        if found is None:
            continue
        product, bias = found
        name, outputs = f"regraft.cuda.{node.name}", list(node.outputs)
        # No inference knows the operator, and without shapes nothing behind it works in place.
        outputs[0].shape = ["batch", tokens, len(bias.values) // 2]
        outputs[0].dtype = outputs[0].dtype or bias.values.dtype
        node.inputs, node.outputs = [], []
        graph.nodes[graph.nodes.index(node)] = gs.Node(
            operator("BiasedSwiGlu", bias), name, {}, [product, bias], outputs, domain=DOMAIN
        )
        done += 1
    return done


def _halves(product: gs.Node) -> tuple[gs.Variable, gs.Variable] | None:
    """Gate and value of ``SiLU (gate) * value``, if nobody else reads them."""
    for slot in (0, 1):
        opened, value = product.inputs[slot], product.inputs[1 - slot]
        gate = _gate(opened)
        if gate is None or not isinstance(value, gs.Variable) or value is gate:
            continue
        readers = (len(consumers(t)) for t in (opened, gate, value))
        if tuple(readers) == (1, 2, 1):
            return gate, value
    return None


def _gate(value: gs.Tensor) -> gs.Variable | None:
    """``x`` of ``x * Sigmoid (x)``."""
    node = maker(value)
    if node is None or node.op != "Mul":
        return None
    for slot in (0, 1):
        x, other = node.inputs[slot], node.inputs[1 - slot]
        sigmoid = maker(other)
        if sigmoid is not None and sigmoid.op == "Sigmoid" and sigmoid.inputs[0] is x:
            single = len(consumers(other)) == 1 and isinstance(x, gs.Variable)
            return x if single else None
    return None


def _packed(gate: gs.Variable, value: gs.Variable) -> tuple[gs.Variable, gs.Constant] | None:
    """The product whose Split gives both halves, gate first, and its bias."""
    split = maker(gate)
    if split is None or split.op != "Split" or split.attrs.get("axis", 0) not in (2, -1):
        return None
    if len(split.outputs) != 2 or split.outputs[0] is not gate or split.outputs[1] is not value:
        return None
    found = biased_product(split.inputs[0])
    if found is None or len(consumers(split.inputs[0])) != 1:
        return None
    length = len(found[1].values)
    sizes = split.inputs[1] if len(split.inputs) > 1 else None
    even = sizes is None or (
        isinstance(sizes, gs.Constant) and sizes.values.tolist() == [length // 2] * 2
    )
    return found if even and length % 16 == 0 else None


def _pack(
    graph: gs.Graph, gate: gs.Variable, value: gs.Variable
) -> tuple[gs.Variable, gs.Constant] | None:
    """One product for two of the same tensor, and their biases in one."""
    first, second = biased_product(gate), biased_product(value)
    if first is None or second is None:
        return None
    if any(len(consumers(product)) != 1 for product, _ in (first, second)):
        return None
    a, b = first[0].inputs[0], second[0].inputs[0]
    weights, biases = (a.inputs[1].values, b.inputs[1].values), (first[1].values, second[1].values)
    same = a.inputs[0] is b.inputs[0] and weights[0].shape == weights[1].shape
    if not same or len(biases[0]) != len(biases[1]) or len(biases[0]) % 8:
        return None
    editor, stem = Editor(graph), f"regraft.cuda.{a.name}"
    weight = editor.constant(f"{stem}.weight", np.concatenate(weights, axis=1))
    bias = editor.constant(f"{stem}.bias", np.concatenate(biases))
    return editor.node("MatMul", stem, [a.inputs[0], weight], dtype=first[0].dtype), bias
