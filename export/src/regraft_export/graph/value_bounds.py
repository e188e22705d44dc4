"""Between which numbers all elements of a tensor lie, whatever the images and their number.

Exporters write attention masks in many ways: constants, comparisons of computed ranges, sums of
them. None is matched here: constants and operators are followed with intervals, so that what is
said of a tensor holds for every element of it, at every batch and image size. Where an operator is
not known, nothing is said. Results of arithmetic hold in any floating-point type: rounding keeps
order, and only comparisons that survive it are decided.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from regraft_export.graph.document import dtype_of
from regraft_export.graph.interval import Bounds, held, hull, in_type, is_exact, of_array, rounded
from regraft_export.graph.token_rules import STANDARD_DOMAINS

_DEEPEST = 64


def bounds(value: gs.Tensor, deepest: int = _DEEPEST) -> Bounds | None:
    """Bounds of all elements of a tensor; None if nothing is known of them.

    Args:
        value: constants are read.
        deepest: how many nodes before it are followed, one after another.
    """
    return _Reader().read(value, deepest)


class _Reader:
    """Reads tensors and what they are made of; what was read once is not followed again."""

    def __init__(self) -> None:
        # The tensors are held, so that no other one takes their ids.
        self._known: dict[tuple[int, int], tuple[gs.Tensor, Bounds | None]] = {}

    def read(self, value: gs.Tensor, deepest: int) -> Bounds | None:
        key = id(value), deepest  # with fewer nodes to follow, less may be known
        if key not in self._known:
            self._known[key] = value, self._follow(value, deepest)
        return self._known[key][1]

    def _follow(self, value: gs.Tensor, deepest: int) -> Bounds | None:
        if isinstance(value, gs.Constant):
            return of_array(np.asarray(value.values))
        if len(value.inputs) != 1 or not deepest:
            return None
        node = value.inputs[0]
        rule = _RULES.get(node.op) if node.domain in STANDARD_DOMAINS else None
        if rule is None:
            return None
        return rule(node, lambda slot: self.read(node.inputs[slot], deepest - 1))


_Inputs = Callable[[int], Bounds | None]
_Rule = Callable[[gs.Node, _Inputs], Bounds | None]


def _same(node: gs.Node, read: _Inputs) -> Bounds | None:
    """Elements are moved, repeated or left out."""
    return read(0)


def _union(node: gs.Node, read: _Inputs) -> Bounds | None:
    return hull([read(i) for i in range(len(node.inputs))])


def _cast(node: gs.Node, read: _Inputs) -> Bounds | None:
    given = read(0)
    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(int(node.attrs["to"])))
    return None if given is None else in_type(given, kind)


def _cast_like(node: gs.Node, read: _Inputs) -> Bounds | None:
    given, like = read(0), node.inputs[1]
    return None if given is None or like.dtype is None else in_type(given, dtype_of(like))


def _not(node: gs.Node, read: _Inputs) -> Bounds | None:
    given = read(0)
    return None if given is None else Bounds(1 - given.high, 1 - given.low, boolean=True)


def _and(node: gs.Node, read: _Inputs) -> Bounds:
    a, b = (read(i) or _ANY for i in range(2))
    return Bounds(min(a.low, b.low), min(a.high, b.high), boolean=True)


def _or(node: gs.Node, read: _Inputs) -> Bounds:
    a, b = (read(i) or _ANY for i in range(2))
    return Bounds(max(a.low, b.low), max(a.high, b.high), boolean=True)


_ANY = Bounds(0, 1, boolean=True)


def _at_least(first: int, *, otherwise: bool = False) -> _Rule:
    """``a >= b`` for all elements, a being input ``first``; nothing is said if it may be false.

    ``otherwise`` is for the opposite comparison, which is then false for all.
    """

    def rule(node: gs.Node, read: _Inputs) -> Bounds | None:
        a, b = read(first), read(1 - first)
        if a is None or b is None or a.low < b.high:
            return None
        return Bounds(float(not otherwise), float(not otherwise), boolean=True)

    return rule


def _add(node: gs.Node, read: _Inputs) -> Bounds | None:
    return _sum(node, read(0), read(1), 1)


def _subtract(node: gs.Node, read: _Inputs) -> Bounds | None:
    return _sum(node, read(0), read(1), -1)


def _sum(node: gs.Node, a: Bounds | None, b: Bounds | None, sign: int) -> Bounds | None:
    """``a + sign * b``; nothing is said of integers that may wrap around."""
    if a is None or b is None:
        return None
    kind = _kind(node)
    integers = kind is not None and kind.kind in "iu"
    # Of an unknown type, only what every type holds.
    least, most = (0, 127) if kind is None else (-inf, inf)
    if kind is not None and integers:
        least, most = np.iinfo(kind.name).min, np.iinfo(kind.name).max
        a, b = (held(x, int(least), int(most)) for x in (a, b))
    first, last = (b.low, b.high) if sign == 1 else (-b.high, -b.low)
    if inf in (a.high, last) and -inf in (a.low, first):
        return None  # infinity less infinity is NaN
    low, high = a.low + first, a.high + last
    return rounded(float(low), float(high)) if least <= low and high <= most else None


def _kind(node: gs.Node) -> np.dtype[np.generic] | None:
    """The type of all that an arithmetic node reads and makes, if any of it is known."""
    known = [t for t in (*node.outputs, *node.inputs) if t.dtype is not None]
    return dtype_of(known[0]) if known else None


def _product(node: gs.Node, read: _Inputs) -> Bounds | None:
    """Zero times what is finite; nothing is said of other products."""
    a, b = read(0), read(1)
    for nought, other in ((a, b), (b, a)):
        if nought is not None and other is not None and nought.zero:
            return nought if isfinite(other.low) and isfinite(other.high) else None
    return None


def _range(node: gs.Node, read: _Inputs) -> Bounds | None:
    """However long it is, it begins at its start."""
    start, step = read(0), read(2)
    if start is None or step is None or step.low < 0 or not is_exact(start.low):
        return None
    return Bounds(start.low, inf)


def _total(node: gs.Node, read: _Inputs) -> Bounds | None:
    """A sum of one or more numbers that are not negative is none of them less."""
    given = read(0)
    if given is None or given.boolean or given.low < 0:
        return None
    kind = _kind(node)
    if given.high == inf and (kind is None or kind.kind in "iu"):
        return None  # large integers wrap around
    return Bounds(given.low, 0.0 if given.high == 0 else inf)


def _where(node: gs.Node, read: _Inputs) -> Bounds | None:
    condition = read(0)
    if condition is not None and (condition.true or condition.false):
        return read(1 if condition.true else 2)
    return hull([read(1), read(2)])


def _filled(node: gs.Node, read: _Inputs) -> Bounds | None:
    value = node.attrs.get("value")
    return Bounds(0, 0) if value is None else of_array(np.asarray(value.values))


_MOVES = (
    "Identity", "Expand", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Slice", "Gather",
    "Flatten", "Tile", "Split", "ReduceMax", "ReduceMin",
)  # fmt: skip
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_MOVES, _same),
    "Concat": _union,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Not": _not,
    "And": _and,
    "Or": _or,
    "GreaterOrEqual": _at_least(0),
    "LessOrEqual": _at_least(1),
    "Less": _at_least(0, otherwise=True),
    "Greater": _at_least(1, otherwise=True),
    "Add": _add,
    "Sub": _subtract,
    "Mul": _product,
    "Range": _range,
    "ReduceSum": _total,
    "Where": _where,
    "ConstantOfShape": _filled,
}
