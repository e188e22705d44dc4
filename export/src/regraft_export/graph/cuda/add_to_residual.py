"""Rewrite: what the registers receive is added to the residual stream, in place.

The portable form adds ``v W[N]`` to the registers' rows of the down-projection's output, which
takes a pass over (B, T, D) and keeps the bias of the product out of SkipLayerNormalization. But the
output is only added to the residual, which nobody else reads any more by then. So::

    product -> Add bias -> Add (row * onehot) -> Add residual
    product -> Add bias -> Add (residual -> ScatterND row on (register, d))

ScatterND adds into its own input where that has no later reader, so that only (B, R, D) numbers are
touched. It is given every element's place: its kernel walks through whatever one place holds with a
single thread. With ``value = constant`` the row is a constant. In bf16, for which CUDA has no such
kernel, and where the residual has another reader, the other forms stay.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft_export.graph.cuda.image_places import for_every_image, image_places
from regraft_export.graph.cuda.register_write import constant_writes, register_writes
from regraft_export.graph.document import Editor, consumers


def add_to_residual(
    graph: gs.Graph,
    tokens: int,
    width: int,
    shapes: Mapping[str, tuple[object, ...]],
    *,
    constants: bool,
) -> int:
    """Rewrites every such place.

    Args:
        graph: changed in place.
        tokens: T + R.
        width: D.
        shapes: tensor name -> shape; what is added must be known to be one row an image.
        constants: whether rows that ``value = constant`` left are rewritten, too.

    Returns:
        How many were rewritten.
    """
    done = 0
    for write in list(register_writes(graph)):
        residual = residual_behind(graph, write.add)
        one_row = tuple(shapes.get(write.row.name, ())[1:]) == (1, width)
        if residual is None or not one_row or write.dtype.name == "bfloat16":
            continue
        editor, stem = Editor(graph), f"{write.add.name}.residual"
        value = write.row
        if len(write.scales) > 1 or write.scales[0] != 1:
            scales = write.scales[None, :, None].astype(write.dtype)
            factor = editor.constant(f"{stem}.by", scales)
            value = editor.node("Mul", f"{stem}.scales", [value, factor])
        _scatter(editor, stem, residual, value, write.first + np.arange(len(write.scales)), width)
        bypass(write.add, write.alone)
        done += 1
    for constant in list(constant_writes(graph)) if constants else []:
        residual = residual_behind(graph, constant.add)
        dtype = next(t for t in constant.add.inputs if isinstance(t, gs.Constant)).values.dtype
        if residual is None or dtype.name == "bfloat16":
            continue
        editor, stem = Editor(graph), f"{constant.add.name}.residual"
        rows = constant.first + np.arange(len(constant.rows))
        own = editor.constant(f"{stem}.row", constant.rows[None].astype(dtype))
        places = image_places(editor, rows, np.arange(width))
        value = for_every_image(editor, f"{stem}.rows", own, places)
        _scatter(editor, stem, residual, value, rows, width)
        bias = editor.constant(f"{stem}.bias", constant.bias.astype(dtype))
        constant.add.inputs = [constant.product, bias]
        done += 1
    for node in graph.nodes:
        if node.name.endswith(".residual") and node.op == "ScatterND":
            node.outputs[0].shape = ["batch", tokens, width]
    return done


def residual_behind(graph: gs.Graph, add: gs.Node) -> tuple[gs.Node, int] | None:
    """The Add of the residual behind a sum, and in which slot the residual enters it.

    None where the sum is read elsewhere, or the residual by more than that and a norm.
    """
    y = add.outputs[0]
    readers = consumers(y)
    if len(readers) != 1 or readers[0].op != "Add" or any(y is t for t in graph.outputs):
        return None
    slot = next((i for i, t in enumerate(readers[0].inputs) if t is not y), None)
    if slot is None or not isinstance(readers[0].inputs[slot], gs.Variable):
        return None
    residual = readers[0].inputs[slot]
    others = [n for n in consumers(residual) if n is not readers[0]]
    # The norm in front of the MLP reads it, too, and becomes one node with what computes it.
    left = not residual.inputs or any(residual is t for t in graph.outputs)
    if left or any(n.op != "LayerNormalization" for n in others):
        return None
    return readers[0], slot


def _scatter(
    editor: Editor,
    stem: str,
    residual: tuple[gs.Node, int],
    value: gs.Tensor,
    rows: NDArray[np.int64],
    width: int,
) -> None:
    add, slot = residual
    places = image_places(editor, rows, np.arange(width))
    attrs = {"reduction": "add"}
    add.inputs[slot] = editor.node("ScatterND", stem, [add.inputs[slot], places, value], attrs)


def bypass(add: gs.Node, alone: gs.Variable) -> None:
    """Whoever read the sum reads what was added to."""
    y = add.outputs[0]
    for node in consumers(y):
        node.inputs = [alone if t is y else t for t in node.inputs]
    add.inputs, add.outputs = [], []
