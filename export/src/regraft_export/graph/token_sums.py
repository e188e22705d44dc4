"""Rules of operators that sum along an axis: products, attention and reductions.

Attention alone may sum over tokens, written as one node or as products: there every token is to
see the register. A pooling must not, so a reduction over tokens is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from regraft_export.graph.dims import Dims, from_pairs

if TYPE_CHECKING:
    from regraft_export.graph.token_axis import Rule, TokenAxis


def _matmul(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    a, b = axis.need(node, 0), axis.need(node, 1)
    results: list[tuple[int, ...]] = []
    for left, right in ((a.before, b.before), (a.after, b.after)):
        if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
            raise axis.undecided(node, f"a product of {left} and {right}")
        results.append((*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1]))
    return [Dims(*results)]


def _gemm(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    a, b = axis.need(node, 0).pairs(), axis.need(node, 1).pairs()
    rows, inner = a[::-1] if node.attrs.get("transA", 0) else a
    across, columns = b[::-1] if node.attrs.get("transB", 0) else b
    if inner != across or inner[0] != inner[1]:  # a sum over tokens would count the register
        raise axis.undecided(node, f"a product over {inner} and {across}")
    if len(node.inputs) > 2 and node.inputs[2].name != "":
        bias = axis.need(node, 2).pairs()
        if len(bias) > 1 and rows[0] != rows[1] and bias[0] != (1, 1):
            raise axis.undecided(node, "a bias with one entry per token")
    return [from_pairs([rows, columns])]


def _attention(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    """Attention of opset 23 and later: (B, heads, T, d), or (B, T, heads * d)."""
    q, k, v = (axis.need(node, i).pairs() for i in range(3))
    rest = [i for i in range(3, len(node.inputs)) if node.inputs[i].name != ""]
    if node.attrs.get("is_causal", 0):
        raise axis.undecided(node, "a causal attention, in which no token sees the register,")
    if any(i != 3 for i in rest):
        raise axis.undecided(node, "an attention with a past or with lengths")
    rows = 2 if len(q) == 4 else 1
    if k[rows] != v[rows] or q[rows][0] != k[rows][0]:
        raise axis.undecided(node, f"an attention of {q[rows]} queries to {k[rows]} keys")
    heads = q[1] if len(q) == 4 else (int(node.attrs["q_num_heads"]),) * 2
    scores = [q[0], heads, q[rows], k[rows]]
    if rest:
        mask = axis.need(node, 3).pairs()
        if any(m not in ((1, 1), s) for m, s in zip(mask[::-1], scores[::-1], strict=False)):
            raise axis.undecided(node, "an attention mask with one entry per token")
    if len(q) == 4:
        out = [q[0], q[1], q[2], v[3]]
    else:
        size = v[2][0] // int(node.attrs["kv_num_heads"]) * heads[0]
        out = [q[0], q[1], (size, size)]
    grown = [k[0], k[1], k[2], k[3]] if len(k) == 4 else k
    return [from_pairs(out), from_pairs(grown), from_pairs(v), from_pairs(scores)]


def _reduce(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    dims = axis.need(node, 0)
    rank = len(dims.before)
    listed = node.attrs.get("axes")
    if listed is None and len(node.inputs) > 1:
        listed = axis.numbers(node, 1, "axes")
    axes = {a % rank for a in listed} if listed is not None else set(range(rank))
    if any(dims.carries(k) for k in axes):
        raise axis.undecided(node, "a reduction over tokens, which would see the register,")
    keep = bool(node.attrs.get("keepdims", 1))
    pairs = [(1, 1) if k in axes else pair for k, pair in enumerate(dims.pairs())]
    return [from_pairs([pair for k, pair in enumerate(pairs) if keep or k not in axes])]


SUMS: dict[str, Rule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Attention": _attention,
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"), _reduce),
}
