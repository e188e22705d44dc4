"""Each rewrite for CUDA by itself: forms it takes, forms it leaves, and equal numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from tests.support import graphs

from regraft_export.graph.cuda.add_to_residual import add_to_residual
from regraft_export.graph.cuda.drop_key_bias import drop_key_bias
from regraft_export.graph.cuda.fold_layer_scale import fold_layer_scale
from regraft_export.graph.cuda.fuse_attention import fuse_attention
from regraft_export.graph.cuda.fuse_bias_gelu import fuse_bias_gelu
from regraft_export.graph.cuda.fuse_skip_norm import fuse_skip_norm
from regraft_export.graph.cuda.known_shapes import fix_shapes
from regraft_export.graph.cuda.leave_whole import leave_whole
from regraft_export.graph.cuda.maximum import maximum_by_topk
from regraft_export.graph.cuda.move_value_bias import move_value_bias
from regraft_export.graph.cuda.patch_matmul import patch_matmul
from regraft_export.graph.cuda.place_register_row import place_register_row
from regraft_export.graph.cuda.widen_hidden import widen_hidden
from regraft_export.graph.document import read, write

T, D, H = 5, 8, 2


def model(
    nodes: str, out: str = f"float[b, {T}, {D}] y", x: str = "", **weights: object
) -> gs.Graph:
    """A graph from ``x`` (b, T, D) to ``y``; weights by name: a shape to draw, or an array."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]> '
        f"g ({x or f'float[b, {T}, {D}] x'}) => ({out}) {{ {nodes} }}"
    )
    for name, value in weights.items():
        array = value if isinstance(value, np.ndarray) else rng.normal(size=value)
        kind = array.dtype if array.dtype.kind in "ib" else np.float32
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(kind), name))
    graph = read(proto)
    for node in graph.nodes:  # as the redirect names its own
        if node.op == "ReduceMax":
            node.name = f"regraft.redirect.0.{node.name}"
    return graph


def run(graph: gs.Graph, shape: tuple[int, ...] = (3, T, D)) -> NDArray[np.float32]:
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    for output in graph.outputs:
        output.dtype = np.float32
    out = graphs.run(write(graph, shapes_changed=True), {"x": x}, optimize=False)
    (value,) = out.values()
    return np.asarray(value, np.float32)


def known(
    shapes: dict[str, tuple[object, ...]],
) -> Callable[[int], dict[str, tuple[object, ...]]]:
    """Shapes for a number of images, which "b" stands for."""
    return lambda images: {
        name: tuple(images if n == "b" else n for n in s) for name, s in shapes.items()
    }


def ops(graph: gs.Graph) -> Counter[str]:
    graph.cleanup()
    return Counter(node.op for node in graph.nodes)


HEADS = np.array([0, 0, H, D // H], np.int64)
MERGE = np.array([0, 0, D], np.int64)
QKV = """q1 = MatMul(x, wq) q2 = Add(q1, bq) k1 = MatMul(x, wk) k2 = Add(k1, bk)
v1 = MatMul(x, wv) v2 = Add(v1, bv)
q3 = Reshape(q2, heads) k3 = Reshape(k2, heads) v3 = Reshape(v2, heads)
q = Transpose<perm = [0, 2, 1, 3]>(q3) v = Transpose<perm = [0, 2, 1, 3]>(v3)
"""
PLAIN = "k = Transpose<perm = [0, 2, 3, 1]>(k3) s = MatMul(q, k) "
END = """p = Softmax<axis = -1>(s) a = MatMul(p, v) a2 = Transpose<perm = [0, 2, 1, 3]>(a)
a3 = Reshape(a2, merge) """
OUT = "o = MatMul(a3, wo) y = Add(o, bo)"
WEIGHTS = {
    **{f"w{s}": (D, D) for s in "qkvo"},
    **{f"b{s}": (D,) for s in "qkvo"},
    "heads": HEADS,
    "merge": MERGE,
}


def attention(middle: str = PLAIN, out: str = OUT, **more: object) -> gs.Graph:
    return model(QKV + middle + END + out, **WEIGHTS, **more)


def test_attention_loses_its_key_bias_and_its_value_bias() -> None:
    before = run(attention())
    graph = attention()
    assert fuse_attention(graph, H, T) == (1, [])
    np.testing.assert_allclose(run(graph), before, atol=1e-5)
    assert (drop_key_bias(graph), move_value_bias(graph)) == (1, 1)
    np.testing.assert_allclose(run(graph), before, atol=1e-5)
    assert ops(graph) == {"MatMul": 4, "Add": 2, "MultiHeadAttention": 1}
    assert (drop_key_bias(graph), move_value_bias(graph)) == (0, 0)


def test_scales_on_either_side_and_on_scores_are_one_attribute() -> None:
    middle = """kt = Transpose<perm = [0, 2, 3, 1]>(k3) k = Mul(kt, half) qs = Div(q, two)
    s1 = MatMul(qs, k) s = Mul(s1, three) """
    numbers = {n: np.array(v, np.float32) for n, v in (("half", 0.5), ("two", 2), ("three", 3))}
    before = run(attention(middle, **numbers))
    graph = attention(middle, **numbers)
    assert fuse_attention(graph, H, T)[0] == 1
    node = next(n for n in graph.nodes if n.op == "MultiHeadAttention")
    assert node.attrs["scale"] == pytest.approx(0.75)
    np.testing.assert_allclose(run(graph), before, atol=1e-5)


ROTARY = """qr = Mul(q, cos) kr = Mul(k3, cosk) k = Transpose<perm = [0, 2, 3, 1]>(kr)
s = MatMul(qr, k) """
NORMED = """kn = LayerNormalization<axis = -1>(k3, gamma) k = Transpose<perm = [0, 2, 3, 1]>(kn)
s = MatMul(q, k) """


@pytest.mark.parametrize("middle", [ROTARY, NORMED], ids=["rotary", "key norm"])
def test_rotary_and_key_norm_keep_the_key_bias(middle: str) -> None:
    more = {"cos": (1, 1, T, D // H), "cosk": (1, T, 1, D // H), "gamma": (D // H,)}
    before = run(attention(middle, **more))
    graph = attention(middle, **more)
    assert fuse_attention(graph, H, T)[0] == 1
    assert drop_key_bias(graph) == 0
    assert move_value_bias(graph) == 1
    np.testing.assert_allclose(run(graph), before, atol=1e-5)


WHOLE_NORM = "kn = LayerNormalization<axis = -1>(k2, gamma) k3n = Reshape(kn, heads) "
ROTATED = "kh = Transpose<perm = [0, 2, 1, 3]>(k3) kr = Mul(kh, cos) qr = Mul(q, cos) "
# How an exporter turns the keys of any number of axes: by their own shape.
TURNED = """sh = Shape(KEYS) n1 = Slice(sh, i1, big) n2 = Slice(sh, i2, i1) n0 = Slice(sh, low, i2)
flat = Concat<axis = 0>(i1, n2, n1) back = Concat<axis = 0>(n0, n1, n2)
kf = Reshape(KEYS, flat) kt = Transpose<perm = [0, 2, 1]>(kf) ku = Reshape(kt, back)
k = Mul(ku, half) s = MatMul(QUERY, k) """
TURNS = {
    **{"i1": np.array([-1]), "i2": np.array([-2]), "low": np.array([-(2**63)])},
    **{"big": np.array([2**63 - 1]), "half": np.array(0.5, np.float32)},
}


@pytest.mark.parametrize(
    ("before_turn", "keys", "query", "shapes", "moves"),
    [
        (
            WHOLE_NORM + "kh = Transpose<perm = [0, 2, 1, 3]>(k3n) ",
            "kh",
            "q",
            {"kn": ("b", T, D), "kh": ("b", H, T, D // H)},
            {},
        ),
        (
            ROTATED,
            "kr",
            "qr",
            {"kr": ("b", H, T, D // H), "qr": ("b", H, T, D // H)},
            # Queries and keys were split before they were rotated.
            {"Reshape": 4, "Transpose": 4},
        ),
    ],
    ids=["norm", "rotary"],
)
def test_keys_are_taken_as_a_norm_or_a_rotation_left_them(
    before_turn: str,
    keys: str,
    query: str,
    shapes: dict[str, tuple[object, ...]],
    moves: dict[str, int],
) -> None:
    middle = before_turn + TURNED.replace("KEYS", keys).replace("QUERY", query)
    more = {**TURNS, "gamma": (D,), "cos": (1, 1, T, D // H)}
    before, graph = run(attention(middle, **more)), attention(middle, **more)
    assert fuse_attention(graph, H, T, shapes) == (1, [])
    node = next(n for n in graph.nodes if n.op == "MultiHeadAttention")
    assert node.attrs["scale"] == pytest.approx(0.5)
    left = ops(graph)
    assert "Shape" not in left
    assert {op: left[op] for op in ("Reshape", "Transpose") if left[op]} == moves
    np.testing.assert_allclose(run(graph), before, atol=1e-5)
    # Where its shape is not known, the keys are taken as they enter the product.
    other = attention(middle, **more)
    assert fuse_attention(other, H, T) == (1, [])
    assert ops(other)["Shape"] == 1
    np.testing.assert_allclose(run(other), before, atol=1e-5)
    assert fix_shapes(other, known({keys: ("b", H, T, D // H)})) == 2
    assert "Shape" not in ops(other)
    np.testing.assert_allclose(run(other), before, atol=1e-5)


@pytest.mark.parametrize(
    "nodes",
    [
        "sh = Shape<start = 0, end = 1>(x) n = Concat<axis = 0>(sh, one, one) "
        "c = Tile(probe, n) y = Add(c, x)",
        "sh = Shape<start = 0, end = 1>(x) n = Concat<axis = 0>(sh, one, one) "
        "c = Expand(probe, n) y = Add(c, x)",
    ],
    ids=["Tile", "Expand"],
)
def test_a_constant_is_repeated_without_a_computed_shape(nodes: str) -> None:
    pixels = "float[b, 3, 4, 4] pixels, "
    args = {"x": f"{pixels}float[b, {T}, {D}] x", "one": np.array([1]), "probe": (1, 1, D)}
    feeds = {
        "pixels": np.zeros((3, 3, 4, 4), np.float32),
        "x": np.random.default_rng(1).normal(size=(3, T, D)).astype(np.float32),
    }

    def values(graph: gs.Graph) -> NDArray[np.float32]:
        (value,) = graphs.run(write(graph, shapes_changed=True), feeds, optimize=False).values()
        return np.asarray(value, np.float32)

    before, graph = values(model(nodes, **args)), model(nodes, **args)
    assert fix_shapes(graph, known({"x": ("b", T, D)})) == 1
    (shape,) = [node for node in graph.nodes if node.op == "Shape"]
    assert [reader.op for reader in shape.outputs[0].outputs] == ["Expand"]
    np.testing.assert_array_equal(values(graph), before)


def test_arithmetic_in_integers_is_followed_exactly() -> None:
    nodes = """sh = Shape(x) n = Slice(sh, zero, one) d = Slice(sh, two, three)
    half = Div(d, two) pairs = Mul(half, two) t = Slice(sh, one, two)
    s = Concat<axis = 0>(n, t, two, half) u = Reshape(x, s) v = Neg(u)
    r = Concat<axis = 0>(n, t, pairs) y = Reshape(v, r)"""
    numbers = {name: np.array([i]) for i, name in enumerate(("zero", "one", "two", "three"))}
    before, graph = run(model(nodes, **numbers)), model(nodes, **numbers)
    assert fix_shapes(graph, known({"x": ("b", T, D)})) == 2
    assert ops(graph) == {"Reshape": 2, "Neg": 1}
    targets = [n.inputs[1].values.tolist() for n in graph.nodes if n.op == "Reshape"]
    assert targets == [[-1, T, 2, D // 2], [-1, T, D]]
    np.testing.assert_array_equal(run(graph), before)


@pytest.mark.parametrize(
    ("nodes", "shapes"),
    [
        ("z = Neg(x) sh = Shape(z) y = Reshape(z, sh)", {}),  # of an unknown shape
        ("sh = Shape(x) y = Reshape(x, sh)", {"x": ("b", "t", D)}),
        ("sh = Shape(x) y = Reshape(x, sh)", {"x": ("windows", T, D)}),  # not the images
        ("sh = Shape(x) y = Reshape(x, sh)", {"x": ("b", "b", D)}),  # two depend on the images
        # Arithmetic in floats is left out of the computation.
        (
            "sh = Shape(x) f = Cast<to = 1>(sh) i = Cast<to = 7>(f) y = Reshape(x, i)",
            {"x": ("b", T, D)},
        ),
        (
            """sh = Shape(x) f = Cast<to = 1>(sh) g = Mul(f, half) i = Cast<to = 7>(g)
            y = Reshape(x, i)""",
            {"x": ("b", T, D)},
        ),
        # Tile would multiply both rows.
        (
            "sh = Shape<start = 0, end = 1>(x) n = Concat<axis = 0>(sh, one, one) "
            "c = Tile(rows, n) r = ReduceSum<keepdims = 0>(c) y = Add(r, x)",
            {"x": ("b", T, D)},
        ),
        # Rounded, the same for few images and not for many.
        (
            "sh = Shape(x) m = Add(sh, two_) k = Div(m, four) y = Reshape(x, k)",
            {"x": ("b", T, D)},
        ),
        # Two lengths depend on the batch; one -1 cannot stand for both.
        ("sh = Shape(x) two = Concat<axis = 0>(n, n) u = Reshape(x, two) y = Add(x, x)", {}),
        (
            "t = ReduceSum<keepdims = 0>(x) ti = Cast<to = 7>(t) y = Reshape(x, ti)",
            {"x": ("b", T, D)},
        ),
    ],
)
def test_shapes_that_are_not_known_are_left(
    nodes: str, shapes: dict[str, tuple[object, ...]]
) -> None:
    nodes = nodes.replace("two = Concat", "n = Slice(sh, zero, one) two = Concat")
    graph = model(nodes, zero=np.array([0]), one=np.array([1]), half=np.array(0.5, np.float32))
    assert fix_shapes(graph, known(shapes or {"other": ("b", T, D)})) == 0


def test_shapes_are_not_asked_for_where_none_is_computed() -> None:
    def asked(images: int) -> dict[str, tuple[object, ...]]:
        raise AssertionError(images)

    assert fix_shapes(attention(), asked) == 0


def test_a_norm_before_the_projection_keeps_the_value_bias() -> None:
    out = "n = LayerNormalization<axis = -1>(a3, gamma) o = MatMul(n, wo) y = Add(o, bo)"
    before = run(attention(out=out, gamma=(D,)))
    graph = attention(out=out, gamma=(D,))
    assert fuse_attention(graph, H, T)[0] == 1
    assert (drop_key_bias(graph), move_value_bias(graph)) == (1, 0)
    np.testing.assert_allclose(run(graph), before, atol=1e-5)


def test_a_second_reader_keeps_the_value_bias() -> None:
    graph = attention(out="o = MatMul(a3, wo) y = Add(o, a3)")
    before = run(attention(out="o = MatMul(a3, wo) y = Add(o, a3)"))
    fuse_attention(graph, H, T)
    assert move_value_bias(graph) == 0
    np.testing.assert_allclose(run(graph), before, atol=1e-5)


def test_a_projection_without_bias_gets_one() -> None:
    out = "y = MatMul(a3, wo)"
    before = run(attention(out=out))
    graph = attention(out=out)
    fuse_attention(graph, H, T)
    assert move_value_bias(graph) == 1
    np.testing.assert_allclose(run(graph), before, atol=1e-5)


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (PLAIN.replace("s =", "s0 =") + "s = Add(s0, mask) ", "come from Add, not from one MatMul"),
        (PLAIN.replace("s =", "s0 =") + "s = Tanh(s0) ", "come from Tanh, not from one MatMul"),
    ],
)
def test_masks_and_caps_are_left_and_named(middle: str, reason: str) -> None:
    graph = attention(middle, mask=(1, 1, T, T))
    fused, left = fuse_attention(graph, H, T)
    assert fused == 0
    assert reason in left[0]


def test_layer_scale_is_folded_and_the_down_projection_follows() -> None:
    nodes = "a = MatMul(x, w) b = Add(a, c) y = Mul(b, gamma)"
    weights = {"w": (D, D), "c": (D,), "gamma": (D,)}
    before, graph = run(model(nodes, **weights)), model(nodes, **weights)
    weight, gamma = (graph.tensors()[name].values for name in ("w", "gamma"))
    folded, now = fold_layer_scale(graph, {7: weight})
    assert folded == 1
    np.testing.assert_allclose(now[7], weight * gamma, rtol=1e-6)
    np.testing.assert_allclose(run(graph), before, atol=1e-5)
    assert ops(graph) == {"MatMul": 1, "Add": 1}


def test_layer_scale_stays_where_the_product_has_other_readers() -> None:
    graph = model(
        "a = MatMul(x, w) b = Add(a, c) m = Mul(b, gamma) y = Add(m, b)",
        w=(D, D),
        c=(D,),
        gamma=(D,),
    )
    assert fold_layer_scale(graph, {})[0] == 0


def test_fp16_keeps_a_layer_scale_that_it_cannot_hold() -> None:
    from regraft_export.graph.cuda.fold_layer_scale import _scaled

    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float16)
    assert _scaled(weight, np.full(64, 0.1, np.float16)) is not None
    assert _scaled(weight, np.full(64, 1e-6, np.float16)) is None


CONV = "c = Conv<{}>(x, k, b) r = Reshape(c, flat) y = Transpose<perm = [0, 2, 1]>(r)"
IMAGE = {"k": (D, 3, 2, 4), "b": (D,), "flat": np.array([0, D, -1], np.int64)}


def test_the_patch_embedding_is_one_product() -> None:
    args = {"out": f"float[b, 6, {D}] y", "x": "float[b, 3, 6, 8] x", **IMAGE}
    nodes = CONV.format("strides = [2, 4]")
    before = run(model(nodes, **args), (2, 3, 6, 8))
    graph = model(nodes, **args)
    assert patch_matmul(graph, (6, 8)) is not None
    np.testing.assert_allclose(run(graph, (2, 3, 6, 8)), before, atol=1e-5)
    assert "Conv" not in ops(graph)


@pytest.mark.parametrize(
    "attributes", ["strides = [1, 4]", "strides = [2, 4], pads = [1, 0, 1, 0]"]
)
def test_other_convolutions_are_left(attributes: str) -> None:
    args = {"out": f"float[b, n, {D}] y", "x": "float[b, 3, 6, 8] x", **IMAGE}
    assert patch_matmul(model(CONV.format(attributes), **args), (6, 8)) is None


ONEHOT = np.zeros((1, T, 1), np.float32)
ONEHOT[0, -1] = -0.5
MLP = """u = MatMul(x, w1) ub = Add(u, b1) h = Gelu(ub) a = MatMul(h, w2) alone = Add(a, b2)
g = Gather<axis = 2>(h, columns) top = ReduceMax<keepdims = 1>(g, axis)
row = MatMul(top, rows) place = Mul(row, onehot) y = Add(alone, place)"""
MLPS = {
    **{"w1": (D, 12), "b1": (12,), "w2": (12, D), "b2": (D,), "rows": (2, D), "onehot": ONEHOT},
    "columns": np.array([1, 5], np.int64),
    "axis": np.array([1], np.int64),
}


def test_the_three_forms_of_the_redirect_are_equal() -> None:
    pixels = f"float[b, {T}, {D}] x"
    before = run(model(MLP, x=pixels, **MLPS))
    row = model(MLP, **MLPS)
    assert place_register_row(row, T) == 1
    np.testing.assert_allclose(run(row), before, atol=1e-5)
    assert ops(row)["Where"] == 1
    top = model(MLP, **MLPS)
    assert maximum_by_topk(top, T) == 1
    np.testing.assert_allclose(run(top), before, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 256, 257, 258, 578, 1371])
def test_the_maximum_of_many_tokens_is_taken_in_groups(tokens: int) -> None:
    nodes = "y = ReduceMax<keepdims = 1>(x, axis)"
    args = {"x": f"float[b, {tokens}, 3] x", "out": "float[b, 1, 3] y"}
    axis = np.array([1], np.int64)
    before = run(model(nodes, **args, axis=axis), (2, tokens, 3))
    graph = model(nodes, **args, axis=axis)
    assert maximum_by_topk(graph, tokens) == 1
    np.testing.assert_array_equal(run(graph, (2, tokens, 3)), before)
    tops = [node for node in graph.nodes if node.op == "TopK"]
    assert len(tops) == (1 if tokens <= 256 else 2)
    assert maximum_by_topk(model(nodes, **args, axis=axis), 65537) == 0
    own = model(nodes, **args, axis=axis)
    own.nodes[0].name = "the model's own pooling"
    assert maximum_by_topk(own, tokens) == 0
    assert maximum_by_topk(model(nodes, **args, axis=np.array([2], np.int64)), tokens) == 0


BLOCK = MLP.replace("y = Add(alone, place)", "o = Add(alone, place) y = Add(s, o)").replace(
    "u = MatMul(x, w1)",
    "s = Add(x, x) n = LayerNormalization<axis = -1>(s, gamma, beta) u = MatMul(n, w1)",
)
BLOCKS = {**MLPS, "gamma": (D,), "beta": (D,)}
ROW = {"row": ("b", 1, D)}


def test_a_register_is_added_to_the_residual() -> None:
    before, graph = run(model(BLOCK, **BLOCKS)), model(BLOCK, **BLOCKS)
    assert add_to_residual(graph, T, D, ROW, constants=True) == 1
    graph.cleanup()
    (write,) = [node for node in graph.nodes if node.op == "ScatterND"]
    assert write.attrs["reduction"] == "add"
    assert write.outputs[0].shape == ["batch", T, D]
    assert {n.op for n in write.inputs[0].outputs} == {"LayerNormalization", "ScatterND"}
    np.testing.assert_allclose(
        run(graph, (1, T, D)), run(model(BLOCK, **BLOCKS), (1, T, D)), atol=1e-5
    )
    np.testing.assert_allclose(run(graph), before, atol=1e-5)


@pytest.mark.parametrize("chosen", [True, False])
def test_a_constant_row_is_added_to_the_residual_where_chosen(chosen: bool) -> None:
    rows = np.random.default_rng(2).normal(size=D) * np.ones((T, D))
    rows[-1] += 3
    nodes = "s = Add(x, x) a = MatMul(s, w) o = Add(a, bias) y = Add(o, s)"
    # The residual's other reader is no norm, so it is left; without it, it is rewritten.
    assert add_to_residual(model(nodes, w=(D, D), bias=rows), T, D, ROW, constants=chosen) == 0
    nodes = nodes.replace("MatMul(s, w)", "MatMul(x, w)")
    before, graph = run(model(nodes, w=(D, D), bias=rows)), model(nodes, w=(D, D), bias=rows)
    assert add_to_residual(graph, T, D, ROW, constants=chosen) == int(chosen)
    np.testing.assert_allclose(run(graph), before, atol=1e-5)


def test_a_sum_that_leaves_or_is_no_residual_is_left() -> None:
    assert add_to_residual(model(MLP, **MLPS), T, D, ROW, constants=True) == 0
    # What is added is a row for every token, or may be: with `cls = keep` for example.
    for shapes in ({}, {"row": ("b", T, D)}):
        assert add_to_residual(model(BLOCK, **BLOCKS), T, D, shapes, constants=True) == 0
    read_twice = BLOCK.replace("y = Add(s, o)", "z = Add(s, o) y = Add(z, o)")
    assert add_to_residual(model(read_twice, **BLOCKS), T, D, ROW, constants=True) == 0


def test_cuts_are_left_to_the_copy_back() -> None:
    nodes = """front = Slice(x, zero, four, axis) back = Slice(x, four, five, axis)
    w = Add(front, front) one = Gather<axis = 1>(front, zero)"""
    numbers = {"zero": [0], "four": [4], "five": [5], "axis": [1]}
    out = f"float[b, 4, {D}] front, float[b, 1, {D}] back, float[b, 1, {D}] one"
    graph = model(nodes, out, **{k: np.array(v, np.int64) for k, v in numbers.items()})
    # Made by a node, as tokens are; x itself is an input.
    for node in graph.nodes:
        node.name = f"regraft.cut.{node.outputs[0].name}" if node.op == "Slice" else node.name
    graph.nodes.insert(
        0, gs.Node("Neg", "made", {}, [graph.inputs[0]], [gs.Variable("made", np.float32)])
    )
    for node in graph.nodes[1:]:
        node.inputs = [
            graph.nodes[0].outputs[0] if t is graph.inputs[0] else t for t in node.inputs
        ]
    for output in graph.outputs:
        output.dtype = np.float32
    parts = leave_whole(graph, T)
    assert {n: (p.start, p.stop) for n, p in parts.items()} == {"front": (0, 4), "back": (4, 5)}
    assert [t.name for t in graph.outputs] == ["regraft.whole", "one"]
    assert graph.outputs[0].shape == ["batch", T, D]
    assert ops(graph) == {"Neg": 1, "Gather": 1}  # one token is read from the whole


def cut_graph(start: int, stop: int, token: int | list[int]) -> gs.Graph:
    """Tokens ``start`` to ``stop`` of -x leave, and one of them by itself."""
    nodes = """whole = Neg(x) part = Slice(whole, start, stop, axis)
    one = Gather<axis = 1>(part, token)"""
    numbers = {"start": [start], "stop": [stop], "axis": [1], "token": token}
    one = f"float[b, {D}]" if isinstance(token, int) else f"float[b, 1, {D}]"
    out = f"float[b, t, {D}] part, {one} one"
    graph = model(nodes, out, **{k: np.array(v, np.int64) for k, v in numbers.items()})
    for node in graph.nodes:
        node.name = "regraft.cut.part" if node.op == "Slice" else node.name
        node.outputs[0].dtype = np.float32
    return graph


@pytest.mark.parametrize(("start", "token"), [(0, 1), (2, 0), (2, 1), (2, [1])])
def test_a_token_of_a_cut_is_the_same_token_of_the_whole(
    start: int, token: int | list[int]
) -> None:
    whole = -np.random.default_rng(1).normal(size=(2, T, D)).astype(np.float32)
    graph = cut_graph(start, 4, token)
    parts = leave_whole(graph, T)
    assert (parts["part"].start, parts["part"].stop) == (start, 4)
    graph.cleanup()
    assert ops(graph) == {"Neg": 1, "Gather": 1}
    found = graphs.run(write(graph, shapes_changed=True), {"x": -whole}, optimize=False)
    np.testing.assert_array_equal(found["one"], whole[:, start + np.array(token)])
    np.testing.assert_array_equal(found["regraft.whole"], whole)


@pytest.mark.parametrize("bounds", [(0, -1), (-2, 5), (0, np.iinfo(np.int64).max)])
def test_a_cut_that_does_not_count_from_the_front_is_left(bounds: tuple[int, int]) -> None:
    assert not leave_whole(graph := cut_graph(*bounds, 0), T)
    assert ops(graph) == {"Neg": 1, "Slice": 1, "Gather": 1}


def test_a_token_that_counts_from_the_end_of_a_cut_keeps_its_slice() -> None:
    assert leave_whole(graph := cut_graph(2, 4, -1), T)
    assert ops(graph) == {"Neg": 1, "Slice": 1, "Gather": 1}


def test_a_gated_mlp_is_not_widened() -> None:
    gated = MLP.replace("h = Gelu(ub)", "g0 = Sigmoid(ub) g1 = Tanh(ub) h = Mul(g0, g1)")
    assert widen_hidden(model(gated, **MLPS), T) == 0


def test_a_residual_and_a_norm_are_one_node() -> None:
    nodes = """a = MatMul(x, w) b = Add(a, c) s = Add(x, b)
    n = LayerNormalization<axis = -1, epsilon = 0.001>(s, gamma, beta) y = Add(n, s)"""
    weights = {"w": (D, D), "c": (D,), "gamma": (D,), "beta": (D,)}
    before, graph = run(model(nodes, **weights)), model(nodes, **weights)
    shapes = dict.fromkeys(("x", "a", "b", "s"), ("b", T, D))
    assert fuse_skip_norm(graph, shapes) == 1
    np.testing.assert_allclose(run(graph), before, atol=1e-5)
    assert ops(graph) == {"MatMul": 1, "SkipLayerNormalization": 1, "Add": 1}
    # A sum that broadcasts, or whose shapes are unknown, is left.
    assert fuse_skip_norm(model(nodes, **weights), {**shapes, "b": ("b", 1, D)}) == 0
    assert fuse_skip_norm(model(nodes, **weights), {}) in (0, 1)


@pytest.mark.parametrize(("kind", "fused"), [("none", 1), ("tanh", 0)])
def test_bias_and_exact_gelu_are_one_node(kind: str, fused: int) -> None:
    nodes = f'a = MatMul(x, w) b = Add(a, c) y = Gelu<approximate = "{kind}">(b)'
    weights = {"w": (D, D), "c": (D,)}
    before, graph = run(model(nodes, **weights)), model(nodes, **weights)
    assert fuse_bias_gelu(graph) == fused
    np.testing.assert_allclose(run(graph), before, atol=1e-5)
