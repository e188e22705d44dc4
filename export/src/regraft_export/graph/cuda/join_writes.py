"""Rewrite: a register's row is written by some blocks of the MLP's activation.

They compute the few hidden units that they need anew instead of waiting for other blocks. In a
large batch that is hidden among the rest; in a small one the kernel takes as long as they do::

    x -> BiasedGelu (., bias) -> hidden;  hidden, residual -> AddRedirected -> sum
    x, residual -> BiasedGeluRedirected (., bias, .) -> hidden, sum

AddRow and the other activations likewise. Sources: ``regraft/engines/ort_cuda/operators`` of the
runtime.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.fuse_skip_norm import OP as SKIP_NORM
from regraft_export.graph.cuda.own_functions import ACTIVATIONS
from regraft_export.graph.cuda.redirect_operator import DOMAIN
from regraft_export.graph.document import ancestors, consumers, maker

_SUMS = ("Add", SKIP_NORM)
_PRODUCTS = ("Product", "BiasedProduct")
_WRITES = {"AddRedirected": "Redirected", "AddRow": "Row"}


def join_writes(graph: gs.Graph) -> int:
    """Joins every such pair; returns how many."""
    done = 0
    for write in [n for n in graph.nodes if n.domain == DOMAIN]:
        name, _, suffix = write.op.rpartition("_")
        if name not in _WRITES:
            continue
        inputs = list(write.inputs)
        # A constant row belongs to the MLP whose output is added to the same residual.
        hidden = inputs.pop(0) if name == "AddRedirected" else _hidden(write.outputs[0], suffix)
        activation = None if hidden is None else _maker(hidden, tuple(ACTIVATIONS), suffix)
        if activation is None or _needs(activation, write, inputs[0]):
            continue
        x, bias = activation.inputs
        outputs = [activation.outputs[0], write.outputs[0]]
        joined = f"{activation.op.rpartition('_')[0]}{_WRITES[name]}_{suffix}"
        for node in (activation, write):
            node.inputs, node.outputs = [], []
        graph.nodes[graph.nodes.index(activation)] = gs.Node(
            joined, f"{write.name}.joined", {}, [x, bias, *inputs], outputs, domain=DOMAIN
        )
        done += 1
    graph.cleanup()
    return done


def _needs(activation: gs.Node, write: gs.Node, residual: gs.Tensor) -> bool:
    """Whether the residual needs the activation, or what the activation reads the row."""
    before = (*ancestors(residual), *ancestors(activation.inputs[0]))
    return any(node is activation or node is write for node in before)


def _hidden(total: gs.Variable, suffix: str) -> gs.Tensor | None:
    """What is down-projected and added to a residual, with or without the norm that follows."""
    for reader in (n for n in consumers(total) if n.op in _SUMS):
        for other in reader.inputs[:2]:
            product = None if other is total else _maker(other, _PRODUCTS, suffix)
            if product is not None:
                hidden: gs.Tensor = product.inputs[0]
                return hidden
    return None


def _maker(value: gs.Tensor, names: tuple[str, ...], suffix: str) -> gs.Node | None:
    node = maker(value)
    if node is None or node.domain != DOMAIN:
        return None
    return node if node.op in [f"{name}_{suffix}" for name in names] else None
