"""Small tensors that describe shapes, element by element, with where each element comes from.

A graph computes shapes at run time (``Shape`` and what follows it) or has them baked in as
constants. Only the second kind must be mended when the token count grows. So every element knows
its value before and after the register is appended, and which constant it was read from, if any.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
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
    return array_of(flat, constant.values.shape)


def from_shape(node: gs.Node, before: tuple[int, ...], after: tuple[int, ...]) -> Elements:
    """What ``Shape`` yields for a tensor of these dimensions."""
    end = node.attrs.get("end")
    cut = slice(int(node.attrs.get("start", 0)), None if end is None else int(end))
    dims = [Element(b, a) for b, a in zip(before[cut], after[cut], strict=True)]
    return array_of(dims, (len(dims),))


def plain(elements: Elements) -> list[int]:
    """The unpatched values alone, flattened, of integers."""
    return [int(element.before) for element in elements_of(elements)]


def elements_of(elements: Elements) -> list[Element]:
    """The elements, flattened."""
    flat: list[Element] = elements.ravel().tolist()
    return flat


def array_of(flat: list[Element], shape: tuple[int, ...]) -> Elements:
    """The reverse: elements in an array of this shape."""
    array = np.empty(len(flat), dtype=object)
    array[:] = flat
    return array.reshape(shape)
