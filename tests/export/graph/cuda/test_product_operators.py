"""Products and GELUs by regraft's own operators: where they fit, and where they do not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from tests.export.graph.cuda.test_operators import spelled
from tests.export.graph.cuda.test_rewrites import D, T, model, ops, run

from regraft_export.graph.cuda.fuse_bias_gelu import fuse_bias_gelu
from regraft_export.graph.cuda.join_products import join_products
from regraft_export.graph.cuda.product_operator import gelus_by_operator, products_by_operator
from regraft_export.graph.cuda.quick_gelu_operator import quick_gelus_by_operator

Dims = tuple[object, ...]
TOKENS: dict[str, Dims] = {"x": ("b", T, D)}
WIDE = {"w": (D, 2 * D), "c": (2 * D,), "wide": (2 * D, D)}
BIASED = "u = MatMul(x, w) h = Add(u, c) y = MatMul(h, wide)"


def test_products_take_their_biases_along() -> None:
    before, graph = run(model(BIASED, **WIDE)), model(BIASED, **WIDE)
    assert products_by_operator(graph, {**TOKENS, "h": ("b", T, 2 * D)}) == 2
    graph.cleanup()
    assert ops(graph) == {"BiasedProduct_fp32": 1, "Product_fp32": 1}
    for node, width in zip(graph.nodes, (2 * D, D), strict=True):
        assert node.outputs[0].shape == ["batch", T, width]
    np.testing.assert_allclose(spelled(graph), before, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "weights", "biased"),
    [
        ("u = MatMul(x, w) y = Add(u, u)", {"w": (D, D)}, False),
        ("u = MatMul(x, w) v = Add(u, c) y = Add(u, v)", {"w": (D, D), "c": (D,)}, False),
        ("u = MatMul(x, w) y = Add(u, c)", {"w": (D, D), "c": (1, T, D)}, False),
        ("u = MatMul(x, w) y = Add(u, c)", {"w": (D, D), "c": (1,)}, False),
        ("u = MatMul(x, w) y = Add(c, u)", {"w": (D, D), "c": (D,)}, True),
    ],
    ids=["itself", "read twice", "of tokens", "a scalar", "turned"],
)
def test_other_sums_stay_behind_the_product(
    nodes: str, weights: dict[str, object], biased: bool
) -> None:
    before, graph = run(model(nodes, **weights)), model(nodes, **weights)
    assert products_by_operator(graph, TOKENS) == 1
    graph.cleanup()
    assert ops(graph)["BiasedProduct_fp32"] == biased
    np.testing.assert_allclose(spelled(graph), before, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "weights", "shapes"),
    [
        ("y = MatMul(x, w)", {"w": (D, D)}, {"x": ("b", 2, T, D)}),
        ("y = MatMul(x, w)", {"w": (D, D)}, {"x": ("b", "t", D)}),
        ("y = MatMul(x, w)", {"w": (D, D)}, {"x": ("b", 1, D)}),
        ("y = MatMul(x, w)", {"w": (D, D)}, {"x": (3, T, D)}),
        ("y = MatMul(x, w)", {"w": (1, D, D)}, TOKENS),
        ("u = MatMul(x, w) y = MatMul(u, v)", {"w": (D, 4), "v": (4, D)}, TOKENS),
        ("t = Transpose<perm = [0, 2, 1]>(x) u = MatMul(x, t) y = MatMul(u, x)", {}, TOKENS),
    ],
    ids=[
        "rank 4",
        "free tokens",
        "one row",
        "fixed batch",
        "batched weight",
        "not a multiple of 8",
        "no weight",
    ],
)
def test_other_products_are_left(
    nodes: str, weights: dict[str, object], shapes: dict[str, Dims]
) -> None:
    graph = model(nodes, **weights)
    for tensor in (*graph.inputs, *graph.outputs):
        tensor.shape = None  # what is known is in the table
    assert products_by_operator(graph, shapes) == 0


def biased_gelu(width: int = D) -> gs.Graph:
    nodes = "h = MatMul(x, w) s = Add(h, c) g = Gelu(s) y = MatMul(g, v)"
    graph = model(nodes, w=(D, width), c=(width,), v=(width, D))
    assert fuse_bias_gelu(graph) == 1
    return graph


def test_a_biased_gelu_is_one_node() -> None:
    before, graph = run(biased_gelu()), biased_gelu()
    assert gelus_by_operator(graph, {"h": ("b", T, D)}) == 1
    graph.cleanup()
    assert ops(graph) == {"MatMul": 2, "BiasedGelu_fp32": 1}
    (node,) = [n for n in graph.nodes if n.op == "BiasedGelu_fp32"]
    assert node.outputs[0].shape == ["batch", T, D]
    np.testing.assert_allclose(spelled(graph), before, atol=1e-5)


@pytest.mark.parametrize(("width", "tokens"), [(12, T), (D, "t")])
def test_other_gelus_are_left(width: int, tokens: object) -> None:
    assert gelus_by_operator(biased_gelu(width), {"h": ("b", tokens, width)}) == 0


QUICK = """h = MatMul(x, w) s = Add(h, c) m = Mul(s, factor) o = Sigmoid(m) g = Mul(s, o)
y = MatMul(g, v)"""
CLIPS: dict[str, object] = {
    "w": (D, 2 * D),
    "c": (2 * D,),
    "factor": np.array(1.702, np.float32),
    "v": (2 * D, D),
    "one": (1, 2 * D),
}
HIDDEN: dict[str, Dims] = {"s": ("b", T, 2 * D)}


@pytest.mark.parametrize("nodes", [QUICK, QUICK.replace("g = Mul(s, o)", "g = Mul(o, s)")])
def test_clips_gelu_is_one_node(nodes: str) -> None:
    before, graph = run(model(nodes, **CLIPS)), model(nodes, **CLIPS)
    assert quick_gelus_by_operator(graph, HIDDEN) == 1
    graph.cleanup()
    assert ops(graph) == {"MatMul": 2, "BiasedQuickGelu_fp32": 1}
    (node,) = [n for n in graph.nodes if n.op == "BiasedQuickGelu_fp32"]
    assert node.outputs[0].shape == ["batch", T, 2 * D]
    np.testing.assert_allclose(spelled(graph), before, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "factor", "tokens"),
    [
        (("y", "y"), 1.0, T),
        (("y", "y"), 1.7, T),
        (("y", "y"), 1.703125, T),
        (("factor)", "one)"), 1.702, T),
        (("Mul(s, factor)", "Mul(factor, factor)"), 1.702, T),
        (("g = Mul(s, o)", "g = Mul(h, o)"), 1.702, T),
        (("y = MatMul(g, v)", "k = Add(g, s) y = MatMul(k, v)"), 1.702, T),
        (("y = MatMul(g, v)", "k = Add(g, o) y = MatMul(k, v)"), 1.702, T),
        (("y = MatMul(g, v)", "k = Add(g, h) y = MatMul(k, v)"), 1.702, T),
        (("Sigmoid", "Tanh"), 1.702, T),
        (("s = Add(h, c)", "s = Neg(h)"), 1.702, T),
        (("y", "y"), 1.702, "t"),
    ],
    ids=[
        *(
            "SiLU",
            "another factor",
            "bf16's factor",
            "factors of columns",
            "not of h",
            "not of the sum",
        ),
        *("h is read elsewhere", "the gate, too", "the product, too", "no sigmoid", "no bias"),
        "free tokens",
    ],
)
def test_other_gates_keep_their_nodes(
    change: tuple[str, str], factor: float, tokens: object
) -> None:
    weights = {**CLIPS, "factor": np.array(factor, np.float32)}
    graph = model(QUICK.replace(*change), **weights)
    assert quick_gelus_by_operator(graph, {"s": ("b", tokens, 2 * D)}) == 0


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_clips_factor_is_the_one_that_its_dtype_has(precision: str) -> None:
    graph = model(QUICK, **CLIPS)
    (factor,) = [t for n in graph.nodes for t in n.inputs if t.name == "factor"]
    factor.values = factor.values.astype(ml_dtypes.bfloat16 if precision[0] == "b" else precision)
    assert quick_gelus_by_operator(graph, HIDDEN) == 1


def test_clips_gelu_of_a_hidden_width_that_is_no_multiple_of_8_is_left() -> None:
    weights = {**CLIPS, "w": (D, 12), "c": (12,), "v": (12, D)}
    assert quick_gelus_by_operator(model(QUICK, **weights), {"s": ("b", T, 12)}) == 0


def test_clips_gelu_is_left_where_its_input_is_an_output() -> None:
    graph = model(QUICK, **CLIPS)
    graph.outputs.append(graph.tensors()["s"])
    assert quick_gelus_by_operator(graph, HIDDEN) == 0


THREE = """q = regraft.BiasedProduct_fp32(x, w, c) k = regraft.Product_fp32(x, u)
v = regraft.Product_fp32(x, t) s = Sub(q, k) y = Mul(s, v)"""
SQUARE = {"w": (D, D), "u": (D, D), "t": (D, D), "c": (D,), "d": (D,), "e": (D,)}


@pytest.mark.parametrize(
    ("nodes", "biased"),
    [
        (THREE.replace("Biased", "").replace("(x, w, c)", "(x, w)"), 0),
        (THREE, 1),
        (
            THREE.replace(
                "v = regraft.Product_fp32(x, t)", "v = regraft.BiasedProduct_fp32(x, t, d)"
            ),
            2,
        ),
        (
            THREE.replace(
                "= regraft.Product_fp32(x, u)", "= regraft.BiasedProduct_fp32(x, u, e)"
            ).replace("= regraft.Product_fp32(x, t)", "= regraft.BiasedProduct_fp32(x, t, d)"),
            3,
        ),
    ],
)
def test_three_products_of_the_same_tokens_are_one_node(nodes: str, biased: int) -> None:
    before, graph = spelled(model(nodes, **SQUARE)), model(nodes, **SQUARE)
    assert join_products(graph) == 1
    assert ops(graph) == {f"ThreeProducts{biased}Biased_fp32": 1, "Sub": 1, "Mul": 1}
    assert graph.nodes[0].op.startswith("Three")  # before those that read it
    np.testing.assert_allclose(spelled(graph), before, atol=1e-5)


def test_each_block_has_its_own() -> None:
    nodes = (
        THREE.replace("y = Mul", "h = Mul")
        + """
    a = regraft.Product_fp32(h, w) b = regraft.Product_fp32(h, u) i = regraft.Product_fp32(h, t)
    o = Sub(a, b) y = Mul(o, i)"""
    )
    before, graph = spelled(model(nodes, **SQUARE)), model(nodes, **SQUARE)
    assert join_products(graph) == 2
    np.testing.assert_allclose(spelled(graph), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "nodes",
    [
        THREE.replace("v = regraft.Product_fp32(x, t)", "v = Neg(x)"),
        THREE.replace("v = regraft.Product_fp32(x", "z = Neg(x) v = regraft.Product_fp32(z"),
        THREE.replace("regraft.Product_fp32(x, t)", "MatMul(x, t)"),
        THREE.replace("y = Mul", "o = regraft.Product_fp32(x, e) p = Add(o, v) y = Mul"),
        THREE.replace(
            "Product_fp32(x, t) s = Sub(q, k) y = Mul(s, v)",
            "Product_fp32(x, f) s = Sub(q, k) z = MatMul(v, g) y = Mul(s, z)",
        ),
        THREE.replace("Product_fp32(x, t)", "AddRow_fp32(x, d)"),
    ],
    ids=["two", "other tokens", "no operator", "four", "another width", "no product"],
)
def test_other_products_stay_apart(nodes: str) -> None:
    weights = {**SQUARE, "e": (D, D), "f": (D, 2 * D), "g": (2 * D, D)}
    assert join_products(model(nodes, **weights)) == 0
