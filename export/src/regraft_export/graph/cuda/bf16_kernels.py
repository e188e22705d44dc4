"""Rewrite: operators without a bf16 kernel on CUDA compute in float32, between two Casts.

ONNX Runtime 1.31 has no bf16 kernel for Pad, ReduceMax, ReduceMin and ReduceL2 on CUDA, and would
run them on the CPU; before opset 24 ONNX has no TopK of bf16. All five only choose or pad values,
or are asked for in float32 anyway.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from regraft_export.graph.document import Editor, dtype_of

WITHOUT = ("Pad", "ReduceMax", "ReduceMin", "ReduceL2", "TopK")


def float32_for_missing_kernels(graph: gs.Graph) -> int:
    """Puts Casts around every such node of a bf16 tensor; returns around how many."""
    found = [n for n in graph.nodes if n.op in WITHOUT and _bf16(n.inputs[0])]
    for node in found:
        editor, kind = Editor(graph), node.inputs[0].dtype
        wide = editor.node(
            "Cast", f"{node.name}.wide", [node.inputs[0]], {"to": 1}, dtype=np.float32
        )
        node.inputs[0] = wide
        result = node.outputs[0]
        inner = gs.Variable(editor.names.new(f"{node.name}.float32"), dtype=np.float32)
        node.outputs[0] = inner
        to = {"to": int(onnx.TensorProto.BFLOAT16)}
        editor.node("Cast", f"{node.name}.narrow", [inner], to, dtype=kind)
        editor.added[-1].outputs = [result]
    return len(found)


def _bf16(value: gs.Tensor) -> bool:
    return value.dtype is not None and dtype_of(value).name == "bfloat16"
