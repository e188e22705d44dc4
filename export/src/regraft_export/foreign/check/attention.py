"""Where a block's attention reads and writes, and attention in numpy.

It is understood as ``softmax(f * Q K^T) V``, decomposed or as one ``Attention`` node. Whatever the
scores are multiplied with must be one number, and whatever is added to them must be zeros; both are
looked at while the file runs. Anything else is refused, with the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.errors import RewriteError
from regraft_export.foreign.check.forms import Form
from regraft_export.foreign.check.pieces import Arrays
from regraft_export.foreign.shapes import Shape, Shapes

_PASSES = frozenset(["Cast", "Identity", "Dropout", "Reshape"])


@dataclass(frozen=True)
class Attention:
    """One block's attention.

    Attributes:
        node: the Softmax or Attention node's name.
        query, key, value: what it reads.
        forms: of these three and the result.
        result: what it gives.
        weights: after the softmax, as the file holds them; None inside an ``Attention`` node.
        weights_shape: at the sizes where the survey walked the graph.
        factors: what the scores are multiplied with, each a tensor or a number.
        divisors: what they are divided by.
        zeros: what is added to them.
        heads: of query and of key, where a dimension holds all of them.
    """

    node: str
    query: str
    key: str
    value: str
    forms: dict[str, Form]
    result: str
    weights: str | None = None
    weights_shape: Shape = ()
    factors: tuple[str | float, ...] = ()
    divisors: tuple[str | float, ...] = ()
    zeros: tuple[str, ...] = ()
    heads: tuple[int, int] | None = None

    @property
    def reads(self) -> list[str]:
        """Everything that must be known of a block before its attention."""
        asked = [t for t in (*self.factors, *self.divisors, *self.zeros) if isinstance(t, str)]
        return list(dict.fromkeys([self.query, self.key, self.value, *asked]))

    def factor(self, values: Arrays) -> float:
        """f, from the tensors of :attr:`reads`.

        Raises:
            RewriteError: the scores are scaled by more than one number, or something is added.
        """
        for name in self.zeros:
            if np.any(values[name]):
                self._refuse(f"adds {name!r} to its scores, which is not zero: a mask or a bias")
        result = 1.0
        for tensors, power in ((self.factors, 1), (self.divisors, -1)):
            for tensor in tensors:
                number = np.asarray(values[tensor] if isinstance(tensor, str) else tensor)
                if number.size != 1:
                    self._refuse(f"scales its scores by {tensor!r} of shape {number.shape}")
                result *= float(number.reshape(())) ** power
        return result

    def attend(self, values: Arrays, *, weights: bool) -> Arrays:
        """The result, taken apart, of any number of tokens.

        Args:
            values: the tensors of :attr:`reads`.
            weights: whether to give the attention maps too.
        """
        query, key, value = (self._rows(values[n], n) for n in (self.query, self.key, self.value))
        key, value = (np.repeat(t, len(query) // len(t), axis=0) for t in (key, value))
        factor = self.factor(values) if self.heads is None or self.factors else None
        if factor is None:
            factor = query.shape[-1] ** -0.5
        out = np.empty((*query.shape[:2], value.shape[-1]), query.dtype)
        maps = np.empty((*query.shape[:2], key.shape[1]), query.dtype) if weights else None
        for row in range(len(query)):  # one image, one head: T x T numbers at a time
            scores = factor * (query[row].astype(np.float64) @ key[row].astype(np.float64).T)
            exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
            share = exponents / exponents.sum(axis=1, keepdims=True)
            out[row] = share @ value[row]
            if maps is not None:
                maps[row] = share
        result = {self.result: self._from_rows(out, values)}
        if maps is not None and self.weights is not None:
            result[self.weights] = maps
        return result

    def _rows(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        """(images * heads, tokens, head size)."""
        form = self.forms[name]
        if values.ndim == 3 and self.heads is not None:
            count = self.heads[0] if name == self.query else self.heads[1]
            split = values.reshape(*values.shape[:2], count, -1).swapaxes(1, 2)
            return split.reshape(-1, *split.shape[2:])
        if form.axis == -1:
            values = values.swapaxes(-1, -2)
        return values.reshape(-1, *values.shape[-2:])

    def _from_rows(self, out: NDArray[Any], values: Arrays) -> NDArray[Any]:
        query, value = values[self.query], values[self.value]
        if query.ndim == 3 and self.heads is not None:
            split = out.reshape(len(query), self.heads[0], *out.shape[1:]).swapaxes(1, 2)
            return split.reshape(*split.shape[:2], -1)
        lead = query.shape[:-2] if self.heads is not None else value.shape[:-2]
        return out.reshape(*lead, *out.shape[1:])

    def _refuse(self, reason: str) -> NoReturn:
        raise RewriteError(
            f"the check does not understand the attention at {self.node!r}, which {reason}; "
            "expected softmax(f * Q K^T) V with a number f"
        )


def find_attention(node: gs.Node, shapes: Shapes) -> Attention:
    """Reads the graph around a Softmax, or an Attention node.

    Raises:
        RewriteError: it is of another form; the message names the node.
    """
    return _one_node(node, shapes) if node.op == "Attention" else _decomposed(node, shapes)


def _one_node(node: gs.Node, shapes: Shapes) -> Attention:
    more = [t.name for t in node.inputs[3:] if t.name]
    used = [t.name for t in node.outputs[1:] if t.name and t.outputs]
    rank = len(shapes.of(node.inputs[0]) or ())
    if node.domain or more or used or node.attrs.get("is_causal") or node.attrs.get("softcap"):
        what = more or used or [k for k in ("is_causal", "softcap") if node.attrs.get(k)]
        raise _unknown(node, f"has {', '.join(what) or node.domain}")
    if rank not in (3, 4):
        raise _unknown(node, f"has a query of {rank} dimensions")
    query, key, value = (t.name for t in node.inputs[:3])
    heads = (1, 1) if rank == 4 else (node.attrs["q_num_heads"], node.attrs["kv_num_heads"])
    form, scale = Form(1 if rank == 3 else 2), node.attrs.get("scale")
    result = node.outputs[0].name
    forms = dict.fromkeys([query, key, value, result], form)
    factors = () if scale is None else (float(scale),)
    return Attention(node.name, query, key, value, forms, result, factors=factors, heads=heads)


def _decomposed(softmax: gs.Node, shapes: Shapes) -> Attention:
    shape = shapes.of(softmax.inputs[0]) or ()
    if softmax.attrs.get("axis", -1) not in (-1, len(shape) - 1):
        raise _unknown(softmax, "is not over the last axis")
    scores, factors, divisors, zeros = _scores(softmax, shapes)
    weighted = _weighted(softmax)
    query, key = scores.inputs
    value, result = weighted.inputs[1], weighted.outputs[0]
    forms = {t.name: Form(-2) for t in (query, value, result)} | {key.name: Form(-1)}
    if len({t.name for t in (query, key, value)}) != 3:
        raise _unknown(scores, "multiplies a tensor with itself")
    return Attention(
        softmax.name,
        query.name,
        key.name,
        value.name,
        forms,
        result.name,
        weights=softmax.outputs[0].name,
        weights_shape=shapes.of(softmax.outputs[0]) or (),
        factors=tuple(factors),
        divisors=tuple(divisors),
        zeros=tuple(zeros),
    )


def _scores(softmax: gs.Node, shapes: Shapes) -> tuple[gs.Node, list[str], list[str], list[str]]:
    """The product of queries and keys, and what is done to it before the softmax."""
    factors, divisors, zeros = list[str](), list[str](), list[str]()
    value = softmax.inputs[0]
    while len(value.inputs) == 1 and value.inputs[0].op != "MatMul":
        node = value.inputs[0]
        if node.op in _PASSES:
            value = node.inputs[0]
            continue
        if node.op not in ("Add", "Mul", "Div"):
            raise _unknown(node, "makes the scores of an attention")
        whole = [t for t in node.inputs if shapes.of(t) == shapes.of(node.outputs[0])]
        if len(whole) != 1 or (node.op == "Div" and whole[0] is not node.inputs[0]):
            raise _unknown(node, "makes the scores of an attention from two tensors")
        value = whole[0]
        other = next(t for t in node.inputs if t is not value)
        {"Add": zeros, "Mul": factors, "Div": divisors}[node.op].append(other.name)
    if len(value.inputs) != 1 or any(isinstance(t, gs.Constant) for t in value.inputs[0].inputs):
        raise _unknown(softmax, f"has scores {value.name!r} that no product of tokens gives")
    return value.inputs[0], factors, divisors, zeros


def _weighted(softmax: gs.Node) -> gs.Node:
    """The product of attention and values."""
    value = softmax.outputs[0]
    while True:
        readers = {id(n): n for n in value.outputs if n.op in (*_PASSES, "MatMul")}
        if len(readers) != 1:
            found = ", ".join(f"{n.name!r} ({n.op})" for n in value.outputs) or "nothing"
            raise _unknown(softmax, f"is read by {found}: expected its product with the values")
        node = next(iter(readers.values()))
        if node.op == "MatMul":
            if node.inputs[0] is not value or isinstance(node.inputs[1], gs.Constant):
                raise _unknown(node, "reads an attention, but not to weigh values by it")
            return node
        value = node.outputs[0]


def _unknown(node: gs.Node, reason: str) -> RewriteError:
    return RewriteError(
        f"the check does not understand node {node.name!r} ({node.op}), which {reason}; expected "
        "softmax(f * Q K^T) V with a number f"
    )
