"""Where a block's attention reads its keys and values.

An attention is MatMul, Softmax, MatMul, with scaling before, between and behind, or one
``Attention`` node (opset 23 on). The places are found from the Softmax or that node, never by a
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from regraft.errors import RewriteError
from regraft.tokens import TokenLayout
from regraft_export.graph.document import ancestors, consumers

# These look at each number by itself or move it about, and keep every key apart from the others.
_ELEMENTWISE = ("Mul", "Div", "Cast", "Identity", "Reshape")
_ATTENTIONS = ("Softmax", "Attention", "MultiHeadAttention")


@dataclass(frozen=True)
class AttentionSite:
    """Where one block's attention reads its keys and values.

    Attributes:
        layer: the block.
        keys: (B, heads, T, head size), or (B, T, heads * head size) for an ``Attention`` node.
        values: likewise; its head size may be another.
        nodes: the attention from there on, the product with the values included. Whoever else
            reads keys and values is none of them.
        result: what the attention gives.
    """

    layer: int
    keys: gs.Variable
    values: gs.Variable
    nodes: Sequence[gs.Node]
    result: gs.Variable


def attention_site(span: Sequence[gs.Node], layout: TokenLayout, layer: int) -> AttentionSite:
    """Finds a block's attention.

    Args:
        span: the block's nodes.
        layout: of the unpatched model.
        layer: the block.

    Raises:
        RewriteError: there is none of the forms above, or more than one.
    """
    found = [node for node in span if node.op in _ATTENTIONS]
    if len(found) != 1:
        raise RewriteError(
            f"layer {layer}: {len(found)} Softmax or Attention nodes in the block; expected "
            "exactly one, its attention's"
        )
    site = _decomposed if found[0].op == "Softmax" else _one_node
    keys, values, product = site(found[0], layout, layer)
    if keys is values:
        raise RewriteError(f"layer {layer}: keys and values are one tensor, {keys.name!r}")
    inside = {id(node) for node in span}
    behind = ancestors(product.outputs[0], stop=[keys, values])
    nodes = [node for node in behind if id(node) in inside]
    return AttentionSite(layer, keys, values, nodes, product.outputs[0])


_Place = tuple[gs.Variable, gs.Variable, gs.Node]


def _one_node(node: gs.Node, layout: TokenLayout, layer: int) -> _Place:
    more = [t.name for t in node.inputs[3:] if t.name]
    ranks = [None if t.shape is None else len(t.shape) for t in node.inputs[1:3]]
    if node.op != "Attention" or node.domain not in (None, "", "ai.onnx"):
        reason = f"of the domain {node.domain!r}, fused already: rewrite before fusing"
    elif more:
        reason = f"with more inputs than query, key and value ({', '.join(more)})"
    elif node.attrs.get("is_causal", 0):
        reason = "that is causal"
    elif len(ranks) != 2 or any(rank not in (3, 4) for rank in ranks):
        reason = "whose keys or values have no declared shape of three or four dimensions"
    else:
        return node.inputs[1], node.inputs[2], node
    raise RewriteError(
        f"layer {layer}: node {node.name!r} ({node.op}) is an attention {reason}; no constant "
        "key can be added to it"
    )


def _decomposed(softmax: gs.Node, layout: TokenLayout, layer: int) -> _Place:
    scores = softmax.inputs[0]
    while scores.inputs and scores.inputs[0].op != "MatMul":
        scores = _behind(scores.inputs[0], layer, "the scores")
    product, weighted = softmax.outputs[0], softmax
    while weighted.op != "MatMul":
        readers = consumers(product)
        if len(readers) != 1 or readers[0].op not in (*_ELEMENTWISE, "MatMul"):
            names = ", ".join(f"{n.name!r} ({n.op})" for n in readers) or "nothing"
            raise RewriteError(
                f"layer {layer}: the attention {product.name!r} is read by {names}; expected its "
                "product with the values alone"
            )
        weighted, read, product = readers[0], product, readers[0].outputs[0]
    if not scores.inputs or weighted.inputs[0] is not read:
        raise RewriteError(
            f"layer {layer}: the Softmax {softmax.name!r} does not stand between two products; "
            "expected an attention's"
        )
    keys = _heads_apart(scores.inputs[0].inputs[1], -1, layout, layer, "keys")
    values = _heads_apart(weighted.inputs[1], -2, layout, layer, "values")
    return keys, values, weighted


def _behind(node: gs.Node, layer: int, what: str) -> gs.Variable:
    """The one varying input of a node that keeps keys apart."""
    varying = [t for t in node.inputs if isinstance(t, gs.Variable)]
    data = varying[:1] if node.op == "Reshape" else varying
    if node.op not in (*_ELEMENTWISE, "Add", "Transpose") or len(data) != 1:
        raise RewriteError(
            f"layer {layer}: node {node.name!r} ({node.op}) makes {what} of the attention from "
            "more than the tokens (a mask?); expected scaling alone, so no constant key can be "
            "added"
        )
    return data[0]


def _heads_apart(
    operand: gs.Tensor, axis: int, layout: TokenLayout, layer: int, what: str
) -> gs.Variable:
    """The tensor (B, heads, T, head size) behind an operand whose tokens lie along ``axis``."""
    value = operand
    while not (axis == -2 and _is_heads_apart(value, layout)):
        if not value.inputs or value.inputs[0].op not in (*_ELEMENTWISE, "Transpose"):
            raise RewriteError(
                f"layer {layer}: the {what} behind {operand.name!r} are nowhere laid out as "
                f"(batch, {layout.heads} heads, {layout.count} tokens, head size); no constant "
                "can be added to them"
            )
        node = value.inputs[0]
        if node.op == "Transpose":
            order = list(node.attrs["perm"])
            axis = order[axis] - len(order)
        value = _behind(node, layer, f"the {what}")
    return value


def _is_heads_apart(value: gs.Tensor, layout: TokenLayout) -> bool:
    shape = value.shape
    return (
        shape is not None
        and len(shape) == 4
        and tuple(shape[1:3]) == (layout.heads, layout.count)
        and isinstance(shape[3], int)
    )
