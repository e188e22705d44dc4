"""Small tensors that describe shapes, element by element, with where each element comes from.

A graph computes shapes at run time (``Shape`` and what follows it) or has them baked in as
constants. Only the second kind must be mended when the token count grows. So every element knows
its value before and after the register is appended, and which constant it was read from, if any.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

Number = Any  # an int where it is a size; a float or bool on the way to one


@dataclass(frozen=True, eq=False)
class Baked:
    """An element of a constant, as one node reads it.

    Attributes:
        node: the node that reads the constant.
        slot: which of its inputs.
        index: the element, in flattened order.
    """

    node: gs.Node
    slot: int
    index: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Baked) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[int, int, int]:
        # graphsurgeon compares nodes by content and does not hash them; here identity counts.
        return (id(self.node), self.slot, self.index)


@dataclass(frozen=True)
class Element:
    """One number of a shape, or on the way to one.

    Attributes:
        before: its value in the unpatched graph, at the trial batch size.
        after: its value once the register is appended and nothing is mended.
        origin: the constant it was read from; None if the graph computes it.
    """

    before: Number
    after: Number
    origin: Baked | None = None


Elements = NDArray[np.object_]
"""An array of :class:`Element`."""

MOST_ELEMENTS = 64


def from_constant(constant: gs.Constant, node: gs.Node, slot: int) -> Elements | None:
    """The elements of a small constant as ``node`` reads it; None for a large one."""
    if prod(constant.shape) > MOST_ELEMENTS or constant.values.dtype.kind in "OUS":
        return None
    numbers = constant.values.ravel().tolist()
    flat = [Element(v, v, Baked(node, slot, i)) for i, v in enumerate(numbers)]
    return _array(flat, constant.values.shape)


def from_shape(node: gs.Node, before: tuple[int, ...], after: tuple[int, ...]) -> Elements:
    """What ``Shape`` yields for a tensor of these dimensions."""
    end = node.attrs.get("end")
    cut = slice(int(node.attrs.get("start", 0)), None if end is None else int(end))
    dims = [Element(b, a) for b, a in zip(before[cut], after[cut], strict=True)]
    return _array(dims, (len(dims),))


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


def plain(elements: Elements) -> list[int]:
    """The unpatched values alone, flattened, of integers."""
    return [int(element.before) for element in elements_of(elements)]


def elements_of(elements: Elements) -> list[Element]:
    """The elements, flattened."""
    flat: list[Element] = elements.ravel().tolist()
    return flat


def _array(flat: list[Element], shape: tuple[int, ...]) -> Elements:
    array = np.empty(len(flat), dtype=object)
    array[:] = flat
    return array.reshape(shape)


def _concat(node: gs.Node, inputs: list[Elements]) -> Elements:
    return np.concatenate(inputs, axis=int(node.attrs.get("axis", 0)))


def _gather(node: gs.Node, inputs: list[Elements]) -> Elements:
    indices = np.array(plain(inputs[1]), dtype=np.int64).reshape(inputs[1].shape)
    taken = np.take(inputs[0], indices, axis=int(node.attrs.get("axis", 0)))
    return taken if isinstance(taken, np.ndarray) else _array([taken], ())


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
    return _array([Element(number, number)] * prod(shape), shape)


def _range(node: gs.Node, inputs: list[Elements]) -> Elements:
    start, limit, step = (elements_of(value)[0] for value in inputs)
    if any(e.before != e.after for e in (start, limit, step)):
        raise OverflowError("its length depends on the tokens")
    values = np.arange(start.before, limit.before, step.before)
    if values.size > MOST_ELEMENTS:
        raise OverflowError("no tensor that describes a shape is that large")
    return _array([Element(v, v) for v in values.tolist()], values.shape)


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
    return _array([result], (1,) * inputs[0].ndim if keep else ())


def _as_array(result: object) -> Elements:
    return result if isinstance(result, np.ndarray) else _array([result], ())  # type: ignore[list-item]


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
