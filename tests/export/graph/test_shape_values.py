from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from regraft_export.graph.shape_arithmetic import evaluate
from regraft_export.graph.shape_values import (
    Baked,
    Element,
    Elements,
    from_constant,
    from_shape,
    plain,
)


def node(op: str, **attrs: object) -> gs.Node:
    return gs.Node(op, "node", attrs, [], [])


def constant(*values: int, owner: gs.Node | None = None, slot: int = 0) -> Elements:
    array = gs.Constant("values", np.array(values, dtype=np.int64))
    elements = from_constant(array, owner or node("Concat"), slot)
    assert elements is not None
    return elements


def scalar(value: int) -> Elements:
    elements = from_constant(gs.Constant("value", np.array(value)), node("Gather"), 1)
    assert elements is not None
    return elements


def shape() -> Elements:
    return from_shape(node("Shape"), (5, 17, 12), (5, 18, 12))


def pairs(elements: Elements | None) -> list[tuple[int, int]]:
    assert elements is not None
    return [(e.before, e.after) for e in elements.flat]


def test_a_shape_is_known_before_and_after() -> None:
    assert pairs(shape()) == [(5, 5), (17, 18), (12, 12)]
    part = from_shape(node("Shape", start=1, end=2), (5, 17, 12), (5, 18, 12))
    assert pairs(part) == [(17, 18)]
    last = from_shape(node("Shape", start=-2), (5, 17, 12), (5, 18, 12))
    assert pairs(last) == [(17, 18), (12, 12)]


def test_an_element_of_a_constant_knows_where_it_is_baked() -> None:
    owner = node("Reshape")
    elements = constant(0, 17, owner=owner, slot=1)
    assert [e.origin for e in elements.flat] == [Baked(owner, 1, 0), Baked(owner, 1, 1)]
    # Equal content is not the same place: nodes are compared by identity.
    assert Baked(node("Reshape"), 1, 0) != Baked(node("Reshape"), 1, 0)
    assert Baked(owner, 1, 0) != Baked(owner, 1, 1)


def test_only_small_tensors_describe_shapes() -> None:
    scale = gs.Constant("scale", np.full(1, 0.5, dtype=np.float32))
    table = gs.Constant("table", np.zeros(65, dtype=np.int64))
    known = from_constant(scale, node("Mul"), 1)
    assert known is not None
    assert [e.before for e in known.flat] == [0.5]
    assert from_constant(table, node("Gather"), 1) is None


def test_elements_pass_through_with_their_origin() -> None:
    owner = node("Concat")
    baked = constant(17, 12, owner=owner, slot=1)
    joined = evaluate(node("Concat", axis=0), [shape(), baked])
    assert pairs(joined) == [(5, 5), (17, 18), (12, 12), (17, 17), (12, 12)]
    assert joined is not None
    assert joined[3].origin == Baked(owner, 1, 0)
    picked = evaluate(node("Gather"), [joined, constant(3, 1)])
    assert pairs(picked) == [(17, 17), (17, 18)]
    assert picked is not None
    assert picked[0].origin == Baked(owner, 1, 0)
    one = evaluate(node("Gather"), [joined, scalar(1)])
    assert one is not None
    assert (one.shape, pairs(one)) == ((), [(17, 18)])
    back = evaluate(node("Unsqueeze"), [one, constant(0)])
    assert back is not None
    assert (back.shape, pairs(back)) == ((1,), [(17, 18)])
    flat = evaluate(node("Squeeze"), [back])
    assert flat is not None
    assert flat.shape == ()
    assert pairs(evaluate(node("Cast", to=7), [joined])) == pairs(joined)
    assert pairs(evaluate(node("Identity"), [joined])) == pairs(joined)


def test_slices_of_shapes() -> None:
    values = constant(1, 2, 3, 4)
    cut = evaluate(node("Slice"), [values, constant(1), constant(3)])
    assert plain(cut) == [2, 3]
    cut = evaluate(node("Slice"), [values, constant(0), constant(4), constant(0), constant(2)])
    assert plain(cut) == [1, 3]


@pytest.mark.parametrize(
    ("op", "expected"),
    [("Add", (19, 20)), ("Sub", (15, 16)), ("Mul", (34, 36)), ("Div", (8, 9))],
)
def test_arithmetic_is_done_before_and_after(op: str, expected: tuple[int, int]) -> None:
    tokens = evaluate(node("Gather"), [shape(), scalar(1)])
    result = evaluate(node(op), [tokens, scalar(2)])
    assert result is not None
    assert (result.shape, pairs(result)) == ((), [expected])
    assert result.item().origin is None


def test_arithmetic_of_a_baked_number_is_no_longer_baked() -> None:
    result = evaluate(node("Mul"), [constant(17), constant(64)])
    assert result is not None
    assert result[0] == Element(17 * 64, 17 * 64, None)


def test_what_is_no_shape_arithmetic_is_unknown() -> None:
    assert evaluate(node("MatMul"), [shape(), shape()]) is None
    assert evaluate(node("Concat", axis=0), [shape(), None]) is None
    assert evaluate(node("Concat", axis=0), []) is None
