"""What a chain of Reshape, Transpose, Slice and the like does, found by computing it on indices.

Exporters spell "split into heads" in many ways. None is matched here: the chain is run on a tensor
that holds its own positions, and the result says where every element came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from regraft_export.graph.document import ancestors, consumers

Indices = NDArray[np.int64]
BATCH = 2  # two images, so that a chain that mixes them is seen
_MOVES = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Split", "Gather", "Identity")
_SHAPES = ("Shape", "Concat", "Cast", "Constant", "Add", "Sub", "Div", "Mul")


@dataclass(frozen=True)
class Chain:
    """A value, and what it was before it was moved about and scaled.

    Attributes:
        source: the first tensor, going back, that some other operator computed.
        end: the value.
        scale: product of the scalar factors on the way.
    """

    source: gs.Variable
    end: gs.Variable
    scale: float


def chain_to(end: gs.Variable) -> Chain:
    """Follows a value back through moves and scalar factors."""
    value, scale = end, 1.0
    while value.inputs:
        node = value.inputs[0]
        if node.op in _MOVES:
            value = node.inputs[0]
        elif (factor := scalar_factor(node)) is not None:
            value, scale = factor[0], scale * factor[1]
        else:
            break
        if not isinstance(value, gs.Variable):
            break
    return Chain(value, end, scale)


def moved_from(start: gs.Variable) -> gs.Variable:
    """Follows a value forward through moves, while each is read by one node alone."""
    value = start
    while len(readers := consumers(value)) == 1 and readers[0].op in _MOVES:
        if readers[0].inputs[0] is not value or len(readers[0].outputs) != 1:
            break
        value = readers[0].outputs[0]
    return value


def scalar_factor(node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """The other operand and the factor, of a multiplication or division by one number."""
    if node.op not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    if node.op == "Mul" and isinstance(first, gs.Constant):
        first, second = second, first
    if not isinstance(second, gs.Constant) or second.values.size != 1:
        return None
    if np.dtype(second.dtype).kind in "iu":  # a shape's, not a factor of the data
        return None
    number = float(second.values.reshape(()))
    return first, number if node.op == "Mul" else 1 / number


def indices_of(
    graph: gs.Graph, source: gs.Variable, end: gs.Variable, shape: Sequence[int]
) -> Indices | None:
    """Where each element of ``end`` came from.

    Args:
        graph: the graph of both.
        source: where the chain starts.
        end: where it ends.
        shape: of ``source``, with :data:`BATCH` images.

    Returns:
        Positions in the flattened source, in the shape of ``end``; None where the nodes between do
        more than move and scale, or do not accept that shape.
    """
    positions: Indices = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    if end is source:
        return positions
    nodes = ancestors(end, stop=[source])
    if any(node.op not in (*_MOVES, *_SHAPES) or node.domain for node in nodes):
        return None
    result = compute(graph, nodes, end, {source.name: positions})
    return None if result is None else np.asarray(result, dtype=np.int64)


def compute(
    graph: gs.Graph,
    nodes: Sequence[gs.Node],
    end: gs.Variable,
    given: dict[str, NDArray[np.generic]],
) -> NDArray[np.generic] | None:
    """The value of ``end`` from given tensors, without neutral nodes; None if it fails.

    Inputs of the graph that are not given are zeros of their shape, with :data:`BATCH` images.
    """
    feeds: dict[str, NDArray[np.generic]] = dict(given)
    inputs = [tensor for tensor in graph.inputs if any(n in nodes for n in tensor.outputs)]
    for tensor in inputs:
        empty: NDArray[np.generic] = np.zeros((BATCH, *tensor.shape[1:]), np.float32)
        feeds.setdefault(str(tensor.name), empty)
    neutral = {n.name for n in nodes if is_neutral(n)}
    model = _model(graph, nodes, list(feeds), end, neutral)
    try:
        outputs: Any = ReferenceEvaluator(model).run([str(end.name)], feeds)
    except (ValueError, IndexError, RuntimeError, TypeError):
        return None
    return np.asarray(outputs[0])


def is_neutral(node: gs.Node) -> bool:
    """Whether a node moves nothing: a factor of the data, or another precision."""
    return scalar_factor(node) is not None or _to_float(node)


def _model(
    graph: gs.Graph,
    nodes: Sequence[gs.Node],
    inputs: Sequence[str],
    end: gs.Variable,
    neutral: set[str],
) -> onnx.ModelProto:
    wanted = {id(node) for node in nodes}
    constants = {
        t.name: t
        for node in nodes
        for t in node.inputs
        if isinstance(t, gs.Constant) and t.name not in inputs
    }
    protos: list[onnx.NodeProto] = []
    for node in (n for n in graph.nodes if id(n) in wanted):  # the graph's order holds
        if node.name in neutral:
            data = next(t for t in node.inputs if isinstance(t, gs.Variable))
            protos.append(onnx.helper.make_node("Identity", [data.name], [node.outputs[0].name]))
            continue
        names = [t.name for t in node.inputs], [t.name for t in node.outputs]
        protos.append(onnx.helper.make_node(node.op, names[0], names[1], **dict(node.attrs)))
    # The evaluator does not look at declared types.
    ports = [
        [onnx.helper.make_tensor_value_info(n, 7, None) for n in x] for x in (inputs, [end.name])
    ]
    values = [onnx.numpy_helper.from_array(_wide(c.values), n) for n, c in constants.items()]
    body = onnx.helper.make_graph(protos, "chain", ports[0], ports[1], values)
    opset = onnx.helper.make_opsetid("", graph.opset)
    return onnx.helper.make_model(body, opset_imports=[opset])


def _wide(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Floats of any width as float32: the evaluator mixes no types."""
    return values if np.dtype(values.dtype).kind in "iub" else values.astype(np.float32)


def _to_float(node: gs.Node) -> bool:
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return node.op == "Cast" and node.attrs.get("to") in kinds
