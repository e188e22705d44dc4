"""Where in a graph the method's places are: token entry, block ends, down-projections, attention.

The tensors come from the trace, which names them (see ``trace.py``). A down-projection is found by
its weight: the MatMul inside the block's span whose constant equals the PyTorch parameter, never
by a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.errors import RewriteError
from regraft_export.graph.document import ancestors, consumers, tensor


@dataclass(frozen=True)
class Anchors:
    """Names of tensors in a traced graph.

    Attributes:
        tokens: (B, T, D), where the register is appended.
        hidden: (B, T, D), the raw output of each block, in order.
        final: (B, T, D), ``last_hidden_state``: the last block's output, or the final norm's.
    """

    tokens: str
    hidden: tuple[str, ...]
    final: str


@dataclass(frozen=True)
class DownProjection:
    """One down-projection: ``output = activation @ weight + bias``.

    Attributes:
        matmul: the node.
        activation: h, (B, T, hidden).
        weight: (hidden, D).
        bias_add: the Add that follows, or None.
        bias: (D,), or None.
        output: (B, T, D), after the bias.
        transposed: whether the node reads its weight as (D, hidden), as a Gemm can.
        axis: along which tokens lie: 1, or 0 in graphs that keep (T, B, D).
        flat: whether images and tokens are rows of one axis: (B * T, hidden) and (B * T, D), as a
            Gemm has them.
    """

    matmul: gs.Node
    activation: gs.Variable
    weight: gs.Constant
    bias_add: gs.Node | None
    bias: gs.Constant | None
    output: gs.Variable
    transposed: bool = False
    axis: int = 1
    flat: bool = False


def block_span(graph: gs.Graph, anchors: Anchors, layer: int) -> list[gs.Node]:
    """The nodes of one block."""
    start = anchors.tokens if layer == 0 else anchors.hidden[layer - 1]
    return ancestors(tensor(graph, anchors.hidden[layer]), stop=[tensor(graph, start)])


def down_projection(
    span: Sequence[gs.Node], weight: NDArray[np.generic], layer: int
) -> DownProjection:
    """Finds a block's down-projection by its weight.

    Args:
        span: the block's nodes.
        weight: (hidden, D), the PyTorch parameter transposed, in the graph's dtype.
        layer: for messages.

    Raises:
        RewriteError: no MatMul, or several, of the block multiply by this weight.
    """
    matches = [node for node in span if node.op == "MatMul" and _multiplies_by(node, weight)]
    if len(matches) != 1:
        hidden, width = weight.shape
        raise RewriteError(
            f"layer {layer}: {len(matches)} MatMul nodes multiply by the down-projection's weight "
            f"({hidden}, {width}); expected exactly one"
        )
    matmul = matches[0]
    product = matmul.outputs[0]
    readers = consumers(product)
    if len(readers) == 1 and readers[0].op == "Add":
        add = readers[0]
        bias = next((t for t in add.inputs if isinstance(t, gs.Constant)), None)
        if bias is not None and tuple(bias.shape) == (weight.shape[1],):
            return DownProjection(
                matmul, matmul.inputs[0], matmul.inputs[1], add, bias, add.outputs[0]
            )
    return DownProjection(matmul, matmul.inputs[0], matmul.inputs[1], None, None, product)


def _multiplies_by(node: gs.Node, weight: NDArray[np.generic]) -> bool:
    constant = node.inputs[1]
    return (
        isinstance(constant, gs.Constant)
        and tuple(constant.shape) == weight.shape
        and constant.dtype == weight.dtype
        and np.array_equal(constant.values, weight)
    )


def attention_probabilities(span: Sequence[gs.Node], layer: int) -> gs.Variable:
    """The block's softmax output, (B, heads, T, T).

    Raises:
        RewriteError: the block has no Softmax node, or several.
    """
    found = [node for node in span if node.op == "Softmax"]
    if len(found) != 1:
        raise RewriteError(
            f"layer {layer}: {len(found)} Softmax nodes in the block; expected exactly one, its "
            "attention's (is attention fused already?)"
        )
    return found[0].outputs[0]
