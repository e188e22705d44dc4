"""Self-attention as exporters write it: found by its softmax, read by what its chains do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft_export.graph.cuda.inferred_shapes import Shapes
from regraft_export.graph.cuda.layout import (
    BATCH,
    Chain,
    chain_to,
    indices_of,
    moved_from,
    scalar_factor,
)
from regraft_export.graph.document import consumers, maker


@dataclass(frozen=True)
class Projection:
    """Where queries, keys or values come from.

    Attributes:
        heads: split into heads; ``order`` brings it to (B, T, H, d).
        order: a permutation.
        inputs: (B, T, D), where they are a linear product of it and nothing else; else None.
        weight: (D, H * d), its columns in the order of heads.
        bias: (H * d,) in the same order, or None.
        linear: (B, T, H * d) as the graph has it, if its columns are in that order: the product,
            or what a norm made of it.
    """

    heads: gs.Variable
    order: tuple[int, ...]
    inputs: gs.Variable | None = None
    weight: NDArray[np.generic] | None = None
    bias: NDArray[np.generic] | None = None
    linear: gs.Variable | None = None


@dataclass(frozen=True)
class Attention:
    """One self-attention.

    Attributes:
        softmax: its node.
        query: of (B, H, T, d).
        key: of (B, H, d, T).
        value: of (B, H, T, d).
        scale: of the scores.
        output: (B, T, H * d), heads merged again.
        heads: H.
    """

    softmax: gs.Node
    query: Projection
    key: Projection
    value: Projection
    scale: float
    output: gs.Variable
    heads: int


def attention_at(
    graph: gs.Graph, softmax: gs.Node, heads: int, tokens: int, shapes: Shapes
) -> Attention | str:
    """Reads the self-attention of a softmax.

    Args:
        graph: the graph.
        softmax: over the keys.
        heads: H.
        tokens: T, registers included.
        shapes: tensor name -> shape, as far as known.

    Returns:
        The attention, or why it is in a form that is not known.
    """
    scores, scale = softmax.inputs[0], 1.0
    while scores.inputs and (factor := scalar_factor(scores.inputs[0])) is not None:
        scores, scale = factor[0], scale * factor[1]
    product = maker(scores)
    if product is None or product.op != "MatMul":
        op = "an input" if product is None else product.op
        return f"its scores come from {op}, not from one MatMul (a mask, a bias or a cap?)"
    if softmax.attrs.get("axis", -1) not in (-1, 3):
        return f"its softmax runs over axis {softmax.attrs['axis']}; expected the last of four"
    probabilities = softmax.outputs[0]
    readers = [n for n in consumers(probabilities) if n.op == "MatMul"]
    if len(readers) != 1 or readers[0].inputs[0] is not probabilities:
        return f"{len(readers)} MatMul nodes read its probabilities; expected one, with the values"
    output = moved_from(readers[0].outputs[0])
    size = (heads, tokens)
    query, q_scale = _projection(graph, product.inputs[0], size, (0, 1, 2, 3), shapes)
    key, k_scale = _projection(graph, product.inputs[1], size, (0, 1, 3, 2), shapes)
    value, v_scale = _projection(graph, readers[0].inputs[1], size, (0, 1, 2, 3), shapes)
    if v_scale != 1.0:
        return f"its values are multiplied by {v_scale}; expected them as they are"
    width = _merged_width(graph, readers[0].outputs[0], output, heads, tokens, value)
    if width is None:
        return "its heads are not merged into (batch, tokens, heads * size) afterwards"
    return Attention(softmax, query, key, value, scale * q_scale * k_scale, output, heads)


def _projection(
    graph: gs.Graph,
    end: gs.Variable,
    size: tuple[int, int],
    order: tuple[int, ...],
    shapes: Shapes,
) -> tuple[Projection, float]:
    """Reads one side, and the scalar factors on its way; ``order`` brings it to (B, H, T, d)."""
    chain, (heads, tokens) = chain_to(end), size
    merge = tuple(order[i] for i in (0, 2, 1, 3))
    product, bias = linear_at(chain.source)
    if product is None:
        return _nonlinear(graph, chain, size, order, shapes) or (Projection(end, merge), 1.0)
    weight = product.inputs[1].values
    shape = (BATCH, tokens, weight.shape[1])
    found = indices_of(graph, chain.source, end, shape)
    columns = None if found is None else _columns(found, order, heads, shape)
    if columns is None:
        return Projection(end, merge), 1.0
    whole = np.array_equal(columns, np.arange(weight.shape[1]))
    projection = Projection(
        heads=end,
        order=merge,
        inputs=product.inputs[0],
        weight=weight if whole else np.ascontiguousarray(weight[:, columns]),
        bias=None if bias is None else bias.values.reshape(-1)[columns],
        linear=chain.source if whole else None,
    )
    return projection, chain.scale


def _nonlinear(
    graph: gs.Graph, chain: Chain, size: tuple[int, int], order: tuple[int, ...], shapes: Shapes
) -> tuple[Projection, float] | None:
    """A side that a norm or a rotation made, before it was moved about: in the form that it has."""
    _, *inner = shapes.get(chain.source.name) or [None]
    if chain.source is chain.end or not all(isinstance(n, int) and n > 0 for n in inner):
        return None
    shape = (BATCH, *(int(str(n)) for n in inner))
    found = indices_of(graph, chain.source, chain.end, shape)
    if found is None:
        return None
    heads, tokens = size
    merge = tuple(order[i] for i in (0, 2, 1, 3))
    if len(shape) == 3:
        columns = _columns(found, order, heads, shape)
        if columns is not None and np.array_equal(columns, np.arange(shape[2])):
            return Projection(chain.end, merge, linear=chain.source), chain.scale
    elif len(shape) == 4 and shape[:3] == (BATCH, heads, tokens):
        split = found.reshape(BATCH, heads, *found.shape[-2:]).transpose(order)
        if np.array_equal(split, np.arange(split.size).reshape(shape)):
            return Projection(chain.source, (0, 2, 1, 3)), chain.scale
    return None


def linear_at(value: gs.Tensor) -> tuple[gs.Node | None, gs.Constant | None]:
    """The MatMul by a constant matrix behind a value, and the bias (N,) that was added to it.

    None and None for anything else.
    """
    node = maker(value)
    bias = None
    if node is not None and node.op == "Add":
        bias = next((t for t in node.inputs if isinstance(t, gs.Constant)), None)
        inner = next((t for t in node.inputs if isinstance(t, gs.Variable)), None)
        if bias is None or inner is None or bias.values.ndim != 1 or not inner.inputs:
            return None, None
        node = inner.inputs[0]
    if node is None or node.op != "MatMul" or not isinstance(node.inputs[1], gs.Constant):
        return None, None
    weight = node.inputs[1].values
    fits = weight.ndim == 2 and (bias is None or bias.values.size == weight.shape[1])
    return (node, bias) if fits else (None, None)


def _columns(
    found: NDArray[np.int64], order: tuple[int, ...], heads: int, shape: tuple[int, ...]
) -> NDArray[np.int64] | None:
    """The columns of the product, head by head; None unless images and tokens stay in place."""
    batch, tokens, width = shape
    if found.ndim == 3 and found.shape[0] == batch * heads:
        found = found.reshape(batch, heads, *found.shape[1:])
    if found.ndim != 4:
        return None
    found = found.transpose(order)
    if found.shape[:3] != (batch, heads, tokens):
        return None
    columns = found[0, :, 0, :]
    rows = np.arange(batch * tokens).reshape(batch, 1, tokens, 1) * width
    return columns.reshape(-1) if np.array_equal(found, rows + columns[None, :, None, :]) else None


def _merged_width(
    graph: gs.Graph,
    product: gs.Variable,
    output: gs.Variable,
    heads: int,
    tokens: int,
    value: Projection,
) -> int | None:
    """H * d if ``output`` is (B, T, H * d) with heads side by side."""
    if value.weight is not None:
        size = int(value.weight.shape[1]) // heads
    elif product.shape is not None and isinstance(product.shape[-1], int):
        size = int(product.shape[-1])
    else:
        return None
    for shape in ((BATCH, heads, tokens, size), (BATCH * heads, tokens, size)):
        found = indices_of(graph, product, output, shape)
        expected = np.arange(BATCH * heads * tokens * size).reshape(BATCH, heads, tokens, size)
        merged = expected.transpose(0, 2, 1, 3).reshape(BATCH, tokens, heads * size)
        if found is not None and np.array_equal(found, merged):
            return heads * size
    return None
