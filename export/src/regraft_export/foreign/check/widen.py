"""float16 and bfloat16 become float32 in what a node says."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

NARROW = frozenset([TensorProto.FLOAT16, TensorProto.BFLOAT16])
_TYPE_ATTRIBUTES = frozenset(["to", "dtype", "stash_type", "softmax_precision"])


def widen_node(node: onnx.NodeProto) -> None:
    """Makes float16 and bfloat16 float32 in what a node says of types, and in its tensors."""
    for attribute in node.attribute:
        if attribute.name in _TYPE_ATTRIBUTES and attribute.i in NARROW:
            attribute.i = TensorProto.FLOAT
        if attribute.HasField("t") and attribute.t.data_type in NARROW:
            _widen_tensor(attribute.t)
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            for inner in graph.node:
                widen_node(inner)
            for tensor in graph.initializer:
                if tensor.data_type in NARROW:
                    _widen_tensor(tensor)


def _widen_tensor(tensor: TensorProto) -> None:
    values = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
