"""Rewrite: a residual sum and the norm that follows become one SkipLayerNormalization.

``LayerNormalization(a + b)`` reads and writes (B, T, D) four times where two do. The sum itself,
which the next residual needs, is the kernel's fourth output; a bias (D,) that was added to ``a`` is
its bias input::

    MatMul -> Add bias -> Add residual -> LayerNormalization
    MatMul -> SkipLayerNormalization (residual, gamma, beta, bias) -> normed, sum
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.fuse_attention import DOMAIN
from regraft_export.graph.document import consumers, maker

OP = "SkipLayerNormalization"
Shape = tuple[object, ...]


def fuse_skip_norm(graph: gs.Graph, shapes: Mapping[str, Shape]) -> int:
    """Fuses every norm of a sum.

    Args:
        graph: changed in place.
        shapes: tensor name -> shape, as far as known.

    Returns:
        How many were fused.
    """
    fused = 0
    for node in [n for n in graph.nodes if n.op == "LayerNormalization"]:
        total = node.inputs[0]
        add = maker(total)
        if add is None or add.op != "Add" or not _plain(node):
            continue
        sides = _sides(add, shapes)
        if sides is None or len(consumers(total)) == 0:
            continue
        _fuse(graph, node, add, *sides)
        fused += 1
    return fused


def _plain(norm: gs.Node) -> bool:
    constants = all(isinstance(t, gs.Constant) and t.values.ndim == 1 for t in norm.inputs[1:])
    return constants and norm.attrs.get("axis", -1) in (-1, 2) and len(norm.outputs) == 1


def _sides(add: gs.Node, shapes: Mapping[str, Shape]) -> tuple[gs.Tensor, gs.Tensor] | None:
    """The branch and what it is added to, if both are (B, T, D), or the second (1, T, D)."""
    a, b = add.inputs
    if isinstance(a, gs.Constant):
        a, b = b, a
    if isinstance(a, gs.Constant):
        return None
    first, second = shapes.get(a.name, a.shape), shapes.get(b.name, b.shape)
    if isinstance(b, gs.Constant):
        second = b.values.shape
    if first is None or second is None or len(first) != 3 or len(second) != 3:
        return None
    known = all(isinstance(n, int) and n > 0 for n in (*first[1:], *second[1:]))
    if not known or tuple(first[1:]) != tuple(second[1:]):
        return None
    if isinstance(b, gs.Constant):
        return a, b
    # The branch is what a product gave; its bias goes into the kernel.
    return (b, a) if _bias(a) is None and _bias(b) is not None else (a, b)


def _bias(value: gs.Tensor) -> tuple[gs.Variable, gs.Constant] | None:
    """What a bias (D,) is added to, and the bias, if nobody else reads the sum."""
    add = maker(value)
    if add is None or add.op != "Add" or len(consumers(value)) != 1:
        return None
    bias = next((t for t in add.inputs if isinstance(t, gs.Constant)), None)
    inner = next((t for t in add.inputs if isinstance(t, gs.Variable)), None)
    if bias is None or inner is None or bias.values.ndim != 1:
        return None
    return inner, bias


def _fuse(
    graph: gs.Graph, norm: gs.Node, add: gs.Node, branch: gs.Tensor, residual: gs.Tensor
) -> None:
    total = add.outputs[0]
    biased = _bias(branch) if not any(branch is t for t in graph.outputs) else None
    inputs = [branch if biased is None else biased[0], residual, *norm.inputs[1:]]
    if biased is not None:
        inputs += [gs.Variable.empty()] * (4 - len(inputs)) + [biased[1]]
    outputs = [norm.outputs[0]]
    if len(consumers(total)) > 1 or any(total is t for t in graph.outputs):
        outputs += [gs.Variable.empty(), gs.Variable.empty(), total]
    epsilon = float(norm.attrs.get("epsilon", 1e-5))
    add.outputs, norm.outputs = [], []
    name = f"regraft.cuda.{norm.name}"
    # In the norm's place, so that the list stays in an order that can be executed.
    node = gs.Node(OP, name, {"epsilon": epsilon}, inputs, outputs, domain=DOMAIN)
    norm.inputs = []
    add.inputs = []
    graph.nodes[graph.nodes.index(norm)] = node
