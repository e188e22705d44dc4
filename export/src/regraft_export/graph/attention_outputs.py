"""Rewrite: the attention of chosen blocks becomes an output; the other blocks are left alone.

Attention is taken from the block's softmax (B, heads, T, T). CLS is the query; in a model without
a class token the probe takes the mean over the patches' queries instead.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from regraft.tokens import TokenLayout
from regraft_export.graph.document import Editor


def cls_to_patches(
    graph: gs.Graph, probabilities: gs.Variable, layout: TokenLayout, layer: int
) -> gs.Variable:
    """CLS attention to the patches, (B, heads, rows, cols)."""
    editor, stem = Editor(graph), f"regraft.attention.{layer}"
    row = _slice(editor, stem, probabilities, [0, layout.prefix], [1, layout.count], [2, 3])
    shape = np.array([-1, layout.heads, *layout.grid], dtype=np.int64)
    return editor.node("Reshape", f"{stem}.grid", [row, editor.constant(f"{stem}.shape", shape)])


def to_every_token(
    graph: gs.Graph, probabilities: gs.Variable, layout: TokenLayout, layer: int
) -> gs.Variable:
    """Attention to every token, registers included, (B, heads, T + R): for probes."""
    editor, stem = Editor(graph), f"regraft.attention.{layer}"
    if layout.class_token:
        axis = editor.constant(f"{stem}.query_axis", np.array([2], dtype=np.int64))
        row = _slice(editor, stem, probabilities, [0], [1], [2])
        return editor.node("Squeeze", f"{stem}.all", [row, axis])
    rows = _slice(editor, stem, probabilities, [layout.prefix], [layout.count], [2])
    return editor.reduce("ReduceMean", f"{stem}.all", rows, [2], keepdims=False)


def _slice(
    editor: Editor,
    stem: str,
    value: gs.Variable,
    starts: list[int],
    ends: list[int],
    axes: list[int],
) -> gs.Variable:
    bounds = [
        editor.constant(f"{stem}.{what}", np.array(numbers, dtype=np.int64))
        for what, numbers in (("starts", starts), ("ends", ends), ("axes", axes))
    ]
    return editor.node("Slice", f"{stem}.query", [value, *bounds])
