"""Weights of a foreign graph, also where an exporter left a Transpose, Cast or Identity to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

_STEPS = frozenset(["Identity", "Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze"])


@dataclass(frozen=True)
class Weight:
    """A constant, and the nodes between it and its reader.

    Attributes:
        source: the constant.
        steps: nodes, in order.
        shape: after them.
    """

    source: gs.Constant
    steps: tuple[gs.Node, ...]
    shape: tuple[int, ...]

    @property
    def values(self) -> NDArray[Any]:
        """The values as the reader sees them."""
        values = np.asarray(self.source.values)
        for node in self.steps:
            values = _apply(node, values)
        return values


def weight(value: gs.Tensor) -> Weight | None:
    """The constant behind a tensor; None if there is none."""
    steps: list[gs.Node] = []
    while isinstance(value, gs.Variable):
        if len(value.inputs) != 1 or value.inputs[0].op not in _STEPS:
            return None
        node = value.inputs[0]
        if any(not isinstance(t, gs.Constant) for t in node.inputs[1:]):
            return None
        steps.insert(0, node)
        value = node.inputs[0]
    if not isinstance(value, gs.Constant):
        return None
    shape = tuple(int(n) for n in value.shape)
    for node in steps:
        # Shapes alone: a large weight is not read before somebody wants its values.
        shape = _apply(node, np.broadcast_to(np.zeros((), np.int8), shape)).shape
    return Weight(value, tuple(steps), shape)


def is_constant(value: gs.Tensor) -> bool:
    """Whether a tensor has a constant behind it."""
    return weight(value) is not None


def _apply(node: gs.Node, values: NDArray[Any]) -> NDArray[Any]:
    if node.op == "Transpose":
        return np.transpose(values, node.attrs.get("perm"))
    if node.op == "Cast":
        return values.astype(onnx.helper.tensor_dtype_to_np_dtype(int(node.attrs["to"])))
    if node.op == "Reshape":
        target = [int(n) for n in node.inputs[1].values]
        return values.reshape([values.shape[i] if n == 0 else n for i, n in enumerate(target)])
    if node.op in ("Squeeze", "Unsqueeze"):
        axes = node.attrs.get("axes")
        if axes is None:
            axes = [int(n) for n in node.inputs[1].values] if len(node.inputs) > 1 else None
        if node.op == "Unsqueeze":
            return np.expand_dims(values, tuple(axes or ()))
        return np.squeeze(values, None if axes is None else tuple(axes))
    return values  # Identity
