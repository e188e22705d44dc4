"""Rewrite: a register's row is written while the down-projection is computed.

Neither needs the other's result, and on a card the small kernel then costs next to nothing::

    hidden, residual -> AddRedirected -> sum          hidden -> Product weight -> y
    hidden, weight, residual -> ProductRedirected -> y, sum

and AddRow with ``ProductRow``. Sources: ``regraft/engines/ort_cuda/operators`` of the runtime.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.fuse_skip_norm import OP as SKIP_NORM
from regraft_export.graph.cuda.redirect_operator import DOMAIN
from regraft_export.graph.document import ancestors, consumers

_SUMS = ("Add", SKIP_NORM)
_JOINED = {"AddRedirected": "ProductRedirected", "AddRow": "ProductRow"}


def join_writes(graph: gs.Graph) -> int:
    """Joins every such pair; returns how many."""
    done = 0
    for write in [n for n in graph.nodes if n.domain == DOMAIN]:
        name, _, suffix = write.op.rpartition("_")
        if name not in _JOINED:
            continue
        # AddRedirected reads the hidden units first, as the product has to.
        first = list(write.inputs[:1]) if name == "AddRedirected" else []
        residual, *others = write.inputs[len(first) :]
        product = _added_to(write.outputs[0], f"Product_{suffix}")
        if product is None or any(product.inputs[0] is not hidden for hidden in first):
            continue
        # Neither may need the other.
        before = (*ancestors(residual), *ancestors(product.inputs[0]))
        if any(node is product or node is write for node in before):
            continue
        inputs = [*product.inputs, residual, *others]
        outputs = [product.outputs[0], write.outputs[0]]
        for node in (product, write):
            node.inputs, node.outputs = [], []
        joined = f"{_JOINED[name]}_{suffix}"
        graph.nodes[graph.nodes.index(product)] = gs.Node(
            joined, f"{write.name}.joined", {}, inputs, outputs, domain=DOMAIN
        )
        done += 1
    graph.cleanup()
    return done


def _added_to(total: gs.Variable, op: str) -> gs.Node | None:
    """The product that is added to a residual, with or without the norm that follows."""
    for reader in (n for n in consumers(total) if n.op in _SUMS):
        for other in reader.inputs[:2]:
            maker = other.inputs[0] if other is not total and other.inputs else None
            if maker is not None and maker.op == op and maker.domain == DOMAIN:
                return maker
    return None
