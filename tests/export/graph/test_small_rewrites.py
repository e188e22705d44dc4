"""The rewrites that cut registers off, drop masks and add outputs; names and spans."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from tests.support import graphs
from tests.support.graphs import network

from regraft.errors import RewriteError
from regraft.tokens import TokenLayout
from regraft_export.graph.anchors import Anchors, attention_probabilities, block_span
from regraft_export.graph.attention_outputs import cls_to_patches, to_every_token
from regraft_export.graph.document import (
    Editor,
    Names,
    ancestors,
    read,
    replace_uses,
    tensor,
    write,
)
from regraft_export.graph.drop_neutral_mask import attentions, drop_neutral_mask
from regraft_export.graph.norm_outputs import token_norms
from regraft_export.graph.remove_register import remove_register, set_outputs


def test_whatever_reads_the_final_tokens_does_not_see_the_registers() -> None:
    # Nine tokens enter, of which the last two stand for registers.
    model = network(
        "inner = Neg(tokens) final = Exp(inner) pooled = ReduceMean<keepdims = 0>(final, axis) "
        "largest = ReduceMax<keepdims = 0>(final, axis)",
        count=9,
        width=4,
        initializers="int64[1] axis = {1}",
        more="float[batch, 4] pooled, float[batch, 4] largest",
    )
    graph = read(model)
    without, registers = remove_register(graph, "final", ["inner", "final"], 7, 2)
    assert list(without) == ["final", "inner"]
    pooled, largest = graph.outputs[1:]
    tokens7, tokens2 = ("batch", 7, 4), ("batch", 2, 4)
    set_outputs(
        graph,
        {
            "last": (without["final"], tokens7),
            "hidden": (without["inner"], tokens7),
            "again": (without["final"], tokens7),
            "registers": (registers, tokens2),
            "pooled": (pooled, ("batch", 4)),
            "largest": (largest, ("batch", 4)),
        },
    )
    proto = write(graph, shapes_changed=True)
    onnx.checker.check_model(proto, full_check=True)
    x = np.random.default_rng(0).normal(size=(3, 9, 4)).astype(np.float32)
    out = graphs.run(proto, {"tokens": x})
    assert list(out) == ["last", "hidden", "again", "registers", "pooled", "largest"]
    e = np.exp(-x)
    np.testing.assert_allclose(out["last"], e[:, :7], rtol=1e-6)
    np.testing.assert_array_equal(out["again"], out["last"])
    np.testing.assert_array_equal(out["hidden"], -x[:, :7])
    np.testing.assert_allclose(out["registers"], e[:, 7:], rtol=1e-6)
    np.testing.assert_allclose(out["pooled"], e[:, :7].mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(out["largest"], e[:, :7].max(axis=1), rtol=1e-5)


def test_outputs_are_float32_under_their_names_whatever_they_were() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        g (float16[batch, 3, 2] tokens) => (float16[batch, 3, 2] last) {
            last = Neg(tokens) inner = Exp(last) }"""
    )
    graph = read(onnx.shape_inference.infer_shapes(model))
    inner = tensor(graph, "inner")
    # An output takes a name that another tensor has, and one is an input of the graph.
    set_outputs(
        graph,
        {
            "last": (inner, ("batch", 3, 2)),
            "same": (tensor(graph, "tokens"), ("batch", 3, 2)),
        },
    )
    proto = write(graph, shapes_changed=True)
    onnx.checker.check_model(proto, full_check=True)
    assert [o.type.tensor_type.elem_type for o in proto.graph.output] == [1, 1]
    x = np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float16)
    out = graphs.run(proto, {"tokens": x})
    np.testing.assert_allclose(out["last"], np.exp(-x), rtol=2e-3)
    np.testing.assert_array_equal(out["same"], x.astype(np.float32))


LAYOUT = TokenLayout(True, 2, (3, 2), 12, 1, 4, 1)


def attention_graph() -> gs.Graph:
    return read(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 20]>
            g (float[batch, 4, 9, 9] scores) => (float[batch, 4, 9, 9] mixed) {
                p = Softmax<axis = -1>(scores) mixed = Neg(p) }"""
        )
    )


def probabilities(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_attention_of_cls_to_the_patch_grid() -> None:
    graph = attention_graph()
    p = attention_probabilities(graph.nodes, 5)
    grid = cls_to_patches(graph, p, LAYOUT, 5)
    set_outputs(graph, {"attentions.5": (grid, ("batch", 4, 3, 2))})
    scores = np.random.default_rng(0).normal(size=(3, 4, 9, 9)).astype(np.float32)
    out = graphs.run(write(graph, shapes_changed=True), {"scores": scores})["attentions.5"]
    expected = probabilities(scores)[:, :, 0, 2:8].reshape(3, 4, 3, 2)
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize("class_token", [True, False])
def test_attention_to_every_token_includes_the_register(class_token: bool) -> None:
    graph = attention_graph()
    layout = TokenLayout(class_token, 2, (3, 2), 12, 1, 4, 1)
    every = to_every_token(graph, attention_probabilities(graph.nodes, 0), layout, 0)
    set_outputs(graph, {"attentions.0": (every, ("batch", 4, 9))})
    scores = np.random.default_rng(0).normal(size=(3, 4, 9, 9)).astype(np.float32)
    out = graphs.run(write(graph, shapes_changed=True), {"scores": scores})["attentions.0"]
    p = probabilities(scores)
    expected = p[:, :, 0] if class_token else p[:, :, 2:8].mean(axis=2)
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("count", "nodes"),
    [(0, "final = Exp(tokens)"), (2, "a = Softmax(tokens) final = Softmax(a)")],
)
def test_a_block_must_have_one_softmax(count: int, nodes: str) -> None:
    graph = read(network(nodes))
    with pytest.raises(RewriteError) as caught:
        attention_probabilities(graph.nodes, 7)
    assert str(caught.value) == (
        f"layer 7: {count} Softmax nodes in the block; expected exactly one, its attention's (is "
        "attention fused already?)"
    )


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_norms_of_every_token_in_float32(kind: str) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        g ({kind}[batch, 5, 8] tokens) => ({kind}[batch, 5, 8] hidden) {{ hidden = Neg(tokens) }}"""
    )
    graph = read(model)
    norms = token_norms(graph, tensor(graph, "hidden"), 2)
    set_outputs(graph, {"norms.2": (norms, ("batch", 5))})
    proto = write(graph, shapes_changed=True)
    onnx.checker.check_model(proto, full_check=True)
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds == (["Neg", "ReduceL2"] if kind == "float" else ["Neg", "Cast", "ReduceL2"])
    # 300 squared is more than half precision holds.
    x = np.random.default_rng(0).uniform(300, 500, (2, 5, 8))
    x = x.astype(np.float16 if kind == "float16" else np.float32)
    out = graphs.run(proto, {"tokens": x})["norms.2"]
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, np.linalg.norm(x.astype(np.float64), axis=2), rtol=1e-5)


MASKED = (
    "m = Expand(mask, shape) w = Where(m, zero, low) s = Add(scores, w) p = Softmax<axis = -1>(s) "
    "n = IsNaN(p) g = Where(n, nought, p) out = Neg(g)"
)


def masked(
    nodes: str = MASKED, mask: str = "1, 1, 1", zero: float = 0.0, nought: float = 0.0
) -> tuple[int, onnx.ModelProto]:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[batch, 2, 3, 3] scores, bool[1] dynamic) => (float[batch, 2, 3, 3] out)
        <bool[1, 1, 1, 3] mask = {{{mask}}}, int64[4] shape = {{1, 1, 3, 3}},
         float zero = {{{zero}}}, float low = {{-10000.0}}, float nought = {{{nought}}}>
        {{ {nodes} }}"""
    )
    graph = read(model)
    dropped = attentions(drop_neutral_mask(graph))
    proto = write(graph, shapes_changed=False)
    onnx.checker.check_model(proto, full_check=True)
    return dropped, proto


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_a_mask_that_lets_everything_through_is_dropped_with_its_guard() -> None:
    dropped, model = masked()
    assert dropped == 1
    assert kinds(model) == ["Softmax", "Neg"]
    scores = np.random.default_rng(0).normal(size=(2, 2, 3, 3)).astype(np.float32)
    out = graphs.run(model, {"scores": scores, "dynamic": np.array([True])})["out"]
    np.testing.assert_allclose(out, -probabilities(scores), rtol=1e-5)


@pytest.mark.parametrize(
    "nodes",
    [
        MASKED.replace("Add(scores, w)", "Add(w, scores)"),
        MASKED.replace("m = Expand(mask, shape)", "i = Identity(mask) m = Expand(i, shape)"),
        MASKED.replace("m = Expand(mask, shape) w = Where(m,", "w = Where(mask,"),
    ],
)
def test_other_ways_to_write_the_same_mask(nodes: str) -> None:
    dropped, model = masked(nodes)
    assert dropped == 1
    assert kinds(model) == ["Softmax", "Neg"]


@pytest.mark.parametrize(
    ("opset", "shape", "keys", "dropped"),
    [
        (24, "3", "batch, 2, 3, 4", 1),
        (24, "1, 1, 3", "batch, 2, 3, 4", 1),
        (24, "1, 1, 1, 2", "batch, 2, 3, 4", 0),
        (24, "1", "batch, 2, 3, 4", 0),  # padded, not repeated
        (24, "3", "batch, 2, tokens, 4", 0),
        (25, "2", "batch, 2, 3, 4", 0),
        (23, "1", "batch, 2, 3, 4", 1),  # repeated
        (23, "3", "batch, 2, tokens, 4", 1),
    ],
)
def test_a_mask_of_an_attention_is_dropped_where_it_reaches_every_key(
    opset: int, shape: str, keys: str, dropped: int
) -> None:
    ones = ", ".join("1" * int(shape[-1]))
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": {opset}]>
        g (float[batch, 2, 3, 4] q, float[{keys}] k, float[{keys}] v)
        => (float[batch, 2, 3, 4] out) <bool[{shape}] mask = {{{ones}}}>
        {{ a = Attention(q, k, v, mask) out = Neg(a) }}"""
    )
    graph = read(model)
    assert attentions(drop_neutral_mask(graph)) == dropped
    assert len(graph.nodes[0].inputs) == 4 - dropped


@pytest.mark.parametrize(("shape", "dropped"), [("tokens", 1), ("others", 0)])
def test_a_computed_mask_reaches_every_key_where_its_length_has_their_name(
    shape: str, dropped: int
) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 24]>
        g (float[batch, 2, tokens, 4] x) => (float[batch, 2, tokens, 4] out)
        <bool[1] yes = {{1}}, bool[{shape}] mask>
        {{ n = Shape<start = 2, end = 3>(x) mask = Expand(yes, n)
           a = Attention(x, x, x, mask) out = Neg(a) }}"""
    )
    assert attentions(drop_neutral_mask(read(model))) == dropped


def test_a_mask_of_an_attention_with_three_axes() -> None:
    for length, dropped in ((3, 1), (2, 0)):
        model = onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["": 24]>
            g (float[batch, 3, 8] x) => (float[batch, 3, 8] out)
            <bool[{length}] mask = {{{", ".join("1" * length)}}}>
            {{ a = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x, mask) out = Neg(a) }}"""
        )
        assert attentions(drop_neutral_mask(read(model))) == dropped


ATTENDED = (
    "c = Cast<to = 1>(mask) i = Not(mask) d = Cast<to = 1>(i) low_d = Mul(d, low) "
    "s = Add(scores, low_d) p = Softmax<axis = -1>(s) a = MatMul(p, scores) "
    "t = ReduceSum(c, last) never = Less(t, one) w = Where(never, zero, a) out = Neg(w)"
)


def attended(nodes: str = ATTENDED, mask: str = "1, 1, 1") -> list[str]:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[batch, 2, 3, 3] scores) => (float[batch, 2, 3, 3] out)
        <bool[1, 1, 1, 3] mask = {{{mask}}}, int64[1] last = {{-1}}, float one = {{1.0}},
         float zero = {{0.0}}, float low = {{-10000.0}}>
        {{ {nodes} }}"""
    )
    graph = read(model)
    before = graphs.run(model, {"scores": np.eye(3, dtype=np.float32) * np.ones((2, 2, 1, 1), "f")})
    drop_neutral_mask(graph)
    proto = write(graph, shapes_changed=False)
    onnx.checker.check_model(proto, full_check=True)
    after = graphs.run(proto, {"scores": np.eye(3, dtype=np.float32) * np.ones((2, 2, 1, 1), "f")})
    np.testing.assert_allclose(after["out"], before["out"], rtol=1e-6)
    return kinds(proto)


def test_rows_that_are_never_without_a_key_lose_their_guard() -> None:
    assert attended() == ["Softmax", "MatMul", "Neg"]
    # An output of the graph keeps its name, and so its node.
    assert "Where" in attended(ATTENDED.replace("w = Where", "out = Where").rpartition(" out")[0])


@pytest.mark.parametrize(
    ("nodes", "mask", "left"),
    [
        (ATTENDED, "0, 0, 0", {"Where", "Add"}),
        (ATTENDED, "1, 0, 1", {"Where", "Add"}),
        (ATTENDED.replace("Where(never, zero, a)", "Where(never, one, a)"), "1, 1, 1", {"Where"}),
        (ATTENDED.replace("Where(never, zero, a)", "Where(never, a, zero)"), "1, 1, 1", {"Where"}),
        (ATTENDED.replace("p = Softmax<axis = -1>(s)", "p = Neg(s)"), "1, 1, 1", {"Add"}),
    ],
    ids=["every row", "a key", "by ones", "inverted", "no softmax"],
)
def test_what_guards_something_stays(nodes: str, mask: str, left: set[str]) -> None:
    assert left <= set(attended(nodes, mask))


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": "1, 0, 1"},
        {"zero": 0.5},
        {"nodes": MASKED.replace("Expand(mask, shape)", "Expand(dynamic, shape)")},
        {"nodes": MASKED.replace("Expand(mask, shape)", "Not(mask)")},
        {"nodes": MASKED.replace("Add(scores, w)", "Mul(scores, w)")},
    ],
    ids=["masks something", "adds something", "live mask", "computed mask", "not added"],
)
def test_a_mask_that_does_something_stays(changes: dict[str, object]) -> None:
    dropped, model = masked(**changes)
    assert dropped == 0
    assert "Where" in kinds(model)
    assert "IsNaN" in kinds(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"nought": 1.0},
        {"nodes": MASKED.replace("IsNaN(p)", "IsNaN(scores)")},
        {"nodes": MASKED.replace("n = IsNaN(p)", "q = Neg(p) n = IsNaN(q)")},
        {"nodes": MASKED.replace("Where(n, nought, p)", "Where(n, p, nought)")},
        {"nodes": MASKED.replace("n = IsNaN(p)", "n = Less(p, zero)")},
    ],
    ids=["replaces by one", "of the scores", "of another", "inverted", "no NaN"],
)
def test_a_guard_that_is_not_the_softmax_s_own_stays(changes: dict[str, object]) -> None:
    dropped, model = masked(**changes)
    assert dropped == 1
    assert kinds(model).count("Where") == 1


def test_a_guard_without_a_mask_stays() -> None:
    nodes = "p = Softmax<axis = -1>(scores) n = IsNaN(p) g = Where(n, nought, p) out = Neg(g)"
    dropped, model = masked(nodes)
    assert dropped == 0
    assert kinds(model) == ["Softmax", "IsNaN", "Where", "Neg"]


def test_names_are_handed_out_once() -> None:
    graph = read(network("a = Exp(tokens) final = Neg(a)"))
    names = Names(graph)
    assert [names.new(stem) for stem in ("a", "Exp_0", "b", "b", "b", "b_2")] == [
        "a_2",
        "Exp_0_2",
        "b",
        "b_2",
        "b_3",
        "b_2_2",
    ]


def test_every_node_has_a_name_after_reading_and_the_proto_is_not_changed() -> None:
    model = network("a = Exp(tokens) final = Neg(a)")
    before = model.SerializeToString()
    graph = read(model)
    assert [node.name for node in graph.nodes] == ["Exp_0", "Neg_1"]
    assert model.SerializeToString() == before


def test_replacing_uses_spares_those_asked_for_and_reaches_outputs() -> None:
    graph = read(network("a = Exp(tokens) b = Add(a, a) final = Mul(a, b)"))
    a = tensor(graph, "a")
    editor = Editor(graph)
    new = editor.node("Neg", "new", [a])
    replace_uses(graph, a, new, keep=editor.added)
    assert [t.name for t in graph.nodes[1].inputs] == ["new.out", "new.out"]
    assert graph.nodes[-1].inputs[0] is a
    replace_uses(graph, tensor(graph, "final"), a)
    assert graph.outputs == [a]


def test_unused_nodes_are_not_written_and_stale_shapes_neither() -> None:
    model = network("a = Exp(tokens) b = Neg(a) final = Exp(a)")
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("a", 1, ["batch", 17, 12]))
    kept = write(read(model), shapes_changed=False)
    assert [n.op_type for n in kept.graph.node] == ["Exp", "Exp"]
    assert [v.name for v in kept.graph.value_info if v.type.tensor_type.HasField("shape")] == ["a"]
    dropped = write(read(model), shapes_changed=True)
    assert not [v for v in dropped.graph.value_info if v.type.tensor_type.HasField("shape")]
    assert dropped.graph.output[0].type.tensor_type.HasField("shape")


def test_the_span_of_a_block_ends_where_the_block_before_ends() -> None:
    graph = read(
        network("entry = Exp(tokens) a = Neg(entry) one = Exp(a) b = Neg(one) final = Exp(b)")
    )
    anchors = Anchors("entry", ("one", "final"), "final")
    names = [sorted(n.name for n in block_span(graph, anchors, i)) for i in (0, 1)]
    assert names == [["Exp_2", "Neg_1"], ["Exp_4", "Neg_3"]]
    assert len(ancestors(tensor(graph, "final"))) == 5


def test_a_type_that_the_file_does_not_record_is_not_taken_for_float32() -> None:
    graph = read(network("final = Identity (tokens)", initializers=""))
    value = graph.outputs[0]
    value.dtype = None
    set_outputs(graph, {"out": (value, ["batch", 17, 12])})
    assert [node.op for node in graph.nodes] == ["Identity", "Cast"]
    norms = token_norms(graph, value, 0)
    assert norms.inputs[0].inputs[0].inputs[0].op == "Cast"
