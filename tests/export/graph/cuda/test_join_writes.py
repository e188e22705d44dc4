"""Registers' rows by the activation's kernel: where they go along, and where they stay alone."""

from __future__ import annotations

import numpy as np
import pytest
from tests.export.graph.cuda.test_operators import spelled
from tests.export.graph.cuda.test_rewrites import D, T, model, ops

from regraft_export.graph.cuda.join_writes import join_writes

REDIRECTED = """u = MatMul(r, w) h = regraft.BiasedGelu_fp32(u, c) g = Neg(h)
s = regraft.AddRedirected_fp32(h, x, columns, signs, rows)
o = regraft.Product_fp32(h, wide) y = Add(o, s)"""
ROW = """u = MatMul(r, w) h = regraft.BiasedGelu_fp32(u, c) s = regraft.AddRow_fp32(x, row)
o = regraft.Product_fp32(h, wide) y = Add(s, o)"""
INPUTS = f"float[b, {T}, {D}] x, float[b, {T}, {D}] r"
WEIGHTS: dict[str, object] = {
    "w": (D, 2 * D),
    "c": (2 * D,),
    "both": (D, 4 * D),
    "long": (4 * D,),
    "wide": (2 * D, D),
    "bias": (D,),
    "columns": np.array([3, 5]),
    "signs": np.array([1, -1], np.float32),
    "rows": (2, D),
    "row": (D,),
}


def gated(nodes: str) -> str:
    return nodes.replace("(r, w)", "(r, both)").replace("Gelu_fp32(u, c)", "SwiGlu_fp32(u, long)")


@pytest.mark.parametrize(
    ("nodes", "name", "product"),
    [
        (REDIRECTED, "GeluRedirected", "Product"),
        (ROW, "GeluRow", "Product"),
        (REDIRECTED.replace("BiasedGelu", "BiasedQuickGelu"), "QuickGeluRedirected", "Product"),
        (ROW.replace("BiasedGelu", "BiasedQuickGelu"), "QuickGeluRow", "Product"),
        (gated(REDIRECTED), "SwiGluRedirected", "Product"),
        (gated(ROW), "SwiGluRow", "Product"),
        (
            ROW.replace("Product_fp32(h, wide)", "BiasedProduct_fp32(h, wide, bias)"),
            *("GeluRow", "BiasedProduct"),
        ),
    ],
)
def test_a_row_is_written_by_the_activation(nodes: str, name: str, product: str) -> None:
    before = spelled(model(nodes, x=INPUTS, **WEIGHTS), "xr")
    graph = model(nodes, x=INPUTS, **WEIGHTS)
    assert join_writes(graph) == 1
    assert ops(graph) == {"MatMul": 1, f"Biased{name}_fp32": 1, f"{product}_fp32": 1, "Add": 1}
    np.testing.assert_allclose(spelled(graph, "xr"), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nodes", [REDIRECTED, ROW], ids=["redirected", "row"])
def test_who_else_reads_the_hidden_units_or_the_row_still_can(nodes: str) -> None:
    nodes = nodes.replace("y = Add", "z = Add") + " n = Neg(h) e = MatMul(n, wide) y = Sum(z, e, s)"
    before = spelled(model(nodes, x=INPUTS, **WEIGHTS), "xr")
    graph = model(nodes, x=INPUTS, **WEIGHTS)
    assert join_writes(graph) == 1
    np.testing.assert_allclose(spelled(graph, "xr"), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "nodes",
    [
        REDIRECTED.replace("regraft.BiasedGelu_fp32(u", "Add(u"),
        REDIRECTED.replace("AddRedirected_fp32(h", "AddRedirected_fp32(g"),
        """u = MatMul(r, w) h = regraft.BiasedGelu_fp32(u, c)
        o = regraft.Product_fp32(h, wide) z = Neg(o)
        s = regraft.AddRedirected_fp32(h, z, columns, signs, rows) y = Add(o, s)""",
        """s = regraft.AddRow_fp32(x, row) u = MatMul(s, w) h = regraft.BiasedGelu_fp32(u, c)
        o = regraft.Product_fp32(h, wide) y = Add(o, s)""",
        ROW.replace("regraft.Product_fp32(h", "MatMul(h"),
        ROW.replace("y = Add(s, o)", "n = Neg(o) y = Add(s, n)"),
        ROW.replace("Add(s, o)", "Mul(s, o)"),
        ROW.replace("Product_fp32(h", "Product_fp32(k").replace("o =", "k = Neg(h) o ="),
        ROW.replace("BiasedGelu_fp32", "BiasedGelu_fp16"),
        REDIRECTED.replace("BiasedGelu_fp32", "BiasedGelu_fp16"),
    ],
    ids=[
        *("no operator", "other units", "the residual needs the activation"),
        *("the activation needs the row", "no product", "not added", "multiplied", "other input"),
        *("row of another dtype", "redirect of another dtype"),
    ],
)
def test_other_rows_are_written_alone(nodes: str) -> None:
    assert join_writes(model(nodes, x=INPUTS, **WEIGHTS)) == 0
