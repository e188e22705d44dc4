"""Rewrite: the registers receive their values as hidden units of their own, with no pass at all.

The portable form adds ``v W[N]`` to the registers' rows of the down-projection's output. Here the
MLP gets k more hidden units whose incoming weights are zero (so that they are f(0) = 0 on every
token) and whose outgoing weights are W[N]; ``v`` is written into them on the registers alone::

    x -> MatMul (D, m + k) -> Add -> f -> h -> Gather, max -> v
                                          h -> ScatterND v on (register, m..m+k) -> MatMul -> Add

With ``value = constant`` every register has one unit, written with 1, whose outgoing weights are
the register's row. ONNX Runtime's ScatterND may write in place, and h has no later reader, so only
(B, R, k) numbers are touched; the two products grow by 64 in m.

For activations with f(0) = 0 directly behind one product: GELU (both forms), ReLU, x sigmoid(c x).
A gated MLP keeps the portable form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft_export.graph.cuda.drop_key_bias import biased_product
from regraft_export.graph.cuda.image_places import for_every_image, image_places
from regraft_export.graph.cuda.register_write import (
    ConstantWrite,
    RegisterWrite,
    constant_writes,
    register_writes,
)
from regraft_export.graph.document import Editor, consumers, maker

MULTIPLE = 64  # of widths that products like; k is filled up to it


@dataclass(frozen=True)
class _Mlp:
    """The nodes of one MLP: up, its bias, down; h between them."""

    up: gs.Node
    up_add: gs.Node
    hidden: gs.Variable
    down: gs.Node


def widen_hidden(graph: gs.Graph, tokens: int) -> int:
    """Rewrites every touched MLP that has the form.

    Args:
        graph: changed in place.
        tokens: T + R.

    Returns:
        How many were rewritten.
    """
    done = 0
    for write in list(register_writes(graph)):
        done += _widen_measured(graph, write)
    for constant in list(constant_writes(graph)):
        done += _widen_constant(graph, constant)
    for node in [n for n in graph.nodes if n.op == "ScatterND"]:
        for product in (n for n in consumers(node.outputs[0]) if n.op == "MatMul"):
            shape = ["batch", tokens, product.inputs[1].values.shape[0]]
            node.inputs[0].shape = node.outputs[0].shape = shape
    return done


def _widen_measured(graph: gs.Graph, write: RegisterWrite) -> bool:
    made_by = maker(write.row)
    if made_by is None or made_by.op != "MatMul" or not isinstance(made_by.inputs[1], gs.Constant):
        return False
    lone = maker(write.alone)
    if lone is not None and lone.op == "Add":
        biased = biased_product(write.alone)
        lone = biased[0].inputs[0] if biased else None
    if lone is None or (mlp := _mlp(lone)) is None:
        return False
    editor, stem = Editor(graph), f"{lone.name}.wide"
    value, rows = made_by.inputs[0], made_by.inputs[1].values
    if len(write.scales) > 1 or write.scales[0] != 1:
        scales = write.scales[None, :, None].astype(write.dtype)
        value = editor.node("Mul", f"{stem}.scales", [value, editor.constant(f"{stem}.by", scales)])
    registers, (k, _) = len(write.scales), rows.shape
    m = _grow(editor, stem, mlp, rows)
    places = _places(editor, write.first, registers, m, k)
    mlp.down.inputs[0] = editor.node("ScatterND", f"{stem}.write", [mlp.hidden, places, value])
    y, made_by = write.add.outputs[0], write.alone.inputs[0]
    write.add.outputs, made_by.outputs = [], [y]
    return True


def _widen_constant(graph: gs.Graph, write: ConstantWrite) -> bool:
    lone = maker(write.product)
    if lone is None or lone.op != "MatMul" or (mlp := _mlp(lone, alone=True)) is None:
        return False
    editor, stem = Editor(graph), f"{lone.name}.wide"
    dtype = lone.inputs[1].values.dtype
    registers = len(write.rows)
    m = _grow(editor, stem, mlp, write.rows.astype(dtype))
    places = _places(editor, write.first, registers, m, registers)
    own = editor.constant(f"{stem}.own", np.eye(registers, dtype=dtype)[None])
    value = for_every_image(editor, f"{stem}.value", own, places)
    mlp.down.inputs[0] = editor.node("ScatterND", f"{stem}.write", [mlp.hidden, places, value])
    bias = editor.constant(f"{stem}.bias", write.bias.astype(dtype))
    write.add.inputs = [write.product, bias]
    return True


def _mlp(down: gs.Node, *, alone: bool = False) -> _Mlp | None:
    """The MLP of a down-projection; ``alone`` if nothing else reads its hidden units."""
    if down.op != "MatMul" or not isinstance(down.inputs[1], gs.Constant):
        return None
    hidden = down.inputs[0]
    before = _before_activation(hidden)
    if before is None or (biased := biased_product(before)) is None:
        return None
    readers = {n.op for n in consumers(hidden) if n is not down}
    if readers != (set() if alone else {"Gather"}):
        return None
    if len(consumers(biased[0])) != 1:
        return None
    return _Mlp(biased[0].inputs[0], before.inputs[0], hidden, down)


def _before_activation(hidden: gs.Variable) -> gs.Variable | None:
    """The input of an elementwise activation with f(0) = 0."""
    node = maker(hidden)
    if node is None:
        return None
    if node.op in ("Gelu", "Relu"):
        return node.inputs[0]
    if node.op != "Mul":
        return None
    for x, gate in (node.inputs, reversed(node.inputs)):
        sigmoid = gate.inputs[0] if gate.inputs and gate.inputs[0].op == "Sigmoid" else None
        if sigmoid is None:
            continue
        inner = sigmoid.inputs[0]
        scaled = inner.inputs[0] if inner.inputs and inner.inputs[0].op == "Mul" else None
        if inner is x or (scaled is not None and any(t is x for t in scaled.inputs)):
            return x
    return None


def _grow(editor: Editor, stem: str, mlp: _Mlp, rows: NDArray[np.generic]) -> int:
    """Gives the MLP one more unit for each row; returns the first one's index."""
    m, more = mlp.down.inputs[1].values.shape[0], -(-len(rows) // MULTIPLE) * MULTIPLE
    bias = next(i for i, t in enumerate(mlp.up_add.inputs) if isinstance(t, gs.Constant))
    filled = np.pad(rows, ((0, more - len(rows)), (0, 0)))
    for node, slot, values in (
        (mlp.up, 1, np.pad(mlp.up.inputs[1].values, ((0, 0), (0, more)))),
        (mlp.up_add, bias, np.pad(mlp.up_add.inputs[bias].values, (0, more))),
        (mlp.down, 1, np.concatenate([mlp.down.inputs[1].values, filled])),
    ):
        node.inputs[slot] = editor.constant(f"{stem}.weights", values)
    return int(m)


def _places(editor: Editor, first: int, registers: int, m: int, k: int) -> gs.Tensor:
    """Where the registers' new units are: (B, R, k, 3)."""
    return image_places(editor, first + np.arange(registers), m + np.arange(k))
