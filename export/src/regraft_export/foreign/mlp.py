"""Down-projections in a foreign graph, found by what they do to the residual stream.

A down-projection multiplies by a constant (hidden, D), hidden > D, and its product, perhaps after
a bias, LayerScale or a norm, is added to something that its own activation was computed from: the
residual stream. Attention's output projection does the same where it narrows; there lies a softmax
between stream and activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.errors import ModelError
from regraft_export.foreign.constants import Weight, is_constant, weight
from regraft_export.foreign.reach import Reach
from regraft_export.graph.document import consumers

ATTENTION = frozenset(["Softmax", "Attention"])
PASSES = frozenset(["Identity", "Cast", "Dropout", "Reshape", "Transpose", "Squeeze", "Unsqueeze"])
_NORMS = frozenset(["LayerNormalization", "RMSNormalization"])


@dataclass(frozen=True)
class Mlp:
    """The end of one MLP.

    Attributes:
        matmul: the MatMul or Gemm.
        weight: its constant, as stored: (hidden, D), or for a transposed Gemm (D, hidden).
        transposed: whether it is stored (D, hidden).
        hidden: neurons.
        width: D.
        bias_add: the Add behind a MatMul that adds the bias, or None.
        bias: (D,), or None.
        stream: the residual stream before the addition.
        add: the residual addition.
    """

    matmul: gs.Node
    weight: Weight
    transposed: bool
    hidden: int
    width: int
    bias_add: gs.Node | None
    bias: Weight | None
    stream: gs.Variable
    add: gs.Node

    @property
    def activation(self) -> gs.Variable:
        """h: (B, T, hidden), or rows of it."""
        return self.matmul.inputs[0]

    @property
    def out(self) -> gs.Variable:
        """The residual stream after the addition: the block's output."""
        return self.add.outputs[0]

    @property
    def product(self) -> gs.Variable:
        """What the down-projection gives, with its bias."""
        return (self.bias_add or self.matmul).outputs[0]

    def gamma(self) -> NDArray[np.float32] | None:
        """The factor (D,) between product and addition (LayerScale's); None without any.

        Raises:
            ModelError: a norm lies there, so that a unit has no fixed part in the stream.
        """
        value, factor = self.product, None
        while not any(reader is self.add for reader in consumers(value)):
            node = next(n for n in consumers(value) if n.op != "Shape")
            if node.op in _NORMS:
                raise ModelError(
                    f"node {node.name!r} ({node.op}): what the MLP writes is normalised before it "
                    "is added; expected x + gamma * MLP(norm(x))"
                )
            if node.op == "Mul":
                other = weight(next(t for t in node.inputs if t is not value))
                assert other is not None  # or the way to the addition had not been followed
                scale = np.broadcast_to(np.asarray(other.values, np.float32), (1, 1, self.width))
                factor = scale.reshape(-1) if factor is None else factor * scale.reshape(-1)
            value = node.outputs[0]
        return factor


def mlps(reach: Reach) -> list[Mlp]:
    """Every down-projection of a graph, in topological order."""
    return [found for node in reach.nodes if (found := _mlp(node, reach)) is not None]


def _mlp(node: gs.Node, reach: Reach) -> Mlp | None:
    product = _product(node)
    if product is None or product.shape[0] == product.shape[1]:
        return None
    stored, transposed = product, node.op == "Gemm" and bool(node.attrs.get("transB", 0))
    hidden, width = stored.shape[::-1] if transposed else stored.shape
    if hidden <= width:
        return None
    bias_add, bias = _bias(node, width)
    after = (bias_add or node).outputs[0]
    end = _residual(after, node, reach)
    if end is None:
        return None
    add, stream = end
    if any(n.op in ATTENTION for n in reach.between(stream, node.inputs[0])):
        return None
    return Mlp(node, stored, transposed, hidden, width, bias_add, bias, stream, add)


def _product(node: gs.Node) -> Weight | None:
    """The weight of a product with a constant matrix on the right."""
    plain_gemm = node.op == "Gemm" and not node.attrs.get("transA", 0)
    unscaled = node.attrs.get("alpha", 1.0) == 1.0 and node.attrs.get("beta", 1.0) == 1.0
    if node.domain or not (node.op == "MatMul" or (plain_gemm and unscaled)):
        return None
    if is_constant(node.inputs[0]):
        return None
    stored = weight(node.inputs[1])
    return stored if stored is not None and len(stored.shape) == 2 else None


def _bias(node: gs.Node, width: int) -> tuple[gs.Node | None, Weight | None]:
    if node.op == "Gemm":
        has = len(node.inputs) > 2 and node.inputs[2].name != ""
        bias = weight(node.inputs[2]) if has else None
        return None, bias if bias is not None and bias.shape == (width,) else None
    readers = consumers(node.outputs[0])
    if len(readers) != 1 or readers[0].op != "Add":
        return None, None
    for value in readers[0].inputs:
        bias = weight(value)
        if bias is not None and bias.shape == (width,):
            return readers[0], bias
    return None, None


def _residual(
    value: gs.Variable, source: gs.Node, reach: Reach
) -> tuple[gs.Node, gs.Variable] | None:
    """The residual addition a product ends in, and the stream it is added to."""
    while True:
        readers = [n for n in consumers(value) if n.op != "Shape"]
        for reader in readers:
            others = [t for t in reader.inputs if t is not value]
            if reader.op == "Add" and len(others) == 1 and not is_constant(others[0]):
                # What the activation was computed from is the stream; nothing else is added to it.
                if reach.computes(others[0], source.inputs[0]):
                    return reader, others[0]
                return None
        if len(readers) != 1 or not _keeps(readers[0], value):
            return None
        value = readers[0].outputs[0]


def _keeps(node: gs.Node, value: gs.Tensor) -> bool:
    """Whether a node between product and addition is a bias, a scale, a norm or nothing."""
    if node.op in PASSES or node.op in _NORMS:
        return node.inputs[0] is value
    return node.op in ("Add", "Mul") and all(is_constant(t) for t in node.inputs if t is not value)
