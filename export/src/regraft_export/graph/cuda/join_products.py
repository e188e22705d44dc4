"""Rewrite: three products of the same tokens, queries, keys and values, are one node.

A card computes them at the same time: each alone leaves most of it idle in a small batch::

    x -> BiasedProduct (., weight, bias) -> q
    x -> Product (., weight) -> k            x -> ThreeProducts1Biased (., weights, bias) -> q, k, v
    x -> Product (., weight) -> v

The biased ones come first, and the operator's name says how many they are. Sources:
``regraft/engines/ort_cuda/operators`` of the runtime.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.redirect_operator import DOMAIN, operator
from regraft_export.graph.document import Names, consumers

_TOGETHER = 3
_PRODUCTS = ("Product", "BiasedProduct")


def join_products(graph: gs.Graph) -> int:
    """Joins all products of that kind.

    Args:
        graph: changed in place.

    Returns:
        How many nodes there are now in the place of three.
    """
    done, names = 0, Names(graph)
    for node in list(graph.nodes):
        if not _is_product(node):
            continue
        alike = [n for n in consumers(node.inputs[0]) if _is_alike(n, node)]
        if len(alike) != _TOGETHER:
            continue
        alike.sort(key=lambda product: len(product.inputs), reverse=True)
        weight = node.inputs[1]
        biases = [n.inputs[2] for n in alike if len(n.inputs) > 2]
        inputs = [node.inputs[0], *(n.inputs[1] for n in alike), *biases]
        outputs = [n.outputs[0] for n in alike]
        place = min(graph.nodes.index(n) for n in alike)
        for product in alike:
            product.inputs, product.outputs, product.domain = [], [], None  # not met again
        name = operator(f"ThreeProducts{len(biases)}Biased", weight)
        joined = gs.Node(name, names.new(f"{node.name}.joined"), {}, inputs, outputs, domain=DOMAIN)
        graph.nodes[place] = joined
        done += 1
    graph.cleanup()
    return done


def _is_product(node: gs.Node) -> bool:
    return node.domain == DOMAIN and node.op.rpartition("_")[0] in _PRODUCTS


def _is_alike(node: gs.Node, other: gs.Node) -> bool:
    """Whether two readers of an input are products with weights of the same shape and dtype."""
    return _is_product(node) and bool(
        node.op.rpartition("_")[2] == other.op.rpartition("_")[2]
        and node.inputs[1].values.shape == other.inputs[1].values.shape
    )
