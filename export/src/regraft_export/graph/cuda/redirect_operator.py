"""Rewrite: a touched layer's redirect is one node of regraft's own, instead of four.

ONNX has no operator that takes some columns, their largest values, a product and one row; each of
the four kernels costs more by being started than by what it does::

    hidden -> Gather -> Mul signs -> ReduceMax -> MatMul rows -> Mul onehot -> Add -> Add residual
    residual -> AddRedirected (hidden, residual, neurons, signs, rows)             -> Add residual

and, with ``value = constant``, whose rows are a bias (T + R, D), ``residual -> AddRow``. Sources:
``regraft/engines/ort_cuda/operators`` of the runtime. One register of factor 1 at the end, D a
multiple of 8, and at most 128 neurons a layer; other redirects keep their nodes.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.add_to_residual import bypass, residual_behind
from regraft_export.graph.cuda.register_write import (
    RegisterWrite,
    constant_writes,
    register_writes,
)
from regraft_export.graph.document import Editor, maker

DOMAIN = "regraft"
MOST_NEURONS = 128  # of a layer: they travel with the kernel's call
MULTIPLE = 8  # values that a thread reads at once
# Names of the operators end in what their tensors are.
SUFFIXES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def operator(name: str, weight: gs.Constant) -> str:
    """The operator for tensors of a weight's dtype."""
    return f"{name}_{SUFFIXES[weight.values.dtype.name]}"


def redirect_by_operator(graph: gs.Graph, tokens: int, width: int) -> int:
    """Rewrites every such place.

    Args:
        graph: changed in place.
        tokens: T + R.
        width: D.

    Returns:
        How many were rewritten.
    """
    done = 0
    if width % MULTIPLE:
        return 0
    shape: list[int | str] = ["batch", tokens, width]
    for write in list(register_writes(graph)):
        residual, found = residual_behind(graph, write.add), _strongest(graph, write)
        last = write.first == tokens - 1 and write.scales.tolist() == [1.0]
        if residual is None or found is None or not last:
            continue
        add, slot = residual
        hidden, *constants = found
        inputs = [hidden, add.inputs[slot], *constants]
        _put(graph, residual, "AddRedirected", f"{write.add.name}.operator", inputs, shape)
        bypass(write.add, write.alone)
        done += 1
    for constant in list(constant_writes(graph)):
        residual = residual_behind(graph, constant.add)
        if residual is None or constant.first != tokens - 1:
            continue
        old = next(t for t in constant.add.inputs if isinstance(t, gs.Constant))
        dtype = old.values.dtype
        editor, stem = Editor(graph), f"{constant.add.name}.operator"
        row = editor.constant(f"{stem}.row", constant.rows[0].astype(dtype))
        add, slot = residual
        _put(graph, residual, "AddRow", stem, [add.inputs[slot], row], shape)
        bias = editor.constant(f"{stem}.bias", constant.bias.astype(dtype))
        constant.add.inputs = [constant.product, bias]
        done += 1
    return done


def _put(
    graph: gs.Graph,
    residual: tuple[gs.Node, int],
    name: str,
    stem: str,
    inputs: list[gs.Tensor],
    shape: list[int | str],
) -> None:
    """What the residual's Add reads in the residual's slot is what the operator made of it."""
    add, slot = residual
    dtype = add.inputs[slot].dtype or inputs[-1].values.dtype
    node = Editor(graph).node(operator(name, inputs[-1]), stem, inputs, dtype=dtype, domain=DOMAIN)
    node.shape = shape
    add.inputs[slot] = node


def _strongest(graph: gs.Graph, write: RegisterWrite) -> list[gs.Tensor] | None:
    """Hidden units, neurons, signs and rows, where the row is the largest values' product."""
    product = _maker(write.row, "MatMul")
    most = _maker(product.inputs[0], "ReduceMax") if product is not None else None
    if product is None or most is None or not _over_tokens(most):
        return None
    rows, value = product.inputs[1], most.inputs[0]
    signed = _maker(value, "Mul")
    signs = next((t for t in signed.inputs if isinstance(t, gs.Constant)), None) if signed else None
    if signed is not None and signs is not None:
        value = next(t for t in signed.inputs if t is not signs)
    columns = _maker(value, "Gather")
    if columns is None or columns.attrs.get("axis", 0) not in (2, -1):
        return None
    neurons = columns.inputs[1]
    if not isinstance(rows, gs.Constant) or not isinstance(neurons, gs.Constant):
        return None
    count = len(rows.values)
    if signs is None:
        ones = np.ones(count, rows.values.dtype)
        signs = Editor(graph).constant(f"{write.add.name}.operator.signs", ones)
    fits = neurons.values.shape == signs.values.shape == (count,) and rows.values.ndim == 2
    fits = fits and count <= MOST_NEURONS
    if not fits or neurons.values.dtype != np.int64 or (neurons.values < 0).any():
        return None
    return [columns.inputs[0], neurons, signs, rows]


def _over_tokens(node: gs.Node) -> bool:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    alone = isinstance(axes, gs.Constant) and axes.values.tolist() == [1]
    return alone and node.attrs.get("keepdims", 1) == 1


def _maker(value: gs.Tensor, op: str) -> gs.Node | None:
    node = maker(value)
    return node if node is not None and node.op == op and not node.domain else None
