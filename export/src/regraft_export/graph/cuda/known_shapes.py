"""Rewrite: shapes that a graph computes, though all but the batch is known, become constants.

ONNX Runtime computes shapes on the CPU, which ``ort-cuda`` does not allow. Every tensor's shape is
known here for each number of images, and some numbers show what depends on it::

    x -> Shape -> Slice, Concat -> Reshape's target         becomes a constant, with -1 for images
    c -> Tile or Expand to the number of images             becomes c -> Expand (Shape (images))

with images (B, 1, 1), cut from the pixels; a Shape that only Expand reads stays beside the card.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft_export.graph.cuda.inferred_shapes import Shapes
from regraft_export.graph.cuda.layout import compute, is_neutral
from regraft_export.graph.document import Editor

BATCHES = (2, 3, 67)  # numbers of images; far apart, for what rounds
_ARITHMETIC = (
    *("Shape", "Slice", "Concat", "Gather", "Cast", "Squeeze", "Unsqueeze", "Reshape"),
    *("Add", "Sub", "Mul", "Div", "Identity"),
)


def fix_shapes(graph: gs.Graph, shapes_for: Callable[[int], Shapes]) -> int:
    """Rewrites every target of a Reshape, and every repetition of a constant for each image.

    Args:
        graph: changed in place.
        shapes_for: called with each of :data:`BATCHES` if there is anything to fix: tensor name ->
            shape, as far as known; a length that is not known is a string.

    Returns:
        How many nodes were given a constant.
    """
    graph.toposort()
    shapes, done = cache(shapes_for), 0
    for node in list(graph.nodes):
        if node.op not in ("Reshape", "Tile", "Expand") or isinstance(node.inputs[1], gs.Constant):
            continue
        nodes = _computation(node.inputs[1])
        if nodes is None:
            continue
        found = [_value(graph, node.inputs[1], nodes, shapes(batch)) for batch in BATCHES]
        if any(value is None for value in found):
            continue
        values = [np.asarray(value, np.int64).reshape(-1) for value in found]
        if len({len(value) for value in values}) != 1:
            continue
        differs = np.flatnonzero(np.ptp(values, axis=0))
        if node.op == "Reshape" and len(differs) <= 1 and not any(-1 in v[differs] for v in values):
            target = values[0].copy()
            target[differs] = -1
            if (target == -1).sum() <= 1:
                node.inputs[1] = Editor(graph).constant(f"{node.name}.known", target)
                done += 1
        elif node.op != "Reshape" and _once_an_image(node, values, shapes):
            node.op = "Expand"
            node.inputs[1] = images_shape(graph)
            done += 1
    graph.cleanup().toposort()
    return done


def _computation(target: gs.Tensor) -> list[gs.Node] | None:
    """The nodes that compute a shape from shapes alone; None if it depends on more.

    It ends at Shape nodes: what is behind them is the model, and large.
    """
    found: dict[int, gs.Node] = {}
    waiting = list(target.inputs)
    while waiting:
        node = waiting.pop()
        if id(node) in found:
            continue
        # Neutral nodes would be left out of the computation.
        if node.op not in _ARITHMETIC or node.domain or is_neutral(node):
            return None
        found[id(node)] = node
        if node.op != "Shape":
            waiting += [maker for tensor in node.inputs for maker in tensor.inputs]
            if any(isinstance(t, gs.Variable) and not t.inputs for t in node.inputs):
                return None
    return list(found.values()) if any(n.op == "Shape" for n in found.values()) else None


def _value(
    graph: gs.Graph, target: gs.Tensor, nodes: list[gs.Node], shapes: Shapes
) -> NDArray[np.generic] | None:
    """A shape's value for these shapes, as far as they are known."""
    sources = [n for n in nodes if n.op == "Shape"]
    given: dict[str, NDArray[np.generic]] = {}
    for source in sources:
        value = source.inputs[0]
        lengths = shapes.get(value.name, ())
        if not lengths or not all(type(n) is int and n > 0 for n in lengths):
            return None
        given[value.name] = np.zeros([int(str(n)) for n in lengths], np.float32)
    return compute(graph, nodes, target, given)


def _once_an_image(
    node: gs.Node, values: list[NDArray[np.int64]], shapes: Callable[[int], Shapes]
) -> bool:
    """Whether (B, 1, 1) repeats one row for each image; Tile would multiply more rows."""
    if [value.tolist() for value in values] != [[images, 1, 1] for images in BATCHES]:
        return False
    row = node.inputs[0]
    known = row.values.shape if isinstance(row, gs.Constant) else shapes(BATCHES[0]).get(row.name)
    return node.op == "Expand" or (known is not None and len(known) == 3 and known[0] == 1)


def images_shape(graph: gs.Graph) -> gs.Variable:
    """The shape (B, 1, 1), where Expand wants it."""
    stem = "regraft.cuda.one_for_each_image"
    known = graph.tensors().get(f"{stem}.shape.out")
    if isinstance(known, gs.Variable):
        return known
    editor, pixels = Editor(graph), graph.inputs[0]
    numbers = {"from": [0, 0, 0], "to": [1, 1, 1], "axes": [1, 2, 3]}
    bounds = [
        editor.constant(f"{stem}.{name}", np.array(value, np.int64))
        for name, value in numbers.items()
    ]
    cut = editor.node("Slice", f"{stem}.cut", [pixels, *bounds])
    flat = editor.constant(f"{stem}.flat", np.array([-1, 1, 1], np.int64))
    one = editor.node("Reshape", stem, [cut, flat])
    return editor.node("Shape", f"{stem}.shape", [one], dtype=np.int64)
