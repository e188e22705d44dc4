"""Rewrite: a touched layer's redirect is one node of regraft's own, instead of four.

ONNX has no operator that takes some columns, their largest values, a product and one row; each of
the four kernels costs more by being started than by what it does::

    hidden -> Gather -> ReduceMax -> MatMul rows -> Mul onehot -> Add            ... -> Add residual
    residual -> AddRedirected (hidden, residual, neurons, rows)                  ... -> Add residual

and, with ``value = constant``, whose rows are a bias (T + R, D), ``residual -> AddRow``. Sources:
``regraft/engines/ort_cuda/operators`` of the runtime. One register of factor 1 at the end; other
redirects keep their nodes.
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
from regraft_export.graph.document import Editor, dtype_of

DOMAIN = "regraft"
# Names of the operators end in what their tensors are.
SUFFIXES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def operator(name: str, value: gs.Tensor) -> str:
    """The operator for tensors of this dtype."""
    return f"{name}_{SUFFIXES[dtype_of(value).name]}"


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
    shape = ["batch", tokens, width]
    for write in list(register_writes(graph)):
        residual, found = residual_behind(graph, write.add), _strongest(write)
        last = write.first == tokens - 1 and write.scales.tolist() == [1.0]
        if residual is None or found is None or not last:
            continue
        hidden, neurons, rows = found
        add, slot = residual
        inputs = [hidden, add.inputs[slot], neurons, rows]
        _put(graph, residual, "AddRedirected", f"{write.add.name}.operator", inputs, shape)
        bypass(write.add, write.alone)
        done += 1
    for constant in list(constant_writes(graph)):
        residual = residual_behind(graph, constant.add)
        if residual is None or constant.first != tokens - 1:
            continue
        dtype = dtype_of(constant.product)
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
    old = add.inputs[slot]
    node = Editor(graph).node(operator(name, old), stem, inputs, domain=DOMAIN)
    node.dtype, node.shape = old.dtype, shape
    add.inputs[slot] = node


def _strongest(write: RegisterWrite) -> tuple[gs.Variable, gs.Constant, gs.Constant] | None:
    """Hidden units, neurons and their rows, where the row is their largest values' product."""
    product = _maker(write.row, "MatMul")
    rows = product.inputs[1] if product is not None else None
    most = _maker(product.inputs[0], "ReduceMax") if product is not None else None
    columns = _maker(most.inputs[0], "Gather") if most is not None else None
    if most is None or columns is None or not isinstance(rows, gs.Constant):
        return None
    axes = most.inputs[1] if len(most.inputs) > 1 else None
    over_tokens = isinstance(axes, gs.Constant) and axes.values.tolist() == [1]
    neurons = columns.inputs[1]
    plain = (
        over_tokens
        and most.attrs.get("keepdims", 1) == 1
        and columns.attrs.get("axis", 0) in (2, -1)
        and isinstance(neurons, gs.Constant)
        and neurons.values.dtype == np.int64
        and neurons.values.ndim == 1
        and bool((neurons.values >= 0).all())
        and rows.values.ndim == 2
        and len(rows.values) == len(neurons.values)
    )
    return (columns.inputs[0], neurons, rows) if plain else None


def _maker(value: gs.Tensor, op: str) -> gs.Node | None:
    node = value.inputs[0] if value.inputs else None
    return node if node is not None and node.op == op and not node.domain else None
