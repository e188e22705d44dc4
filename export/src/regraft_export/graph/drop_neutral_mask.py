"""Rewrite: an attention mask that lets everything through is dropped.

transformers writes one into every vision model it traces, with the token count baked in, and a
guard against rows that are masked whole. Neither does anything, both cost time.

1. ``scores + Where(all true, 0, -inf)``, and the other ways to add zeros, becomes ``scores``.
2. ``Attention(q, k, v, all true)``, or with a mask of zeros, becomes ``Attention(q, k, v)``.
3. ``Where(IsNaN(p), 0, p)`` after that softmax becomes ``p``: without a mask no row is NaN unless
   its input is, and then the NaN must show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft_export.graph.document import ancestors, consumers, replace_uses


def drop_neutral_mask(graph: gs.Graph) -> int:
    """Drops the masks; returns how many attentions were freed of one."""
    dropped = 0
    for node in list(graph.nodes):
        if node.op == "Attention" and not node.domain and len(node.inputs) == 4:
            if _neutral(node.inputs[3]):
                node.inputs = list(node.inputs[:3])
                dropped += 1
        elif node.op == "Add" and any(_adds_nothing(t) for t in node.inputs):
            mask = next(t for t in node.inputs if _adds_nothing(t))
            scores = next(t for t in node.inputs if t is not mask)
            if any(n.op == "Softmax" for n in consumers(node.outputs[0])):
                replace_uses(graph, node.outputs[0], scores)
                _drop_guard(graph, scores)
                dropped += 1
        elif node.op == "Where" and _all_true(node.inputs[0]) and _all_zero(node.inputs[1]):
            for add in consumers(node.outputs[0]):
                if add.op == "Add":
                    scores = next(t for t in add.inputs if t is not node.outputs[0])
                    replace_uses(graph, add.outputs[0], scores)
                    _drop_guard(graph, scores)
                    dropped += 1
    return dropped


def _is_mask(value: gs.Tensor) -> bool:
    """Whether a constant is a mask of zeros over pairs of tokens, (..., T, T)."""
    if not isinstance(value, gs.Constant) or len(value.shape) < 3:
        return False
    T = value.shape[-1]
    return T > 1 and value.shape[-2] == T and set(value.shape[:-2]) == {1} and _all_zero(value)


def _adds_nothing(value: gs.Tensor) -> bool:
    """Whether a tensor is a mask of zeros, or ``(not all true) * a finite number``."""
    if _is_mask(value):
        return True
    made = value.inputs[0] if isinstance(value, gs.Variable) and value.inputs else None
    if made is None or made.op != "Mul":
        return False
    a, b = made.inputs
    for factor, other in ((a, b), (b, a)):
        while factor.inputs and factor.inputs[0].op in ("Cast", "Identity"):
            factor = factor.inputs[0].inputs[0]
        inverted = bool(factor.inputs) and factor.inputs[0].op == "Not"
        finite = isinstance(other, gs.Constant) and bool(np.isfinite(other.values).all())
        if inverted and finite and _all_true(factor.inputs[0].inputs[0]):
            return True
    return False


def _neutral(value: gs.Tensor) -> bool:
    made = value.inputs[0] if isinstance(value, gs.Variable) and value.inputs else None
    if made is not None and made.op == "Where":
        return _all_true(made.inputs[0]) and _all_zero(made.inputs[1])
    return _all_true(value) or _is_mask(value)


def _drop_guard(graph: gs.Graph, scores: gs.Tensor) -> None:
    for softmax in (n for n in consumers(scores) if n.op == "Softmax"):
        p = softmax.outputs[0]
        for where in (n for n in consumers(p) if n.op == "Where"):
            condition, replacement, kept = where.inputs
            asks = condition.inputs[0] if condition.inputs else None
            guards = asks is not None and asks.op == "IsNaN" and asks.inputs[0] is p
            if kept is p and guards and _all_zero(replacement):
                replace_uses(graph, where.outputs[0], p)


def _all_true(value: gs.Tensor) -> bool:
    while isinstance(value, gs.Variable) and value.inputs:
        if value.inputs[0].op not in ("Expand", "Identity", "Unsqueeze", "Reshape"):
            return _computed_true(value)
        value = value.inputs[0].inputs[0]
    is_mask = isinstance(value, gs.Constant) and np.dtype(value.dtype) == np.bool_
    return bool(is_mask and value.values.all())


def _computed_true(value: gs.Variable) -> bool:
    """Whether a mask that an unoptimised export computes from constants alone is all true."""
    nodes = ancestors(value)
    read = [t for node in nodes for t in node.inputs]
    from_constants = all(isinstance(t, gs.Constant) or t.inputs for t in read)
    if len(nodes) > _MASK_NODES or not from_constants or any(n.domain for n in nodes):
        return False
    known: dict[str, NDArray[Any]] = {t.name: t.values for t in read if isinstance(t, gs.Constant)}
    for _ in nodes:
        pending = [n for n in nodes if n.outputs[0].name not in known]
        ready = [n for n in pending if all(t.name in known for t in n.inputs)]
        for node in ready:
            if node.op not in _FOLDED:
                return False
            known[node.outputs[0].name] = _FOLDED[node.op](*(known[t.name] for t in node.inputs))
    mask = known.get(value.name)
    return mask is not None and mask.dtype == np.bool_ and bool(mask.all())


def _unsqueezed(value: NDArray[Any], axes: NDArray[Any]) -> NDArray[Any]:
    return np.expand_dims(value, tuple(axes.ravel().tolist()))


_MASK_NODES = 32
_FOLDED: dict[str, Callable[..., NDArray[Any]]] = {
    "Range": np.arange,
    "Add": np.add,
    "CastLike": lambda value, like: value.astype(like.dtype),
    "Unsqueeze": _unsqueezed,
    "GreaterOrEqual": np.greater_equal,
    "And": np.logical_and,
    "Not": np.logical_not,
}


def _all_zero(value: gs.Tensor) -> bool:
    return isinstance(value, gs.Constant) and not np.asarray(value.values, np.float64).any()
