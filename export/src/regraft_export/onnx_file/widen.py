"""The float32 twin of a bfloat16 model, to run where bfloat16 has no kernels (any CPU)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

_NARROW, _WIDE = TensorProto.BFLOAT16, TensorProto.FLOAT
_KINDS = ("to", "dtype")  # attributes that hold an element type


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every bfloat16 number is a float32; rounding between nodes is gone.

    Args:
        model: initializers without values (they lie elsewhere) change their type alone.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    for graph in (twin.graph, *_inner(twin)):
        for tensor in graph.initializer:
            _widen(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == _NARROW:
                value.type.tensor_type.elem_type = _WIDE
    for attribute in _attributes(twin):
        if attribute.type == AttributeProto.TENSOR:
            _widen(attribute.t)
        elif attribute.name in _KINDS and attribute.i == _NARROW:
            attribute.i = _WIDE
    return twin


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type != _NARROW:
        return
    if tensor.raw_data or tensor.int32_data:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    else:
        tensor.data_type = _WIDE


def _attributes(model: onnx.ModelProto) -> Iterator[AttributeProto]:
    """Of every node, in functions and subgraphs too."""
    pending = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    while pending:
        for attribute in pending.pop().attribute:
            yield attribute
            for graph in (attribute.g, *attribute.graphs):
                pending += graph.node


def _inner(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside nodes."""
    for attribute in _attributes(model):
        yield from (g for g in (attribute.g, *attribute.graphs) if g.node)
