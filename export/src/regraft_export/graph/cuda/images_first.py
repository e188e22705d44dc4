"""Rewrite: products with tokens before images become products with images before tokens.

``torch.nn.MultiheadAttention`` exchanges the two axes on its way in and out, as open_clip's models
are written. A product with a matrix does not care which comes first:

1. ``x -> Transpose -> MatMul W -> Add b`` becomes ``x -> MatMul W -> Add b -> Transpose``.
2. ``Transpose -> Reshape (T * B, D) -> Gemm -> Reshape (T, B, D) -> Transpose`` becomes
   ``Transpose -> Reshape (B, T, D) -> MatMul -> Add``.

Then attention has the form that :mod:`regraft_export.graph.cuda.attention_form` reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.tokens import TokenLayout
from regraft_export.graph.cuda.attention_form import linear_at
from regraft_export.graph.cuda.layout import BATCH, chain_to, indices_of
from regraft_export.graph.document import Editor, consumers, maker

_EXCHANGE = [1, 0, 2]


def images_first(graph: gs.Graph, layout: TokenLayout) -> int:
    """Rewrites every such product.

    Args:
        graph: an unpatched trace, changed in place.
        layout: of its tokens.

    Returns:
        How many there were.
    """
    graph.toposort()
    exchanges = [n for n in graph.nodes if n.op == "Transpose" and n.attrs["perm"] == _EXCHANGE]
    done = 0
    for node in exchanges:
        done += _leave(graph, node, layout) or _enter(graph, node)
    graph.cleanup().toposort()
    return done


def _enter(graph: gs.Graph, exchange: gs.Node) -> int:
    """The products that read exchanged axes: the exchange comes after them."""
    source, done = exchange.inputs[0], 0
    leaving = {id(t) for t in graph.outputs}
    for product in consumers(exchange.outputs[0]):
        weight = product.inputs[1] if product.op == "MatMul" else None
        if not isinstance(weight, gs.Constant) or weight.values.ndim != 2 or source.shape is None:
            continue
        made = [product.outputs[0]]
        readers = consumers(made[0])
        if len(readers) == 1 and readers[0].op == "Add" and _vector(readers[0]) is not None:
            made.append(readers[0].outputs[0])
        if any(id(t) in leaving for t in made):
            continue
        product.inputs[0] = source
        for value in made:
            value.shape = (*source.shape[:2], weight.values.shape[1])
        end = made[-1]
        editor, others = Editor(graph), consumers(end)
        moved = editor.node("Transpose", f"{product.name}.exchange", [end], {"perm": _EXCHANGE})
        for reader in others:
            reader.inputs = [moved if t is end else t for t in reader.inputs]
        done += 1
    return done


@dataclass(frozen=True)
class _Product:
    """``rows @ weight + bias``."""

    rows: gs.Variable
    weight: NDArray[np.generic]
    bias: NDArray[np.generic] | None


def _leave(graph: gs.Graph, exchange: gs.Node, layout: TokenLayout) -> int:
    """A product of rows (T * B, D), before an exchange brings the images first again."""
    after = chain_to(exchange.inputs[0])
    product = _product_at(after.source) if after.scale == 1.0 else None
    if product is None:
        return 0
    heads, tokens = layout.heads, layout.count
    inner, outer = product.weight.shape
    before = chain_to(product.rows)
    split = (BATCH, heads, tokens, inner // heads)
    rows = indices_of(graph, before.source, product.rows, split)
    back = indices_of(graph, after.source, exchange.outputs[0], (tokens * BATCH, outer))
    wanted = _positions(split).transpose(2, 0, 1, 3).reshape(tokens * BATCH, inner)
    exchanged = _positions((tokens, BATCH, outer)).transpose(1, 0, 2)
    if before.scale != 1.0 or not _same(rows, wanted) or not _same(back, exchanged):
        return 0
    editor, stem = Editor(graph), str(exchange.name)
    moved = editor.node("Transpose", f"{stem}.heads", [before.source], {"perm": [0, 2, 1, 3]})
    shape = editor.constant(f"{stem}.shape", np.array([0, 0, inner], np.int64))
    merged = editor.node("Reshape", f"{stem}.merge", [moved, shape])
    weight = editor.constant(f"{stem}.weight", product.weight)
    result = editor.node("MatMul", f"{stem}.product", [merged, weight])
    if product.bias is not None:
        bias = editor.constant(f"{stem}.bias", product.bias)
        editor.node("Add", f"{stem}.add", [result, bias])
    # The tensor stays the same one, for whoever knows it by name.
    (out,) = exchange.outputs
    exchange.outputs.clear()
    editor.added[-1].outputs = [out]
    return 1


def _product_at(value: gs.Variable) -> _Product | None:
    """The product that a tensor is, by Gemm, or by MatMul with or without Add."""
    node = maker(value)
    if node is None:
        return None
    if node.op == "Gemm":
        attrs = {"alpha": 1.0, "beta": 1.0, "transA": 0, **node.attrs}
        plain = (attrs["alpha"], attrs["beta"], attrs["transA"]) == (1.0, 1.0, 0)
        if not plain or not all(isinstance(t, gs.Constant) for t in node.inputs[1:]):
            return None
        weight, *rest = (t.values for t in node.inputs[1:])
        weight = np.ascontiguousarray(weight.T) if node.attrs.get("transB") else weight
        bias = rest[0] if rest else None
        if bias is not None and bias.shape != weight.shape[1:]:
            return None
        return _Product(node.inputs[0], weight, bias)
    product, added = linear_at(value)
    if product is None:
        return None
    bias = None if added is None else added.values
    return _Product(product.inputs[0], product.inputs[1].values, bias)


def _vector(add: gs.Node) -> NDArray[np.generic] | None:
    """The bias (N,) that an Add adds to its other input, a variable; None for any other Add."""
    found = [t.values for t in add.inputs if isinstance(t, gs.Constant)]
    return found[0] if len(found) == 1 and found[0].ndim == 1 else None


def _positions(shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)


def _same(found: NDArray[np.int64] | None, wanted: NDArray[np.int64]) -> bool:
    return found is not None and np.array_equal(found, wanted)
