"""Places in a tensor that depend on the batch, counted on the card: what ScatterND writes to.

Two kernels a graph: Range counts the images, Where puts their numbers beside the constant rest. The
length of the Range is a Shape node, whose result ONNX Runtime keeps where Range wants it, in the
host's memory; nothing else may read it, or that node would go to the CPU.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft_export.graph.document import Editor


def image_places(editor: Editor, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> gs.Tensor:
    """(image, row, column) of each element: int64 (B, R, k, 3); layers share it.

    Args:
        editor: of the graph.
        rows: (R,), positions on the second axis.
        columns: (k,), positions on the third.
    """
    stem = f"regraft.cuda.places.{rows[0]}.{len(rows)}.{columns[0]}.{len(columns)}"
    known = editor.graph.tensors().get(f"{stem}.out")
    if isinstance(known, gs.Variable):
        return known
    base = np.zeros((1, len(rows), len(columns), 3), np.int64)
    base[..., 1], base[..., 2] = rows[:, None], columns
    image = np.array([True, False, False]).reshape(1, 1, 1, 3)
    return editor.node(
        "Where",
        stem,
        [
            editor.constant(f"{stem}.image", image),
            _image_numbers(editor),
            editor.constant(f"{stem}.base", base),
        ],
        dtype=np.int64,
    )


def for_every_image(editor: Editor, stem: str, value: gs.Constant, like: gs.Tensor) -> gs.Tensor:
    """A constant (1, R, k) as (B, R, k), the first three axes of ``like``."""
    attrs = {"start": 0, "end": 3}
    shape = editor.node("Shape", f"{stem}.shape", [like], attrs, dtype=np.int64)
    return editor.node("Expand", stem, [value, shape])


def _image_numbers(editor: Editor) -> gs.Tensor:
    """0, 1, 2, ... for the images of the batch: int64 (B, 1, 1, 1)."""
    stem = "regraft.cuda.images"
    known = editor.graph.tensors().get(f"{stem}.out")
    if isinstance(known, gs.Variable):
        return known
    pixels, attrs = editor.graph.inputs[0], {"start": 0, "end": 1}
    count = editor.node("Shape", f"{stem}.count", [pixels], attrs, dtype=np.int64)
    zero, one = (
        editor.constant(f"{stem}.{name}", np.array(number, np.int64))
        for name, number in (("zero", 0), ("one", 1))
    )
    # One element is scalar enough for Range; a Reshape of it would be a node on the CPU.
    numbers = editor.node("Range", f"{stem}.range", [zero, count, one])
    column = editor.constant(f"{stem}.column", np.array([-1, 1, 1, 1], np.int64))
    return editor.node("Reshape", stem, [numbers, column])
