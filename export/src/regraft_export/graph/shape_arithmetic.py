"""Operators of shape arithmetic: what they yield, element by element.

Those that carry elements on keep where each one was read from; what is computed keeps no trace of
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from math import prod

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from regraft_export.graph.shape_values import (
    MOST_ELEMENTS,
    Element,
    Elements,
    Number,
    array_of,
    elements_of,
    plain,
)


def evaluate(node: gs.Node, inputs: list[Elements | None]) -> Elements | None:
    """The elements a node yields from known elements; None if it is not shape arithmetic."""
    rule = _RULES.get(node.op)
    if rule is None or node.domain or not inputs or any(value is None for value in inputs):
        return None
    known = [value for value in inputs if value is not None]
    if node.op == "ReduceProd":
        known = known[:1]
    try:
        return rule(node, known)
    except (IndexError, ValueError, OverflowError, TypeError):
        return None  # it is no shape arithmetic: too large, or of another form


def _concat(node: gs.Node, inputs: list[Elements]) -> Elements:
    return np.concatenate(inputs, axis=int(node.attrs.get("axis", 0)))


def _gather(node: gs.Node, inputs: list[Elements]) -> Elements:
    indices = np.array(plain(inputs[1]), dtype=np.int64).reshape(inputs[1].shape)
    taken = np.take(inputs[0], indices, axis=int(node.attrs.get("axis", 0)))
    return taken if isinstance(taken, np.ndarray) else array_of([taken], ())


def _slice(node: gs.Node, inputs: list[Elements]) -> Elements:
    starts, ends = plain(inputs[1]), plain(inputs[2])
    axes = plain(inputs[3]) if len(inputs) > 3 else list(range(len(starts)))
    steps = plain(inputs[4]) if len(inputs) > 4 else [1] * len(starts)
    cut: list[slice] = [slice(None)] * inputs[0].ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut[axis] = slice(start, end, step)
    return inputs[0][tuple(cut)]


def _squeeze(node: gs.Node, inputs: list[Elements]) -> Elements:
    axes = tuple(plain(inputs[1])) if len(inputs) > 1 else None
    return np.squeeze(inputs[0], axis=axes)


def _unsqueeze(node: gs.Node, inputs: list[Elements]) -> Elements:
    return np.expand_dims(inputs[0], axis=tuple(plain(inputs[1])))


def _same(node: gs.Node, inputs: list[Elements]) -> Elements:
    return inputs[0]


def _reshape(node: gs.Node, inputs: list[Elements]) -> Elements:
    return inputs[0].reshape(plain(inputs[1]))


def _expand(node: gs.Node, inputs: list[Elements]) -> Elements:
    target = np.broadcast_shapes(inputs[0].shape, tuple(plain(inputs[1])))
    if prod(target) > MOST_ELEMENTS:
        raise OverflowError("no tensor that describes a shape is that large")
    return np.array(np.broadcast_to(inputs[0], target))


def _constant_of_shape(node: gs.Node, inputs: list[Elements]) -> Elements:
    sizes = [(int(e.before), int(e.after)) for e in elements_of(inputs[0])]
    value = node.attrs.get("value")
    number = 0.0 if value is None else value.values.ravel().tolist()[0]
    if any(before != after for before, after in sizes) or prod(b for b, _ in sizes) > MOST_ELEMENTS:
        raise OverflowError("its size depends on the tokens, or it is too large")
    shape = tuple(before for before, _ in sizes)
    return array_of([Element(number, number)] * prod(shape), shape)


def _range(node: gs.Node, inputs: list[Elements]) -> Elements:
    start, limit, step = (elements_of(value)[0] for value in inputs)
    if any(e.before != e.after for e in (start, limit, step)):
        raise OverflowError("its length depends on the tokens")
    values = np.arange(start.before, limit.before, step.before)
    if values.size > MOST_ELEMENTS:
        raise OverflowError("no tensor that describes a shape is that large")
    return array_of([Element(v, v) for v in values.tolist()], values.shape)


def _where(node: gs.Node, inputs: list[Elements]) -> Elements:
    def choose(condition: Element, yes: Element, no: Element) -> Element:
        first, then = (yes if c else no for c in (condition.before, condition.after))
        return first if first is then else Element(first.before, then.after)

    return _as_array(np.frompyfunc(choose, 3, 1)(*inputs))


def _cast(node: gs.Node, inputs: list[Elements]) -> Elements:
    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(int(node.attrs["to"]))).kind
    number: type = {"i": int, "u": int, "b": bool}.get(kind, float)

    def convert(e: Element) -> Element:
        same = number(e.before) == e.before
        return Element(number(e.before), number(e.after), e.origin if same else None)

    return _as_array(np.frompyfunc(convert, 1, 1)(inputs[0]))


def _product(node: gs.Node, inputs: list[Elements]) -> Elements:
    flat = elements_of(inputs[0])
    result = Element(prod(e.before for e in flat), prod(e.after for e in flat))
    keep = bool(node.attrs.get("keepdims", 1))
    return array_of([result], (1,) * inputs[0].ndim if keep else ())


def _as_array(result: object) -> Elements:
    return result if isinstance(result, np.ndarray) else array_of([result], ())  # type: ignore[list-item]


def _elementwise(
    function: Callable[..., Number],
) -> Callable[[gs.Node, list[Elements]], Elements]:
    def one(*given: Element) -> Element:
        return Element(function(*(e.before for e in given)), function(*(e.after for e in given)))

    def rule(node: gs.Node, inputs: list[Elements]) -> Elements:
        return _as_array(np.frompyfunc(one, len(inputs), 1)(*inputs))

    return rule


def _quotient(a: Number, b: Number) -> Number:
    if not b:
        return 0
    # ONNX divides integers towards zero.
    return a / b if isinstance(a, float) or isinstance(b, float) else int(a / b)


_COMPUTED: dict[str, Callable[[gs.Node, list[Elements]], Elements]] = {
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Div": _elementwise(_quotient),
    "Mod": _elementwise(lambda a, b: a % b if b else 0),
    "Pow": _elementwise(lambda a, b: a**b),
    "Min": _elementwise(lambda *given: min(given)),
    "Max": _elementwise(lambda *given: max(given)),
    "Neg": _elementwise(lambda a: -a),
    "Abs": _elementwise(abs),
    "Sign": _elementwise(lambda a: (a > 0) - (a < 0)),
    "Sqrt": _elementwise(lambda a: math.sqrt(max(a, 0))),
    "Reciprocal": _elementwise(lambda a: 1 / a if a else 0),
    "Floor": _elementwise(lambda a: float(math.floor(a))),
    "Ceil": _elementwise(lambda a: float(math.ceil(a))),
    "Round": _elementwise(lambda a: float(round(a))),
    "Not": _elementwise(lambda a: not a),
    "And": _elementwise(lambda *given: reduce(lambda a, b: bool(a and b), given)),
    "Or": _elementwise(lambda *given: reduce(lambda a, b: bool(a or b), given)),
    "Equal": _elementwise(lambda a, b: a == b),
    "Less": _elementwise(lambda a, b: a < b),
    "LessOrEqual": _elementwise(lambda a, b: a <= b),
    "Greater": _elementwise(lambda a, b: a > b),
    "GreaterOrEqual": _elementwise(lambda a, b: a >= b),
    "ReduceProd": _product,
    "Range": _range,
}

_CARRIED: dict[str, Callable[[gs.Node, list[Elements]], Elements]] = {
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Cast": _cast,
    "CastLike": _same,
    "Identity": _same,
    "Reshape": _reshape,
    "Expand": _expand,
    "Where": _where,
    "ConstantOfShape": _constant_of_shape,
}

COMPUTED = frozenset(_COMPUTED)
"""Operators whose result keeps no trace of the constants it was computed from."""

_RULES = _COMPUTED | _CARRIED
