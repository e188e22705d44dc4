"""The rewrite and the analysis behind it, on small graphs written as text."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import graphs
from tests.support.graphs import END, appended, floats, network

from regraft.errors import RewriteError
from regraft_export.graph.anchors import Anchors

# The nodes of a graph: (text, initializers, what must be mended).
TOKENWISE = {
    "baked heads and back": (
        "a = Reshape(tokens, s) b = Transpose<perm = [0, 2, 1, 3]>(a) "
        "c = Transpose<perm = [0, 2, 1, 3]>(b) final = Reshape(c, t)",
        "int64[4] s = {0, 17, 3, 4}, int64[3] t = {-1, 17, 12}",
        ["Reshape_0: 17 -> 19", "Reshape_3: 17 -> 19"],
    ),
    "live shapes are left alone": (
        "s = Shape(tokens) b = Gather<axis = 0>(s, zero) n = Gather<axis = 0>(s, one) "
        "t = Concat<axis = 0>(b, n, heads) a = Reshape(tokens, t) final = Reshape(a, s)",
        "int64[1] zero = {0}, int64[1] one = {1}, int64[2] heads = {3, 4}",
        [],
    ),
    "a count baked into a live shape": (
        "s = Shape<start = 0, end = 1>(tokens) t = Concat<axis = 0>(s, rest) "
        "a = Reshape(tokens, t) final = Reshape(a, u)",
        "int64[3] rest = {17, 3, 4}, int64[3] u = {0, 0, 12}",
        ["Concat_1: 17 -> 19"],
    ),
    "tokens of all images merged and split again": (
        "a = Reshape(tokens, s) b = Neg(a) final = Reshape(b, t)",
        "int64[2] s = {-1, 12}, int64[3] t = {-1, 17, 12}",
        ["Reshape_2: 17 -> 19"],
    ),
    "a product of the count": (
        "a = Reshape(tokens, s) b = Neg(a) final = Reshape(b, t)",
        f"int64[3] s = {{-1, {17 * 4}, 3}}, int64[3] t = {{-1, 17, 12}}",
        [f"Reshape_0: {17 * 4} -> {19 * 4}", "Reshape_2: 17 -> 19"],
    ),
    "a count that is computed from no token": (
        "n = Add(side, one) t = Concat<axis = 0>(all, n, heads) a = Reshape(tokens, t) "
        "b = Neg(a) c = Reshape(b, t) u = Concat<axis = 0>(all, n, width) final = Reshape(c, u)",
        "int64[1] side = {16}, int64[1] one = {1}, int64[1] all = {-1}, int64[2] heads = {3, 4}, "
        "int64[1] width = {12}",
        [f"Reshape_{i}: 17 -> 19, computed" for i in (2, 4, 6)],
    ),
    "heads merged into the batch": (
        "a = Reshape(tokens, s) b = Transpose<perm = [0, 2, 1, 3]>(a) c = Reshape(b, m) "
        "e = Exp(c) d = Reshape(e, b4) f = Transpose<perm = [0, 2, 1, 3]>(d) final = Reshape(f, t)",
        "int64[4] s = {0, 17, 3, 4}, int64[3] m = {-1, 17, 4}, int64[4] b4 = {-1, 3, 17, 4}, "
        "int64[3] t = {-1, 17, 12}",
        [
            "Reshape_0: 17 -> 19",
            "Reshape_2: 17 -> 19",
            "Reshape_4: 17 -> 19",
            "Reshape_6: 17 -> 19",
        ],
    ),
    "a reshape that lists every size but the batch": (
        "a = Reshape<allowzero = 1>(tokens, s) final = Reshape(a, t)",
        "int64[5] s = {-1, 1, 17, 1, 12}, int64[3] t = {0, 17, 12}",
        ["Reshape_0: 17 -> 19", "Reshape_1: 17 -> 19"],
    ),
    "prefix and patches by themselves": (
        "a, b = Split<axis = 1>(tokens, sizes) c = Reshape(b, s) d = Neg(c) e = Reshape(d, t) "
        "final = Concat<axis = 1>(a, e)",
        "int64[2] sizes = {1, 16}, int64[4] s = {-1, 16, 4, 3}, int64[3] t = {-1, 16, 12}",
        ["Split_0: 16 -> 18", "Reshape_1: 16 -> 18", "Reshape_3: 16 -> 18"],
    ),
    "a product of merged tokens": (
        "a = Reshape(tokens, s) b = Gemm<transB = 1>(a, w, c) final = Reshape(b, t)",
        f"int64[2] s = {{-1, 12}}, int64[3] t = {{-1, 17, 12}}, float[12] c = {floats(range(12))}, "
        f"float[12, 12] w = {floats(v % 7 for v in range(144))}",
        ["Reshape_2: 17 -> 19"],
    ),
    "expand": (
        "a = Unsqueeze(tokens, one) b = Expand(a, s) c = Gather<axis = 1>(b, zero) "
        "final = Identity(c)",
        "int64[1] one = {1}, int64[4] s = {1, 2, 17, 12}, int64 zero = {0}",
        ["Expand_1: 17 -> 19"],
    ),
    "expand to a shorter shape": (
        "final = Expand(tokens, s)",
        "int64[2] s = {17, 12}",
        ["Expand_0: 17 -> 19"],
    ),
    "three parts of the width": (
        "a, b, c = Split<axis = 2, num_outputs = 3>(tokens) d, e = Split<axis = -1>(a, sizes) "
        "final = Concat<axis = 2>(b, e, d, c)",
        "int64[2] sizes = {1, 3}",
        [],
    ),
    "first token and the rest": (
        "a = Slice(tokens, zero, one, one) b = Slice(tokens, one, end, one) "
        "final = Concat<axis = 1>(a, b)",
        f"int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] end = {{{END}}}",
        [],
    ),
    "part of the width": (
        "a = Slice(tokens, m, end, axis) b = Slice(tokens, zero, m, axis, one) "
        "final = Concat<axis = -1>(a, b)",
        "int64[1] m = {-5}, int64[1] end = {12}, int64[1] zero = {0}, int64[1] axis = {2}, "
        "int64[1] one = {1}",
        [],
    ),
    "squeeze and unsqueeze": (
        "a = Unsqueeze(tokens, axes) b = Squeeze(a, axes) c = Unsqueeze(b, one) "
        "final = Squeeze(c, one)",
        "int64[2] axes = {0, -1}, int64[1] one = {1}",
        [],
    ),
    "queries, keys, values": (
        "a = Reshape(tokens, s) b = Transpose<perm = [2, 0, 3, 1, 4]>(a) "
        "q = Gather<axis = 0>(b, zero) k = Gather<axis = 0>(b, two) c = Add(q, k) "
        "d = Transpose<perm = [0, 2, 1, 3]>(c) e = Reshape(d, t) final = Concat<axis = 2>(e, e, e)",
        "int64[5] s = {-1, 17, 3, 2, 2}, int64 zero = {0}, int64 two = {2}, "
        "int64[3] t = {-1, 17, 4}",
        ["Reshape_0: 17 -> 19", "Reshape_6: 17 -> 19"],
    ),
    "a norm and a reduction over the width": (
        "a = LayerNormalization<axis = -1>(tokens, scale, scale) b = ReduceMean(a, axis) "
        "c = ReduceSum<keepdims = 0>(tokens, axis) d = Unsqueeze(c, axis) e = Mul(b, d) "
        "final = Sub(tokens, e)",
        f"float[12] scale = {floats(range(12))}, int64[1] axis = {{2}}",
        [],
    ),
    "a condition that is the same for all tokens": (
        "a = Greater(tokens, limit) b = Clip(tokens, limit) final = Where(a, b, tokens)",
        f"float limit = {floats([0.3])}",
        [],
    ),
}


@pytest.mark.parametrize("name", TOKENWISE)
def test_every_token_keeps_its_result_when_registers_follow(name: str) -> None:
    nodes, initializers, expected = TOKENWISE[name]
    model = network(nodes, initializers=initializers)
    tokens = np.random.default_rng(0).normal(size=(3, 17, 12)).astype(np.float32)
    before = graphs.run(model, {"tokens": tokens})["final"]
    patched, mended = appended(model, registers=2)
    assert mended == expected
    for batch in (3, 1):
        after = graphs.run(patched, {"tokens": tokens[:batch]})["final"]
        assert after.shape == (batch, 19, 12)
        np.testing.assert_array_equal(after[:, :17], before[:batch])
    padded = np.concatenate([tokens, np.zeros((3, 2, 12), np.float32)], axis=1)
    alone = graphs.run(model, {"tokens": padded[:, 2:]})["final"]
    if name != "first token and the rest":
        after = graphs.run(patched, {"tokens": tokens})["final"]
        np.testing.assert_array_equal(after[:, 17:], alone[:, 15:])


def test_readers_of_one_computed_count_share_a_sum() -> None:
    nodes, initializers, _ = TOKENWISE["a count that is computed from no token"]
    patched, _ = appended(network(nodes, initializers=initializers))
    sums = [n.name for n in patched.graph.node if n.op_type == "Add"]
    assert len(sums) == 3  # side + 1, and one for each of the two shapes


def test_a_count_computed_from_the_images_size_stays_open() -> None:
    model = network(
        "s = Shape<start = 1, end = 2>(image) n = Add(s, one) b = Shape<start = 0, end = 1>(image) "
        "t = Concat<axis = 0>(b, n, heads) a = Reshape(tokens, t) c = Neg(a) "
        "u = Concat<axis = 0>(b, n, width) final = Reshape(c, u)",
        initializers="int64[1] one = {1}, int64[2] heads = {3, 4}, int64[1] width = {12}",
        inputs="float[batch, 16] image",
    )
    patched, mended = appended(model, registers=2)
    assert len(mended) == 2
    tokens = np.random.default_rng(0).normal(size=(3, 17, 12)).astype(np.float32)
    feeds = {"tokens": tokens, "image": np.zeros((3, 16), np.float32)}
    after = graphs.run(patched, feeds)["final"]
    np.testing.assert_array_equal(after[:, :17], -tokens)
    assert not after[:, 17:].any()


def test_attention_over_baked_counts() -> None:
    model = network(
        "a = Reshape(tokens, s) q = Transpose<perm = [0, 2, 1, 3]>(a) "
        "k = Transpose<perm = [0, 2, 3, 1]>(a) w = MatMul(q, k) p = Softmax<axis = -1>(w) "
        "m = MatMul(p, q) n = Transpose<perm = [0, 2, 1, 3]>(m) final = Reshape(n, t)",
        initializers="int64[4] s = {-1, 17, 3, 4}, int64[3] t = {-1, 17, 12}",
    )
    tokens = np.random.default_rng(0).normal(size=(2, 17, 12))
    patched, mended = appended(model)
    assert len(mended) == 2
    padded = np.concatenate([tokens, np.zeros((2, 1, 12))], axis=1)
    q = padded.reshape(2, 18, 3, 4).transpose(0, 2, 1, 3)
    weights = np.exp(q @ q.transpose(0, 1, 3, 2))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = (weights @ q).transpose(0, 2, 1, 3).reshape(2, 18, 12)
    after = graphs.run(patched, {"tokens": tokens.astype(np.float32)})["final"]
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)


REFUSED = {
    "a target that is computed from a product": (
        "a = Mul(n, m) b = Concat<axis = 0>(minus, a, three) final = Reshape(tokens, b)",
        "int64[1] n = {17}, int64[1] m = {4}, int64[1] minus = {-1}, int64[1] three = {3}",
        "node 'Reshape_2' (Reshape) reads tokens and its target dimension 68 cannot be decided",
    ),
    "half of a target that follows the tokens": (
        "s = Shape<start = 1, end = 2>(tokens) a = Mul(s, s) n = Div(a, m) "
        "b = Concat<axis = 0>(minus, n, width) final = Reshape(tokens, b)",
        "int64[1] m = {17}, int64[1] minus = {-1}, int64[1] width = {12}",
        "node 'Reshape_4' (Reshape) reads tokens and its target dimension 17 cannot be decided",
    ),
    "a per-token constant": (
        "final = Add(tokens, c)",
        f"float[1, 17, 1] c = {floats(range(17))}",
        "node 'Add_0' (Add) reads tokens and a constant with one entry per token cannot",
    ),
    "a per-token condition": (
        "final = Where(c, tokens, tokens)",
        f"bool[17, 1] c = {{{', '.join('01'[i % 2] for i in range(17))}}}",
        "node 'Where_0' (Where) reads tokens and a constant with one entry per token cannot",
    ),
    "a mean over tokens": (
        "a = ReduceMean(tokens, axis) final = Sub(tokens, a)",
        "int64[1] axis = {-2}",
        "node 'ReduceMean_0' (ReduceMean) reads tokens and a reduction over tokens, which would "
        "see the register, cannot",
    ),
    "a maximum over everything": (
        "a = ReduceMax(tokens) final = Sub(tokens, a)",
        "",
        "node 'ReduceMax_0' (ReduceMax) reads tokens and a reduction over tokens",
    ),
    "a norm over tokens": (
        "final = LayerNormalization<axis = 1>(tokens, scale)",
        "float[1] scale = {1.0}",
        "node 'LayerNormalization_0' (LayerNormalization) reads tokens and a norm over the token "
        "axis cannot",
    ),
    "a pooling product": (
        "a = MatMul(c, tokens) final = Add(tokens, a)",
        f"float[1, 17] c = {floats(range(17))}",
        "node 'MatMul_0' (MatMul) reads tokens and a product of (1, 17) and (5, 18, 12) cannot",
    ),
    "an unknown operator": (
        "final = CumSum(tokens, axis)",
        "int64 axis = {1}",
        "node 'CumSum_0' (CumSum) reads tokens and what this operator does to them cannot",
    ),
    "a split into equal parts": (
        "a, b = Split<axis = 1, num_outputs = 2>(tokens) final = Concat<axis = 1>(a, b)",
        "",
        "node 'Split_0' (Split) reads tokens and a split of the token axis into equal parts cannot",
    ),
    "parts in another order": (
        "a, b = Split<axis = 1>(tokens, sizes) final = Concat<axis = 1>(b, a)",
        "int64[2] sizes = {1, 16}",
        "node 'Concat_1' (Concat) reads tokens and a concatenation that puts something behind the "
        "register cannot",
    ),
    "a product with transposed tokens": (
        "a = Reshape(tokens, s) b = Gemm<transA = 1>(a, a) final = Gather<axis = 0>(b, zero)",
        "int64[2] s = {-1, 12}, int64 zero = {0}",
        "node 'Gemm_1' (Gemm) reads tokens and a product over (85, 90) and (85, 90) cannot",
    ),
    "an index from the end": (
        "a = Gather<axis = 1>(tokens, last) final = Sub(tokens, a)",
        "int64[1] last = {-1}",
        "node 'Gather_0' (Gather) reads tokens and an index counted from the end of the token "
        "axis cannot",
    ),
    "a live index from the end": (
        "n = Shape<start = 1, end = 2>(tokens) l = Sub(n, one) a = Gather<axis = 1>(tokens, l) "
        "final = Sub(tokens, a)",
        "int64[1] one = {1}",
        "node 'Gather_2' (Gather) reads tokens and its indices, computed from the token count, "
        "cannot",
    ),
    "a live end": (
        "n = Shape<start = 1, end = 2>(tokens) l = Sub(n, one) a = Slice(tokens, zero, l, one) "
        "final = Identity(a)",
        "int64[1] one = {1}, int64[1] zero = {0}",
        "node 'Slice_2' (Slice) reads tokens and its ends, computed from the token count, cannot",
    ),
    "a live start": (
        "n = Shape<start = 1, end = 2>(tokens) l = Sub(n, one) a = Slice(tokens, l, end, one) "
        "final = Identity(a)",
        f"int64[1] one = {{1}}, int64[1] end = {{{END}}}",
        "node 'Slice_2' (Slice) reads tokens and its starts, computed from the token count, cannot",
    ),
    "a concatenation with a per-token constant": (
        "b = Shape<start = 0, end = 1>(tokens) s = Concat<axis = 0>(b, rest) c = Slice(all, zero, "
        "b, zero) final = Concat<axis = 2>(tokens, all)",
        "int64[2] rest = {17, 1}, int64[1] zero = {0}",
        "node 'Concat_3' (Concat) reads tokens and a concatenation with something that has one "
        "entry per token cannot",
    ),
    "an unknown target": (
        "final = Reshape(tokens, wanted)",
        "",
        "node 'Reshape_0' (Reshape) reads tokens and its target shape ('wanted') cannot",
    ),
    "an unknown shape": (
        "a = NonZero(wanted) b = Cast<to = 1>(a) final = Mul(tokens, b)",
        "",
        "node 'Mul_2' (Mul) reads tokens and the shape of its input 'b' cannot",
    ),
    "a reshape across the batch": (
        "a = Reshape(tokens, s) final = Identity(a)",
        "int64[2] s = {17, -1}",
        "node 'Reshape_0' (Reshape) reads tokens and which of the dimensions (17, 60) holds the "
        "tokens cannot",
    ),
    "a reshape that cuts through tokens": (
        "final = Reshape(tokens, s)",
        "int64[3] s = {-1, 12, 17}",
        "node 'Reshape_0' (Reshape) reads tokens and which of the dimensions (12, 17) holds the "
        "tokens cannot",
    ),
}  # fmt: skip

SLICES = {
    "[0:17:1]": (0, 17, 1),  # exactly the old count: all tokens, or all but the register?
    "[0:18:1]": (0, 18, 1),
    "[-1:17:1]": (-1, 17, 1),
    "[0:-1:1]": (0, -1, 1),
    f"[0:{END}:2]": (0, END, 2),
}
for text, (start, end, step) in SLICES.items():
    REFUSED[f"the slice {text}"] = (
        "final = Slice(tokens, start, end, one, step)",
        f"int64[1] start = {{{start}}}, int64[1] end = {{{end}}}, int64[1] one = {{1}}, "
        f"int64[1] step = {{{step}}}",
        f"node 'Slice_0' (Slice) reads tokens and a slice {text} of the token axis cannot",
    )


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decided_is_an_error_that_names_the_node(name: str) -> None:
    nodes, initializers, message = REFUSED[name]
    inputs = "float[batch, 17, 1] all, int64[m] wanted"
    model = network(nodes, initializers=initializers, inputs=inputs)
    with pytest.raises(RewriteError) as caught:
        appended(model)
    assert str(caught.value).startswith(message)


def test_the_error_says_what_to_do() -> None:
    with pytest.raises(RewriteError) as caught:
        appended(network("final = CumSum(tokens, axis)", initializers="int64 axis = {1}"))
    assert str(caught.value) == (
        "node 'CumSum_0' (CumSum) reads tokens and what this operator does to them cannot be "
        "decided once a register is appended; export the model again without constants for its "
        "token count, or report this node"
    )


def same_tokens(model: onnx.ModelProto, count: int, width: int) -> list[str]:
    """Checks numerically that appending left the tokens' results alone; returns the mended."""
    tokens = np.random.default_rng(1).normal(size=(3, count, width)).astype(np.float32)
    patched, mended = appended(model)
    before = graphs.run(model, {"tokens": tokens})["final"]
    after = graphs.run(patched, {"tokens": tokens})["final"]
    np.testing.assert_array_equal(after[:, :count], before)
    return mended


@pytest.mark.parametrize("count", [4, 3, 12, 5])
def test_a_count_equal_to_another_size_is_told_apart_by_its_place(count: int) -> None:
    # 4 units a head, 3 heads, width 12, and 5 is the batch size that the analysis tries.
    mended = same_tokens(
        network(
            "a = Reshape(tokens, s) b = Transpose<perm = [0, 2, 1, 3]>(a) c = Reshape(b, m) "
            "d = Reshape(c, b4) e = Transpose<perm = [0, 2, 1, 3]>(d) final = Reshape(e, t)",
            count=count,
            initializers=f"int64[4] s = {{-1, {count}, 3, 4}}, int64[3] m = {{-1, {count}, 4}}, "
            f"int64[4] b4 = {{-1, 3, {count}, 4}}, int64[3] t = {{-1, {count}, 12}}",
        ),
        count,
        12,
    )
    assert [line.partition(": ")[2] for line in mended] == [f"{count} -> {count + 1}"] * 4


@pytest.mark.parametrize(
    ("count", "width", "target"),
    [
        (4, 12, "-1, 12, 4"),  # either could hold whole tokens, as far as divisors tell
        (4, 4, "-1, 2, 8"),
        (16, 64, "-1, 64, 16"),
        (5, 12, "-1, 12, 5"),  # only one is a multiple of 5, but it cuts through the tokens
        (6, 4, "-1, 2, 12"),
    ],
)
def test_a_count_that_cannot_be_told_from_another_size_is_an_error(
    count: int, width: int, target: str
) -> None:
    rank = target.count(",") + 1
    model = network(
        "final = Reshape(tokens, s)",
        count=count,
        width=width,
        initializers=f"int64[{rank}] s = {{{target}}}",
    )
    with pytest.raises(RewriteError) as caught:
        appended(model)
    made = tuple(int(v) for v in target.split(",")[1:])
    assert str(caught.value).startswith(
        f"node 'Reshape_0' (Reshape) reads tokens and which of the dimensions {made} holds the "
        "tokens cannot be decided"
    )


def test_a_shared_constant_is_mended_for_one_reader_only() -> None:
    model = network(
        "a = Reshape(tokens, s) b = Reshape(table, s) c = Slice(b, zero, one, one) "
        "final = Add(a, c) other = Reshape(table, s)",
        initializers="int64[3] s = {-1, 17, 12}, int64[1] zero = {0}, int64[1] one = {1}",
        inputs="float[batch, 204] table",
        more="float[batch, n2, d2] other",
    )
    patched, mended = appended(onnx.shape_inference.infer_shapes(model))
    assert mended == ["Reshape_0: 17 -> 18"]
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(2, 17, 12)).astype(np.float32)
    table = rng.normal(size=(2, 204)).astype(np.float32)
    out = graphs.run(patched, {"tokens": tokens, "table": table})
    np.testing.assert_array_equal(out["other"], table.reshape(2, 17, 12))
    np.testing.assert_array_equal(out["final"][:, :17], tokens + table.reshape(2, 17, 12)[:, :1])


@pytest.mark.parametrize("order", [("tokens", "turned"), ("turned", "tokens")])
def test_a_constant_that_two_readers_need_differently_is_an_error(order: tuple[str, str]) -> None:
    # (B, 4, 4) and its transpose, both reshaped by one concatenated shape.
    model = network(
        "turned = Transpose<perm = [0, 2, 1]>(tokens) s = Concat<axis = 0>(minus, sizes) "
        f"a = Reshape({order[0]}, s) b = Reshape({order[1]}, s) final = MatMul(a, b)",
        count=4,
        width=4,
        initializers="int64[1] minus = {-1}, int64[2] sizes = {4, 4}",
    )
    with pytest.raises(RewriteError) as caught:
        appended(model)
    assert str(caught.value).startswith(
        "node 'Reshape_3' (Reshape) reads tokens and a shared constant, 4, cannot be decided"
    )


@pytest.mark.parametrize("reshaped_first", [True, False])
def test_a_constant_that_is_also_computed_with_is_an_error(reshaped_first: bool) -> None:
    reshape, slice_ = "a = Reshape(tokens, s) ", "n = Gather<axis = 0>(s, one) e = Sub(n, one) "
    model = network(
        "s = Concat<axis = 0>(minus, sizes) "
        + (reshape + slice_ if reshaped_first else slice_ + reshape)
        + "final = Slice(a, zero, e, one)",
        initializers="int64[1] minus = {-1}, int64[2] sizes = {17, 12}, int64[1] one = {1}, "
        "int64[1] zero = {0}",
    )
    with pytest.raises(RewriteError, match="a shared constant, 17, cannot be decided"):
        appended(model)


def test_tokens_that_leave_on_another_way_are_refused() -> None:
    model = network(
        "inner = Exp(tokens) final = Neg(inner) other = ReduceMean(inner, axis)",
        initializers="int64[1] axis = {1}",
        more="float[batch, 1, 12] other",
    )
    with pytest.raises(RewriteError) as caught:
        appended(model)
    assert str(caught.value) == (
        "node 'ReduceMean_2' (ReduceMean) reads the tokens 'inner' inside the network; expected "
        "all features to leave through 'final', so it would see the register"
    )


def test_readers_of_the_final_tokens_and_of_single_tokens_are_no_leak() -> None:
    model = network(
        "inner = Exp(tokens) cls = Gather<axis = 1>(inner, zero) final = Sub(inner, cls) "
        "side = Neg(cls) other = ReduceMean(final, axis)",
        initializers="int64[1] axis = {1}, int64[1] zero = {0}",
        more="float[batch, 1, 12] other, float[batch, 1, 12] side",
    )
    assert appended(model)[1] == []


def test_the_rewrite_is_one_node_between_the_entry_and_its_readers() -> None:
    model = network("a = Exp(tokens) b = Neg(tokens) final = Add(a, b)")
    patched, mended = appended(model, registers=3)
    assert mended == []
    pad = patched.graph.node[0]
    assert (pad.op_type, pad.name, pad.input[0]) == ("Pad", "regraft.append_register", "tokens")
    assert len(patched.graph.node) == 4
    assert all("tokens" not in node.input for node in patched.graph.node[1:])


def test_new_names_avoid_those_in_use() -> None:
    model = network(
        "a = Reshape(tokens, s) final = Reshape(a, t)",
        initializers="int64[3] s = {-1, 17, 12}, int64[3] t = {-1, 17, 12}, "
        "int64[6] regraft_pads = {0, 0, 0, 0, 0, 0}",
    )
    for initializer, name in zip(
        model.graph.initializer, ("Reshape_0.tokens", "regraft.pads", "unused"), strict=True
    ):
        for node in model.graph.node:
            for i, given_name in enumerate(node.input):
                if given_name == initializer.name:
                    node.input[i] = name
        initializer.name = name
    patched, _ = appended(model)
    names = [t.name for t in patched.graph.initializer]
    assert len(names) == len(set(names))
    tokens = np.ones((1, 17, 12), np.float32)
    assert graphs.run(patched, {"tokens": tokens})["final"].shape == (1, 18, 12)


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(RewriteError, match="the graph has no tensor 'entry'"):
        appended(network("final = Exp(tokens)"), anchors=Anchors("entry", ("final",), "final"))


@st.composite
def regroupings(draw: st.DrawFn) -> tuple[int, int, list[int], list[int], int]:
    """T, the factors of D, where the target cuts them, and registers."""
    T = draw(st.integers(2, 20))
    factors = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    cuts = sorted(draw(st.sets(st.integers(1, len(factors)), max_size=3)))
    return T, int(np.prod(factors)), factors, cuts, draw(st.integers(1, 3))


@given(regroupings(), st.booleans(), st.booleans())
def test_a_mended_reshape_equals_numpys(
    case: tuple[int, int, list[int], list[int], int], merge_batch: bool, merge_width: bool
) -> None:
    T, D, factors, cuts, R = case
    parts = [int(np.prod(p)) for p in np.split(np.array(factors), cuts)]

    def target(tokens: int) -> list[int]:
        # The token axis may swallow the batch in front and the first factor behind.
        head = (
            [-1]
            if merge_batch and not merge_width
            else [-1, tokens * (parts[0] if merge_width else 1)]
        )
        return head + parts[1 if merge_width else 0 :]

    shape = target(T)
    rank = len(shape)
    model = network(
        "final = Reshape(tokens, s)",
        count=T,
        width=D,
        initializers=f"int64[{rank}] s = {{{', '.join(map(str, shape))}}}",
        final=f"float[{', '.join(f'd{i}' for i in range(rank))}] final",
    )
    tokens = np.arange(3 * T * D, dtype=np.float32).reshape(3, T, D)
    padded = np.concatenate([tokens, np.zeros((3, R, D), np.float32)], axis=1)

    def check(patched: onnx.ModelProto) -> None:
        after = graphs.run(patched, {"tokens": tokens})["final"]
        np.testing.assert_array_equal(after, padded.reshape(target(T + R)))

    rivals = [n for n in shape if n != -1 and n % T == 0]
    if len(rivals) > 1:
        # Another size could hold the tokens just as well: an error, or right all the same.
        with suppress(RewriteError):
            check(appended(model, registers=R)[0])
        return
    check(appended(model, registers=R)[0])
