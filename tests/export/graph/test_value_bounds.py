"""Bounds of all elements of a tensor: what is proven of masks, and of what nothing is said."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from tests.support import graphs

from regraft_export.graph.document import read, tensor
from regraft_export.graph.interval import Bounds
from regraft_export.graph.value_bounds import bounds

TRUE, FALSE = Bounds(1, 1, boolean=True), Bounds(0, 0, boolean=True)
ZERO = Bounds(0, 0)
INF = float("inf")


def of(nodes: str) -> tuple[Bounds | None, onnx.ModelProto]:
    """Bounds of ``out``, and the graph: n is a number of tokens, x and live are anything."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        g (int64 n, float[n] x, bool[3] live) => (float[n] y)
        <int64 nought = {{0}}, int64 one = {{1}}, int64 two = {{2}}, int64 minus = {{-1}},
         float zero = {{0.0}}, float few = {{0.5}}, float least = {{-3.0e38}},
         float odd = {{0.1}}, float half = {{-65504.0}}, float brain = {{-3.3895313892515355e38}},
         float under = {{-inf}}, int64[1] last = {{-1}}, bool[3] yes = {{1, 1, 1}},
         bool[3] mixed = {{1, 0, 1}}, float[3] ones = {{1, 1, 1}}, float[2] noughts = {{0, 0}},
         int64[2] shape = {{4, 3}}, int64 many = {{200}}, int8 byte = {{100}},
         uint8 bare = {{1}}, uint8 full = {{255}}>
        {{ {nodes} y = Identity(x) }}"""
    )
    return bounds(tensor(read(model), "out")), model


KNOWN = {
    "out = Expand(yes, shape)": TRUE,
    "out = Not(yes)": FALSE,
    "r = Range(nought, n, one) out = GreaterOrEqual(r, nought)": TRUE,
    "r = Range(nought, n, one) s = Add(r, nought) out = LessOrEqual(nought, s)": TRUE,
    "r = Range(two, n, one) s = Sub(r, two) out = Less(s, nought)": FALSE,
    "r = Range(nought, n, one) out = Greater(nought, r)": FALSE,
    "m = Not(yes) c = Cast<to = 1>(m) out = Mul(c, least)": ZERO,
    "m = Not(yes) c = Cast<to = 16>(m) d = Cast<to = 1>(c) out = Mul(least, d)": ZERO,
    "c = Cast<to = 1>(yes) s = ReduceSum(c, last) e = CastLike(few, s) f = Cast<to = 1>(yes) "
    "t = ReduceSum(f, last) o = Cast<to = 1>(one) out = Less(t, o)": FALSE,
    "out = Where(yes, zero, under)": ZERO,
    "out = Where(mixed, zero, few)": Bounds(0, 0.5),
    "out = And(yes, yes)": TRUE,
    "out = And(live, mixed)": Bounds(0, 1, boolean=True),
    "m = Not(yes) out = And(live, m)": FALSE,
    "out = Or(live, yes)": TRUE,
    "c = Cast<to = 1>(yes) out = Sub(c, ones)": ZERO,
    "a = Unsqueeze(noughts, last) b = Transpose(a) out = Concat<axis = 0>(b, b)": ZERO,
    "out = ConstantOfShape(shape)": ZERO,
    "out = Cast<to = 9>(zero)": FALSE,
    "out = Cast<to = 9>(few)": TRUE,
    "out = Cast<to = 10>(few)": Bounds(0.5, 0.5),
    "out = Cast<to = 10>(odd)": Bounds(-INF, INF),  # half precision rounds it to what it likes
    "out = Cast<to = 10>(least)": Bounds(-INF, INF),
    # The least number of half precision, and of bfloat16.
    "m = Not(yes) c = Cast<to = 10>(m) w = Cast<to = 10>(half) out = Mul(c, w)": ZERO,
    "m = Not(yes) c = Cast<to = 1>(m) b = Cast<to = 16>(brain) w = Cast<to = 1>(b) "
    "out = Mul(c, w)": ZERO,
    "out = Cast<to = 2>(many)": Bounds(200, 200),
    "c = Cast<to = 3>(one) out = Add(c, byte)": Bounds(101, 101),
    "out = Sub(full, bare)": Bounds(254, 254),
    "out = Add(bare, bare)": Bounds(2, 2),
}
UNKNOWN = [
    "out = Identity(x)",
    "out = Mul(x, zero)",  # x may be infinite
    "out = Mul(zero, under)",
    "out = Add(x, zero)",
    "m = Not(yes) c = Cast<to = 1>(m) out = Mul(c, under)",  # zero times infinity
    "m = Not(yes) c = Cast<to = 10>(m) w = Cast<to = 10>(least) out = Mul(c, w)",  # likewise
    "m = Not(yes) c = Cast<to = 10>(m) w = Cast<to = 10>(brain) out = Mul(c, w)",
    "r = Range(nought, n, minus) out = GreaterOrEqual(r, nought)",
    "r = Range(minus, n, one) out = GreaterOrEqual(r, nought)",
    "r = Range(nought, n, one) out = GreaterOrEqual(r, one)",
    "r = Range(nought, n, one) out = Less(r, two)",
    "out = Equal(one, one)",
    "s = Add(under, zero) u = Neg(under) out = Add(s, u)",
    "m = Unsqueeze(yes, last) c = Cast<to = 1>(m) out = Trilu(c)",
    "c = Cast<to = 1>(live) out = ReduceSum(c, last)",
    # Integers that wrap around.
    "c = Cast<to = 3>(many) z = Cast<to = 3>(nought) out = GreaterOrEqual(c, z)",
    "out = Cast<to = 3>(many)",
    "out = Cast<to = 2>(minus)",
    "out = Cast<to = 22>(many)",
    "out = Add(byte, byte)",
    "out = Sub(bare, full)",
    "out = Add(full, bare)",
    "r = Range(nought, n, one) out = Add(r, one)",
    "r = Range(nought, n, one) out = ReduceSum(r, last)",
]


@pytest.mark.parametrize("nodes", KNOWN)
def test_what_holds_for_every_element(nodes: str) -> None:
    known, model = of(nodes)
    assert known == KNOWN[nodes]
    model.graph.output.append(onnx.ValueInfoProto(name="out"))
    live = np.array([True, False, True])
    for n in (3, 300):
        feeds = {"n": np.array(n), "x": np.ones(n, np.float32), "live": live}
        values = graphs.run(model, feeds)["out"].astype(np.float64)
        assert known.low <= values.min()
        assert values.max() <= known.high


@pytest.mark.parametrize("nodes", UNKNOWN)
def test_where_nothing_is_said(nodes: str) -> None:
    known, _ = of(nodes)
    assert known is None


def test_what_is_read_twice_is_followed_once() -> None:
    sums = [f"z{i + 1} = Add(z{i}, z{i})" for i in range(60)]
    known, _ = of(" ".join(["z0 = Identity(zero)", *sums, "out = Identity(z60)"]))
    assert known == ZERO
