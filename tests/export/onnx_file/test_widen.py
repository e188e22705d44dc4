"""Narrow types become float32 everywhere a model names them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support import graphs

from regraft_export.onnx_file.widen import BFLOAT16, NARROW, widen_nodes, widened

NUMBERS = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


def model(kind: int) -> onnx.ModelProto:
    """x -> Cast -> LayerNormalization -> Attention -> If, a function; all of one type."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight = numpy_helper.from_array(np.ones(4, dtype), "weight")
    half = numpy_helper.from_array(np.array(0.5, dtype), "half")
    value = helper.make_tensor_value_info
    then = helper.make_graph(
        [helper.make_node("Mul", ["a", "inner"], ["then"])],
        "then",
        [],
        [value("then", kind, None)],
        [numpy_helper.from_array(np.array(2, dtype), "inner")],
    )
    other = helper.make_graph(
        [helper.make_node("Cast", ["a"], ["other"], to=kind)],
        "other",
        [],
        [value("other", kind, None)],
    )
    nodes = [
        helper.make_node("Cast", ["x"], ["n"], to=kind),
        helper.make_node("LayerNormalization", ["n", "weight"], ["l"], stash_type=kind),
        helper.make_node(
            "Attention", ["l", "l", "l"], ["a"],
            q_num_heads=1, kv_num_heads=1, softmax_precision=kind,
        ),
        helper.make_node("Constant", [], ["c"], value=half),
        helper.make_node("If", ["yes"], ["i"], then_branch=then, else_branch=other),
        helper.make_node("Twice", ["i", "c"], ["t"], domain="own"),
        helper.make_node("Cast", ["t"], ["y"], to=TensorProto.FLOAT),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 3, 4]), value("yes", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, [1, 3, 4])],
        [weight],
        value_info=[value("l", kind, [1, 3, 4])],
    )
    body = [
        helper.make_node("Cast", ["v"], ["w"], to=kind),
        helper.make_node("Add", ["w", "k"], ["z"]),
    ]
    imports = [helper.make_opsetid("", 23)]
    function = helper.make_function("own", "Twice", ["v", "k"], ["z"], body, imports)
    return helper.make_model(
        graph,
        opset_imports=[*imports, helper.make_opsetid("own", 1)],
        functions=[function],
        ir_version=10,
    )


@pytest.mark.parametrize("kind", NARROW, ids=NUMBERS.get)
def test_a_twin_runs_in_float32(kind: int) -> None:
    twin = widened(model(kind), NARROW)
    onnx.checker.check_model(twin, full_check=True)
    assert NUMBERS[kind] not in onnx.printer.to_text(twin)
    stash = {a.name: a.i for n in twin.graph.node for a in n.attribute if a.name.endswith("type")}
    assert stash == {"stash_type": TensorProto.FLOAT}
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    y = {v: graphs.run(twin, {"x": x, "yes": np.array(v)})["y"] for v in (True, False)}
    np.testing.assert_allclose(y[True] - 0.5, 2 * (y[False] - 0.5), rtol=1e-6)


def test_other_types_and_the_model_itself_stay() -> None:
    given = model(TensorProto.FLOAT16)
    before = given.SerializeToString()
    assert widened(given, BFLOAT16).SerializeToString() == before
    widened(given, NARROW)
    assert given.SerializeToString() == before


def test_nodes_alone_and_weights_that_lie_elsewhere() -> None:
    given = model(TensorProto.BFLOAT16)
    given.graph.initializer[0].ClearField("raw_data")
    assert widened(given).graph.initializer[0].data_type == TensorProto.FLOAT
    widen_nodes(given.graph.node, NARROW)
    kinds = {a.i for n in given.graph.node for a in n.attribute if a.name.endswith("precision")}
    assert kinds == {TensorProto.FLOAT}
