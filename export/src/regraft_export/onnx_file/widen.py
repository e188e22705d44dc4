"""Narrow floating-point types become float32: in a node, or in a whole model.

The float32 twin of a bfloat16 model runs where bfloat16 has no kernels (any CPU); with float16
widened too, a check sees errors that rounding would hide.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

BFLOAT16 = frozenset([TensorProto.BFLOAT16])
NARROW = frozenset([TensorProto.FLOAT16, TensorProto.BFLOAT16])
_WIDE = TensorProto.FLOAT
# Attributes that hold an element type.
_KINDS = frozenset(["to", "dtype", "stash_type", "softmax_precision"])


def widened(model: onnx.ModelProto, kinds: Collection[int] = BFLOAT16) -> onnx.ModelProto:
    """A copy in which numbers of some types are float32; rounding between nodes is gone.

    Args:
        model: initializers without values (they lie elsewhere) change their type alone.
        kinds: ONNX element types.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    _widen_graph(twin.graph, kinds)
    widen_nodes((node for function in twin.functions for node in function.node), kinds)
    return twin


def widen_nodes(nodes: Iterable[onnx.NodeProto], kinds: Collection[int]) -> None:
    """Changes what nodes say of types, and the tensors and graphs inside them, in place."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in _KINDS and attribute.i in kinds:
                attribute.i = _WIDE
            for tensor in ([attribute.t] if attribute.HasField("t") else []) + [*attribute.tensors]:
                _widen_tensor(tensor, kinds)
            for graph in ([attribute.g] if attribute.HasField("g") else []) + [*attribute.graphs]:
                _widen_graph(graph, kinds)


def _widen_graph(graph: onnx.GraphProto, kinds: Collection[int]) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor, kinds)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in kinds:
            value.type.tensor_type.elem_type = _WIDE
    widen_nodes(graph.node, kinds)


def _widen_tensor(tensor: TensorProto, kinds: Collection[int]) -> None:
    if tensor.data_type not in kinds:
        return
    if tensor.raw_data or tensor.int32_data:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    else:
        tensor.data_type = _WIDE
