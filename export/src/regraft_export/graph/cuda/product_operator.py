"""Rewrite: products with weights, and biased GELUs, are nodes of regraft's own.

cuBLAS chooses a product's algorithm by rules of thumb, and otherwise for T + 1 tokens than for T;
regraft's product is timed on the card, and adds a bias while it writes::

    x -> MatMul weight -> Add bias      x -> BiasedProduct (., weight, bias)
    x -> MatMul weight                  x -> Product (., weight)
    x -> BiasGelu (., bias)             x -> BiasedGelu (., bias)

Sources: ``regraft/engines/ort_cuda/operators`` of the runtime. They want (B, T, K) with K and N
multiples of 8, and shapes that are known: no inference of ONNX Runtime knows the operators, and
without shapes nothing behind them works in place.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.fuse_attention import DOMAIN as CONTRIB
from regraft_export.graph.cuda.fuse_bias_gelu import OP as BIAS_GELU
from regraft_export.graph.cuda.inferred_shapes import Shapes
from regraft_export.graph.cuda.redirect_operator import DOMAIN, MULTIPLE, SUFFIXES, operator
from regraft_export.graph.document import consumers


def products_by_operator(graph: gs.Graph, shapes: Shapes) -> int:
    """Rewrites every product with a weight.

    Args:
        graph: changed in place.
        shapes: tensor name -> shape, as far as known.

    Returns:
        How many were rewritten.
    """
    done = 0
    for node in [n for n in graph.nodes if n.op == "MatMul" and not n.domain]:
        x, weight = node.inputs
        if not isinstance(x, gs.Variable) or not fits(weight, 2):
            continue
        shape = _shape(node, shapes)
        if shape is None:
            continue
        bias = _bias(graph, node)
        if bias is None:
            put(graph, node, "Product", [x, weight], node.outputs[0], shape)
        else:
            add, values = bias
            output, add.outputs, add.inputs = add.outputs[0], [], []
            put(graph, node, "BiasedProduct", [x, weight, values], output, shape)
        done += 1
    return done


def gelus_by_operator(graph: gs.Graph, shapes: Shapes) -> int:
    """Rewrites every BiasGelu; as :func:`products_by_operator`."""
    done = 0
    for node in [n for n in graph.nodes if n.op == BIAS_GELU and n.domain == CONTRIB]:
        x, bias = node.inputs
        tokens = tokens_of(x, shapes) or tokens_of(node.outputs[0], shapes)
        if tokens is None or not fits(bias, 1):
            continue
        shape = ["batch", tokens, len(bias.values)]
        put(graph, node, "BiasedGelu", [x, bias], node.outputs[0], shape)
        done += 1
    return done


def fits(weight: gs.Tensor, rank: int) -> bool:
    """Whether the operators take it: a constant of that rank, lengths and dtype theirs."""
    if not isinstance(weight, gs.Constant) or weight.values.ndim != rank:
        return False
    even = all(length % MULTIPLE == 0 for length in weight.values.shape)
    return even and weight.values.dtype.name in SUFFIXES


def _shape(product: gs.Node, shapes: Shapes) -> list[object] | None:
    """(batch, T, N), if it is known and there are tokens to speak of."""
    x, weight = product.inputs
    tokens = tokens_of(product.outputs[0], shapes) or tokens_of(x, shapes)
    # One row an image is a register's; such products are too small to matter.
    return ["batch", tokens, weight.values.shape[1]] if tokens and tokens > 1 else None


def tokens_of(value: gs.Tensor, shapes: Shapes) -> int | None:
    """T of (B, T, N), if it is known, and B is free: the batch."""
    shape: tuple[object, ...] = tuple(shapes.get(value.name) or value.shape or ())
    tokens = shape[1] if len(shape) == 3 and not isinstance(shape[0], int) else None
    return tokens if isinstance(tokens, int) else None


def _bias(graph: gs.Graph, product: gs.Node) -> tuple[gs.Node, gs.Constant] | None:
    """The Add of a bias (N,) that alone reads a product, and the bias."""
    y = product.outputs[0]
    readers = consumers(y)
    if len(readers) != 1 or readers[0].op != "Add" or any(y is t for t in graph.outputs):
        return None
    others = [t for t in readers[0].inputs if t is not y]
    if len(others) != 1 or not fits(others[0], 1):
        return None
    wide = len(others[0].values) == product.inputs[1].values.shape[1]
    return (readers[0], others[0]) if wide else None


def put(
    graph: gs.Graph,
    node: gs.Node,
    name: str,
    inputs: list[gs.Tensor],
    output: gs.Variable,
    shape: list[object],
) -> None:
    """Puts an operator in a node's place, so that the list stays in an order to be executed."""
    output.shape = shape
    output.dtype = output.dtype or inputs[-1].values.dtype
    node.inputs, node.outputs = [], []
    own = gs.Node(
        operator(name, inputs[-1]), f"regraft.own.{node.name}", {}, inputs, [output], domain=DOMAIN
    )
    graph.nodes[graph.nodes.index(node)] = own
