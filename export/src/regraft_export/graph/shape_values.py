"""Integer tensors that describe shapes, element by element, with where each element comes from.

A graph computes shapes at run time (``Shape`` and what follows it) or has them baked in as
constants. Only the second kind must be mended when the token count grows. So every element knows
its value before and after the register is appended, and which constant it was read from, if any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray


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
    """One integer of a shape.

    Attributes:
        before: its value in the unpatched graph, at the trial batch size.
        after: its value once the register is appended and nothing is mended.
        origin: the constant it was read from; None if the graph computes it.
    """

    before: int
    after: int
    origin: Baked | None = None


Elements = NDArray[np.object_]
"""An array of :class:`Element`."""


def from_constant(constant: gs.Constant, node: gs.Node, slot: int) -> Elements | None:
    """The elements of an integer constant as ``node`` reads it; None for other dtypes."""
    if np.dtype(constant.dtype).kind != "i" or constant.values.size > 64:
        return None
    flat = [
        Element(int(v), int(v), Baked(node, slot, i)) for i, v in enumerate(constant.values.flat)
    ]
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
    if rule is None or not inputs or any(value is None for value in inputs):
        return None
    return rule(node, [value for value in inputs if value is not None])


def plain(elements: Elements) -> list[int]:
    """The unpatched values alone, flattened."""
    return [element.before for element in elements_of(elements)]


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


def _arithmetic(
    function: Callable[[int, int], int],
) -> Callable[[gs.Node, list[Elements]], Elements]:
    def combine(a: Element, b: Element) -> Element:
        return Element(function(a.before, b.before), function(a.after, b.after))

    def rule(node: gs.Node, inputs: list[Elements]) -> Elements:
        result = np.frompyfunc(combine, 2, 1)(inputs[0], inputs[1])
        return result if isinstance(result, np.ndarray) else _array([result], ())

    return rule


ARITHMETIC: dict[str, Callable[[gs.Node, list[Elements]], Elements]] = {
    "Add": _arithmetic(lambda a, b: a + b),
    "Sub": _arithmetic(lambda a, b: a - b),
    "Mul": _arithmetic(lambda a, b: a * b),
    "Div": _arithmetic(lambda a, b: a // b if b else 0),
}

_RULES: dict[str, Callable[[gs.Node, list[Elements]], Elements]] = {
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Cast": _same,
    "Identity": _same,
    **ARITHMETIC,
}
