"""Rewrite: a bias and the GELU that follows become one BiasGelu.

For the exact GELU; the one by tanh stays, since BiasGelu computes erf.

Before::  MatMul -> Add bias -> Gelu        After::  MatMul -> BiasGelu bias
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.drop_key_bias import biased_product
from regraft_export.graph.cuda.fuse_attention import DOMAIN
from regraft_export.graph.document import consumers

OP = "BiasGelu"


def fuse_bias_gelu(graph: gs.Graph) -> int:
    """Fuses every such pair; returns how many."""
    fused = 0
    for index, node in enumerate(graph.nodes):
        exact = node.op == "Gelu" and node.attrs.get("approximate", "none") in ("none", b"none")
        found = biased_product(node.inputs[0]) if exact else None
        if found is None or len(consumers(node.inputs[0])) != 1:
            continue
        if any(node.inputs[0] is t for t in graph.outputs):
            continue
        outputs = list(node.outputs)
        node.outputs = []
        graph.nodes[index] = gs.Node(
            OP, f"regraft.cuda.{node.name}", {}, list(found), outputs, domain=DOMAIN
        )
        node.inputs = []
        fused += 1
    return fused
