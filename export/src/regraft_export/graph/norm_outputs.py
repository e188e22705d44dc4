"""Rewrite: the norm of every token of a block's raw output becomes an output, for probes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from regraft_export.graph.document import Editor


def token_norms(graph: gs.Graph, hidden: gs.Variable, layer: int) -> gs.Variable:
    """L2 norms over the width, (B, T) or (B, T + R) float32.

    The sum of squares is taken in float32: in fp16 a norm of 256 would overflow it.
    """
    editor, stem = Editor(graph), f"regraft.norm.{layer}"
    if hidden.dtype != np.float32:  # or unknown, in a file that does not record it
        hidden = editor.node("Cast", f"{stem}.cast", [hidden], {"to": 1}, dtype=np.float32)
    return editor.reduce("ReduceL2", stem, hidden, [2], keepdims=False)
