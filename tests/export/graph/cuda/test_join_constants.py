"""Constant keys and values of the variant kv in fused attentions, against loops in numpy."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from tests.support import constants as support
from tests.support import graphs

from regraft.errors import RewriteError
from regraft_export.graph.cuda.drop_key_bias import drop_key_bias
from regraft_export.graph.cuda.fuse_attention import fuse_attention
from regraft_export.graph.cuda.join_constants import join_constants
from regraft_export.graph.cuda.move_value_bias import move_value_bias
from regraft_export.graph.document import read, write
from regraft_export.register_constants import RegisterConstants

T, D, H, R = 5, 8, 2, 2
RNG = np.random.default_rng(0)
CONSTANTS = RegisterConstants(
    {0: RNG.normal(size=(H, R, D // H)).astype(np.float32)},
    {0: RNG.normal(size=(H, R, D // H)).astype(np.float32)},
)
WEIGHTS = {
    **{f"w{s}": RNG.normal(size=(D, D)) for s in "qkvo"},
    **{f"b{s}": 3 * RNG.normal(size=D) for s in "qkvo"},
    "gain": RNG.normal(size=D // H),
}
KEYS = "kt = Transpose<perm = [0, 2, 3, 1]>(k3) "
NORMED = "kn = LayerNormalization<axis = -1>(k3, gain) kt = Transpose<perm = [0, 2, 3, 1]>(kn) "
LEAVES = "o = MatMul(a3, wo) y = Add(o, bo)"
SCALED = "a4 = Add(a3, a3) o = MatMul(a4, wo) y = Add(o, bo)"


def attention(keys: str = KEYS, end: str = LEAVES, more: str = "") -> gs.Graph:
    """An attention of pixels (b, 1, T, D) to y (b, T, D); ``more`` are further outputs."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
        g (float[b, 1, {T}, {D}] pixels) => (float[b, {T}, {D}] y{more}) {{
        x = Squeeze(pixels, one)
        q1 = MatMul(x, wq) q2 = Add(q1, bq) k1 = MatMul(x, wk) k2 = Add(k1, bk)
        v1 = MatMul(x, wv) v2 = Add(v1, bv)
        q3 = Reshape(q2, heads) k3 = Reshape(k2, heads) v3 = Reshape(v2, heads)
        q = Transpose<perm = [0, 2, 1, 3]>(q3) v = Transpose<perm = [0, 2, 1, 3]>(v3)
        {keys} s0 = MatMul(q, kt) s = Mul(s0, half) p = Softmax<axis = -1>(s) a = MatMul(p, v)
        a2 = Transpose<perm = [0, 2, 1, 3]>(a) a3 = Reshape(a2, merge) {end} }}"""
    )
    numbers = {"one": [1], "heads": [0, 0, H, D // H], "merge": [0, 0, D]}
    arrays = {n: np.array(v, np.int64) for n, v in numbers.items()}
    arrays |= {n: np.asarray(v, np.float32) for n, v in WEIGHTS.items()}
    arrays["half"] = np.array((D // H) ** -0.5, np.float32)
    for name, array in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    graph = read(onnx.shape_inference.infer_shapes(model))
    graph.toposort()
    return graph


def right(pixels: NDArray[np.float32], *, normed: bool = False, twice: bool = False) -> object:
    x = pixels[:, 0].astype(np.float64)
    q, k, v = (
        (x @ WEIGHTS[f"w{s}"] + WEIGHTS[f"b{s}"])
        .reshape(len(x), T, H, D // H)
        .transpose(0, 2, 1, 3)
        for s in "qkv"
    )
    if normed:
        k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-5)
        k = k * WEIGHTS["gain"]
    a = support.attention(q, k, v, CONSTANTS.keys[0], CONSTANTS.values[0])
    merged = a.transpose(0, 2, 1, 3).reshape(len(x), T, D) * (1 + twice)
    return merged @ WEIGHTS["wo"] + WEIGHTS["bo"]


@pytest.mark.parametrize(
    ("keys", "end", "dropped", "moved"),
    [(KEYS, LEAVES, 1, 1), (NORMED, LEAVES, 0, 1), (KEYS, SCALED, 1, 0)],
    ids=["plain", "a norm of the keys", "something before the projection"],
)
def test_biases_leave_the_constants_where_they_leave_the_tokens(
    keys: str, end: str, dropped: int, moved: int
) -> None:
    pixels = RNG.normal(size=(3, 1, T, D)).astype(np.float32)
    wanted = right(pixels, normed=keys is NORMED, twice=end is SCALED)
    for rewrites in (False, True):
        graph = attention(keys, end)
        assert fuse_attention(graph, H, T) == (1, [])
        assert join_constants(graph, CONSTANTS) == 1
        if rewrites:
            assert (drop_key_bias(graph), move_value_bias(graph)) == (dropped, moved)
            assert (drop_key_bias(graph), move_value_bias(graph)) == (0, 0)
            graph.cleanup().toposort()
            constants = {n.inputs[0].name: n for n in graph.nodes if n.op == "Expand"}
            assert len(constants) == 2
        proto = write(graph, shapes_changed=True)
        for batch in (pixels, pixels[:1]):
            found = graphs.run(proto, {"pixels": batch})["y"]
            np.testing.assert_allclose(found, wanted[: len(batch)], atol=2e-5)  # type: ignore[index]
    ops = Counter(node.op for node in graph.nodes)
    assert (ops["Concat"], ops["Shape"]) == (2, 1)
    assert ops["Add"] == 4 - dropped - moved + (end is SCALED)


def test_probabilities_that_leave_see_the_constants_and_the_key_bias() -> None:
    end = LEAVES + " shown = Identity(p)"
    graph = attention(end=end, more=f", float[b, {H}, {T}, t] shown")
    fuse_attention(graph, H, T)
    join_constants(graph, CONSTANTS)
    assert (drop_key_bias(graph), move_value_bias(graph)) == (1, 1)
    pixels = RNG.normal(size=(2, 1, T, D)).astype(np.float32)
    graph.cleanup().toposort()
    found = graphs.run(write(graph, shapes_changed=True), {"pixels": pixels})
    np.testing.assert_allclose(found["y"], right(pixels), atol=2e-5)
    assert found["shown"].shape == (2, H, T, T + R)
    np.testing.assert_allclose(found["shown"].sum(-1), 1, atol=1e-5)
    x = pixels[:, 0]
    q, k = (x @ WEIGHTS[f"w{s}"] + WEIGHTS[f"b{s}"] for s in "qk")
    q, k = (t.reshape(2, T, H, D // H).transpose(0, 2, 1, 3) for t in (q, k))
    k = np.concatenate([k, np.broadcast_to(CONSTANTS.keys[0], (2, H, R, D // H))], axis=2)
    scores = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(D // H))
    np.testing.assert_allclose(
        found["shown"], scores / scores.sum(-1, keepdims=True), rtol=1e-3, atol=1e-5
    )


def test_constants_of_other_heads_are_refused() -> None:
    graph = attention()
    fuse_attention(graph, H, T)
    three = {0: np.zeros((3, R, D // H), np.float32)}
    with pytest.raises(RewriteError, match="block 0: the constants have 3 heads; expected 2"):
        join_constants(graph, RegisterConstants(three, three))
