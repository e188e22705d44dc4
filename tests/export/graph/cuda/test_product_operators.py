"""Products, GELUs and rows by regraft's own operators: where they fit, and where they do not."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from tests.export.graph.cuda.test_operators import spelled
from tests.export.graph.cuda.test_rewrites import D, T, model, ops, run

from regraft_export.graph.cuda.fuse_bias_gelu import fuse_bias_gelu
from regraft_export.graph.cuda.join_products import join_products
from regraft_export.graph.cuda.join_writes import join_writes
from regraft_export.graph.cuda.product_operator import gelus_by_operator, products_by_operator

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


REDIRECTED = """h = MatMul(r, w) g = Neg(h)
s = regraft.AddRedirected_fp32(h, x, columns, signs, rows)
o = regraft.Product_fp32(h, wide) y = Add(o, s)"""
ROW = """h = MatMul(r, w) s = regraft.AddRow_fp32(x, row)
o = regraft.Product_fp32(h, wide) y = Add(s, o)"""
INPUTS = f"float[b, {T}, {D}] x, float[b, {T}, {D}] r"
WEIGHTS = {
    "w": (D, 2 * D),
    "wide": (2 * D, D),
    "columns": np.array([3, 5]),
    "signs": np.array([1, -1], np.float32),
    "rows": (2, D),
    "row": (D,),
}


@pytest.mark.parametrize(
    ("nodes", "name"), [(REDIRECTED, "ProductRedirected_fp32"), (ROW, "ProductRow_fp32")]
)
def test_a_row_is_written_beside_the_product(nodes: str, name: str) -> None:
    before = spelled(model(nodes, x=INPUTS, **WEIGHTS), "xr")
    graph = model(nodes, x=INPUTS, **WEIGHTS)
    assert join_writes(graph) == 1
    assert ops(graph) == {"MatMul": 1, name: 1, "Add": 1}
    np.testing.assert_allclose(spelled(graph, "xr"), before, atol=1e-5)


@pytest.mark.parametrize(
    "nodes",
    [
        REDIRECTED.replace("regraft.Product_fp32(h", "MatMul(h"),
        REDIRECTED.replace("y = Add(o, s)", "n = Neg(o) y = Add(n, s)"),
        REDIRECTED.replace("Product_fp32(h", "Product_fp32(g"),
        """h = MatMul(r, w) o = regraft.Product_fp32(h, wide) z = Neg(o)
        s = regraft.AddRedirected_fp32(h, z, columns, signs, rows) y = Add(o, s)""",
        """s = regraft.AddRow_fp32(x, row) h = MatMul(s, w) o = regraft.Product_fp32(h, wide)
        y = Add(o, s)""",
        ROW.replace("Add(s, o)", "Mul(s, o)"),
    ],
    ids=[
        *("no operator", "not added", "other hidden units", "the residual needs the product"),
        *("the product needs the sum", "multiplied"),
    ],
)
def test_other_rows_are_written_alone(nodes: str) -> None:
    assert join_writes(model(nodes, x=INPUTS, **WEIGHTS)) == 0


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
