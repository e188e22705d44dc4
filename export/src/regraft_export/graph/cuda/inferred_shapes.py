"""Shapes of all tensors of a graph, as far as ONNX's inference finds them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

_LARGE = 1024  # bytes of a weight from which on its values cannot be a shape
Dims = tuple[object, ...]
Shapes = Mapping[str, Dims]


def inferred_shapes(model: onnx.ModelProto, images: int | None = None) -> dict[str, Dims]:
    """Tensor name -> shape; a length that is not known is a string.

    Args:
        model: of any size: its weights are neither copied nor serialised.
        images: the first length of the first input; None for whatever it is.
    """
    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.graph.name = model.graph.name
    for kind in ("node", "input", "output", "value_info"):
        getattr(bare.graph, kind).extend(getattr(model.graph, kind))
    for weight in model.graph.initializer:
        bare.graph.initializer.append(weight if len(weight.raw_data) <= _LARGE else _unread(weight))
    if images is not None:
        bare.graph.input[0].type.tensor_type.shape.dim[0].dim_value = images
    graph = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    known = [*graph.value_info, *graph.input, *graph.output]
    return {value.name: _dims(value) for value in known if value.type.tensor_type.HasField("shape")}


def _unread(weight: onnx.TensorProto) -> onnx.TensorProto:
    """The same without its values."""
    bare = onnx.TensorProto(name=weight.name, data_type=weight.data_type, dims=weight.dims)
    bare.data_location = onnx.TensorProto.EXTERNAL
    entry = bare.external_data.add()
    entry.key, entry.value = "location", "unread"
    return bare


def _dims(value: onnx.ValueInfoProto) -> Dims:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims)
