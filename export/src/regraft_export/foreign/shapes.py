"""Every tensor's dimensions in a foreign graph, at sizes of its inputs that are tried.

Files of many exporters record no intermediate shapes, and where image sizes are open they could
record symbols only. So the graph is walked once with numbers: ONNX's own inference gives each
node's shapes, and the small tensors that describe shapes are computed along the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TypeProto, defs, helper, numpy_helper, shape_inference

from regraft_export.graph import shape_values
from regraft_export.graph.shape_arithmetic import evaluate
from regraft_export.graph.shape_values import Elements, elements_of
from regraft_export.onnx_file.view import View

Shape = tuple[int, ...]
_REFUSALS = (shape_inference.InferenceError, onnx.checker.ValidationError)
_FLOAT, _BFLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16


class Conflict(Exception):  # noqa: N818 - said of the sizes that were tried
    """The graph cannot run at these sizes."""


@dataclass
class Shapes:
    """What is known at the sizes that were tried.

    Attributes:
        inputs: these sizes, by name.
        shapes: dimensions of each tensor that could be inferred, by id.
        kinds: ONNX element type of each tensor, by id.
    """

    inputs: Mapping[str, Shape]
    shapes: dict[int, Shape] = field(default_factory=dict)
    kinds: dict[int, int] = field(default_factory=dict)
    _elements: dict[int, Elements] = field(default_factory=dict)

    def of(self, value: gs.Tensor) -> Shape | None:
        """A tensor's dimensions; None if they could not be inferred."""
        if isinstance(value, gs.Constant):
            return tuple(int(n) for n in value.shape)
        return self.shapes.get(id(value))

    def kind(self, value: gs.Tensor) -> int | None:
        """A tensor's ONNX element type; None if it could not be inferred."""
        if isinstance(value, gs.Constant):
            return int(helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype)))
        return self.kinds.get(id(value))


def measure(view: View, inputs: Mapping[str, Shape]) -> Shapes:
    """Walks a graph.

    Args:
        view: its nodes in topological order.
        inputs: the shape of every input.

    Raises:
        Conflict: a node cannot run at these sizes; the message names it.
    """
    result = Shapes(inputs)
    kinds = {i.name: i.type.tensor_type.elem_type for i in view.file.skeleton.graph.input}
    for value in view.graph.inputs:
        result.shapes[id(value)] = tuple(inputs[value.name])
        result.kinds[id(value)] = kinds[value.name]
    versions = {o.domain: o.version for o in view.file.skeleton.opset_import}
    for node in view.graph.nodes:
        _infer(view, node, result, versions)
    return result


def _infer(view: View, node: gs.Node, result: Shapes, versions: Mapping[str, int]) -> None:
    known = [_elements(node, i, result) for i in range(len(node.inputs))]
    _compute(node, known, result)
    domain = "" if node.domain in (None, "ai.onnx") else node.domain
    version = versions.get(domain) or versions.get("ai.onnx", 0)
    if not defs.has(node.op, version, domain):
        return
    types = {}
    for value in node.inputs:
        if value.name == "":
            continue
        kind, shape = result.kind(value), result.of(value)
        if kind is None:
            return  # a sequence, or behind an operator without inference
        types[value.name] = helper.make_tensor_type_proto(kind, shape)
    data = {
        value.name: _tensor(elements, result.kind(value))
        for value, elements in zip(node.inputs, known, strict=True)
        if elements is not None and value.name
    }
    if node.op in ("GreaterOrEqual", "LessOrEqual"):  # below opset 16 they come without inference
        known_shapes = [result.of(t) for t in node.inputs]
        if all(shape is not None for shape in known_shapes):
            broadcast = np.broadcast_shapes(*(shape or () for shape in known_shapes))
            result.shapes[id(node.outputs[0])] = broadcast
        result.kinds[id(node.outputs[0])] = onnx.TensorProto.BOOL
        return
    if node.op in ("SplitToSequence", "SequenceAt") and node.inputs[0].name in types:
        _record_part(node, known, result)
        return
    schema = defs.get_schema(node.op, version, domain)
    try:
        outputs = _outputs(schema, _proto(view, node), types, data)
    except _REFUSALS as error:
        reason = str(error).strip().splitlines()[-1]
        raise Conflict(f"node {node.name!r} ({node.op}): {reason}") from None
    for value in node.outputs:
        if value.name in outputs:
            _record(value, outputs[value.name], result)


def _outputs(
    schema: defs.OpSchema,
    node: onnx.NodeProto,
    types: dict[str, TypeProto],
    data: dict[str, onnx.TensorProto],
) -> dict[str, TypeProto]:
    """A node's outputs by ONNX's inference.

    Exporters write bfloat16 for operators that take it from a later opset on (Conv: 22). Their
    shapes are those of float32, so it stands in where inference refuses.
    """
    try:
        return dict(shape_inference.infer_node_outputs(schema, node, types, data))
    except _REFUSALS:
        if all(kind.tensor_type.elem_type != _BFLOAT16 for kind in types.values()):
            raise
    wide = {name: _retyped(kind, _BFLOAT16, _FLOAT) for name, kind in types.items()}
    found = shape_inference.infer_node_outputs(schema, node, wide, data)
    return {name: _retyped(kind, _FLOAT, _BFLOAT16) for name, kind in found.items()}


def _retyped(kind: TypeProto, old: int, new: int) -> TypeProto:
    result = TypeProto()
    result.CopyFrom(kind)
    if result.tensor_type.elem_type == old:
        result.tensor_type.elem_type = new
    return result


def _compute(node: gs.Node, known: list[Elements | None], result: Shapes) -> None:
    values = None
    if node.op == "Shape":
        shape = result.of(node.inputs[0])
        if shape is not None:
            values = shape_values.from_shape(node, shape, shape)
    else:
        values = evaluate(node, known)
    if values is not None and node.outputs and values.size <= shape_values.MOST_ELEMENTS:
        result._elements[id(node.outputs[0])] = values


def _elements(node: gs.Node, slot: int, result: Shapes) -> Elements | None:
    value = node.inputs[slot]
    if isinstance(value, gs.Constant):
        return shape_values.from_constant(value, node, slot)
    return result._elements.get(id(value))


def _tensor(elements: Elements, kind: int | None) -> onnx.TensorProto:
    dtype = helper.tensor_dtype_to_np_dtype(kind or onnx.TensorProto.INT64)
    numbers = [e.before for e in elements_of(elements)]
    return numpy_helper.from_array(np.array(numbers).astype(dtype).reshape(elements.shape))


def _proto(view: View, node: gs.Node) -> onnx.NodeProto:
    original: onnx.NodeProto = view.file.skeleton.graph.node[view.origin[id(node)]]
    names = [t.name for t in node.inputs]
    if names == list(original.input):
        return original
    proto = onnx.NodeProto()  # a mask that masks nothing was dropped
    proto.CopyFrom(original)
    del proto.input[:]
    proto.input.extend(names)
    return proto


def _record(value: gs.Tensor, inferred: TypeProto, result: Shapes) -> None:
    if not inferred.HasField("tensor_type"):
        return
    kind = inferred.tensor_type
    result.kinds[id(value)] = kind.elem_type
    if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
        result.shapes[id(value)] = tuple(d.dim_value for d in kind.shape.dim)
    elif id(value) in result._elements:
        result.shapes[id(value)] = result._elements[id(value)].shape


def _record_part(node: gs.Node, known: list[Elements | None], result: Shapes) -> None:
    """A sequence of equal parts is known by the dimensions of one; inference knows none."""
    source, out = node.inputs[0], node.outputs[0]
    shape = result.of(source)
    if shape is None:
        return
    if node.op == "SplitToSequence":
        axis = int(node.attrs.get("axis", 0))
        size = elements_of(known[1])[0].before if len(known) > 1 and known[1] is not None else 1
        shape = tuple(int(size) if k == axis % len(shape) else n for k, n in enumerate(shape))
    result.shapes[id(out)] = shape
    kind = result.kind(source)
    if kind is not None:
        result.kinds[id(out)] = kind
