"""Products with tokens before images, as torch.nn.MultiheadAttention has them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_graphsurgeon as gs
import pytest
from tests.support import graphs

from regraft.tokens import TokenLayout
from regraft_export.graph.cuda.fuse_attention import fuse_attention
from regraft_export.graph.cuda.images_first import images_first
from regraft_export.graph.document import read, write

GRID, D, H = 2, 8, 2
T = 1 + GRID * GRID
LAYOUT = TokenLayout(True, 1, (GRID, GRID), D, depth=1, heads=H)
ENTER = "t = Transpose<perm = [1, 0, 2]>(x) m = MatMul(t, w) l = Add(m, b3) "
SPLIT = """r = Reshape(l, three) u = Unsqueeze(r, first) p = Transpose<perm = [3, 1, 2, 0, 4]>(u)
s = Squeeze(p, last) q1 = Gather<axis = 0>(s, i0) k1 = Gather<axis = 0>(s, i1)
v1 = Gather<axis = 0>(s, i2) q2 = Reshape(q1, flat) k2 = Reshape(k1, flat) v2 = Reshape(v1, flat)
q3 = Transpose<perm = [1, 0, 2]>(q2) k3 = Transpose<perm = [1, 0, 2]>(k2)
v3 = Transpose<perm = [1, 0, 2]>(v2) q = Reshape(q3, split) k = Reshape(k3, split)
v = Reshape(v3, split) kt = Transpose<perm = [0, 1, 3, 2]>(k) """
ATTEND = "z = MatMul(q, kt) e = Softmax<axis = -1>(z) a = MatMul(e, v) "
ROWS = "o1 = Transpose<perm = [2, 0, 1, 3]>(a) o2 = Reshape(o1, rows) "
GEMM = "o3 = Gemm<transB = 1>(o2, wo, bo) "
BACK = "o4 = Reshape(o3, tokens) y = Transpose<perm = [1, 0, 2]>(o4)"
WHOLE = ENTER + SPLIT + ATTEND + ROWS + GEMM + BACK


def model(nodes: str, more: str = "") -> gs.Graph:
    """From x (b, T, D) to y (b, T, D)."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
        g (float[b, {T}, {D}] x) => (float[b, {T}, {D}] y{more}) {{ {nodes} }}"""
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (D, 3 * D), "b3": (3 * D,), "wo": (D, D), "bo": (D,)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    numbers = {
        **{"three": [T, -1, 3, D], "flat": [T, -1, D // H], "split": [-1, H, T, D // H]},
        **{"rows": [-1, D], "tokens": [T, -1, D], "first": [0], "last": [-2]},
        **{"i0": 0, "i1": 1, "i2": 2, "images": [-1, T, D]},
    }
    arrays |= {name: np.array(value, np.int64) for name, value in numbers.items()}
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    graph = read(onnx.shape_inference.infer_shapes(proto))
    graph.toposort()
    return graph


def outputs(graph: gs.Graph) -> dict[str, np.ndarray]:
    """On three different images, and on one."""
    x = np.random.default_rng(1).normal(size=(3, T, D)).astype(np.float32)
    proto = write(graph, shapes_changed=False)
    found, alone = (graphs.run(proto, {"x": batch}) for batch in (x, x[1:2]))
    np.testing.assert_allclose(alone["y"], found["y"][1:2], atol=1e-5)
    return found


@pytest.mark.parametrize(
    "out",
    [GEMM, "o5 = MatMul(o2, wo) o3 = Add(o5, bo) ", "o3 = MatMul(o2, wo) "],
    ids=["Gemm", "MatMul and Add", "no bias"],
)
def test_attention_with_tokens_first_is_fused(out: str) -> None:
    nodes = WHOLE.replace(GEMM, out)
    right = outputs(model(nodes))["y"]
    graph = model(nodes)
    assert fuse_attention(model(nodes), H, T)[0] == 0
    assert images_first(graph, LAYOUT) == 2
    np.testing.assert_allclose(outputs(graph)["y"], right, atol=1e-5)
    assert fuse_attention(graph, H, T) == (1, [])
    graph.cleanup().toposort()
    np.testing.assert_allclose(outputs(graph)["y"], right, atol=1e-5)
    ops = Counter(node.op for node in graph.nodes)
    assert (ops["Transpose"], ops["Reshape"], ops["MultiHeadAttention"]) == (0, 0, 1)
    assert images_first(graph, LAYOUT) == 0


@pytest.mark.parametrize(
    "out",
    [
        GEMM.replace("transB = 1", "transB = 1, alpha = 0.5"),
        "o6 = Relu(o2) o5 = Transpose<perm = [1, 0]>(o6) o3 = Gemm<transA = 1>(o5, wo, bo) ",
        "o3 = MatMul(o2, o2w) ",  # not by a constant
    ],
)
def test_other_products_of_rows_are_left(out: str) -> None:
    square = "wt = Identity(x) g0 = Gather<axis = 0>(wt, i0) gt = Transpose<perm = [1, 0]>(g0) "
    square += "o2w = MatMul(gt, g0) "
    nodes = WHOLE.replace(GEMM, (square if "o2w" in out else "") + out)
    x = np.random.default_rng(1).normal(size=(3, T, D)).astype(np.float32)
    graph = model(nodes)
    right = graphs.run(write(model(nodes), shapes_changed=False), {"x": x})["y"]
    assert images_first(graph, LAYOUT) == 1  # the way in
    found = graphs.run(write(graph, shapes_changed=False), {"x": x})["y"]
    np.testing.assert_allclose(found, right, atol=1e-5)


def test_rows_that_another_chain_mixed_are_left() -> None:
    nodes = WHOLE.replace("o4 = Reshape(o3, tokens) y = Transpose<perm = [1, 0, 2]>(o4)", "")
    nodes += "o4 = Reshape(o3, images) o6 = Transpose<perm = [1, 0, 2]>(o4) "
    nodes += "y = Transpose<perm = [1, 0, 2]>(o6)"
    graph = model(nodes)
    assert images_first(graph, LAYOUT) == 1


def test_a_product_that_leaves_the_graph_is_left() -> None:
    graph = model(WHOLE, more=f", float[{T}, b, {3 * D}] l")
    before = outputs(model(WHOLE, more=f", float[{T}, b, {3 * D}] l"))
    assert images_first(graph, LAYOUT) == 1  # the way out
    after = outputs(graph)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=1e-5)


def test_another_reader_keeps_the_exchange() -> None:
    nodes = WHOLE.replace("y = Transpose<perm = [1, 0, 2]>(o4)", "o6 = Add(o4, t) ")
    nodes += " y = Transpose<perm = [1, 0, 2]>(o6)"
    right = outputs(model(nodes))["y"]
    graph = model(nodes)
    assert images_first(graph, LAYOUT) == 1
    np.testing.assert_allclose(outputs(graph)["y"], right, atol=1e-5)
