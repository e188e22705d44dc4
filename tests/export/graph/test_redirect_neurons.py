"""The rewrite of one down-projection, on graphs of nothing else, against Algorithm 2 in loops."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support import algorithm2, graphs

from regraft.errors import InputError, NeuronsError, RewriteError
from regraft.neurons import RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft.tokens import TokenLayout
from regraft_export.graph.anchors import DownProjection, down_projection
from regraft_export.graph.document import write
from regraft_export.graph.redirect_neurons import redirect_neurons

OPTIONS = [
    RedirectOptions(value, cls, patches, registers, (1.0, -0.5)[:registers])
    for value, cls, patches, registers in itertools.product(
        ("per-neuron", "per-layer", "constant"),
        ("zero", "keep"),
        ("zero", "mean", "only-outliers", "keep"),
        (1, 2),
    )
]
POSITIVE = (RegisterNeuron(3, 1, value=2.0), RegisterNeuron(3, 4, value=-0.5))
MIXED = (RegisterNeuron(3, 1, value=2.0), RegisterNeuron(3, 4, sign=-1, value=-1.5))


def layout(options: RedirectOptions, prefix: int = 2, class_token: bool = True) -> TokenLayout:
    return TokenLayout(class_token, prefix, (3, 2), 5, 4, 1, options.registers)


def weights(hidden: int = 7, width: int = 5) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(hidden, width)).astype(np.float32)
    return weight, rng.normal(size=width).astype(np.float32)


def projection(
    bias: str = "after", dtype: type = np.float32, hidden: int = 7, width: int = 5
) -> tuple[gs.Graph, DownProjection, gs.Constant]:
    """``h @ w + b``, and the down-projection as the anchors find it."""
    weight, offset = (a.astype(dtype) for a in weights(hidden, width))
    h = gs.Variable("h", dtype, ["batch", "tokens", hidden])
    w, b = gs.Constant("w", weight), gs.Constant("b", offset)
    product, y = gs.Variable("product", dtype), gs.Variable("y", dtype)
    nodes = [gs.Node("MatMul", "matmul", {}, [h, w], [product])]
    if bias == "none":
        nodes.append(gs.Node("Identity", "out", {}, [product], [y]))
    else:
        order = [product, b] if bias == "after" else [b, product]
        nodes.append(gs.Node("Add", "bias", {}, order, [y]))
    final = gs.Variable("final", dtype, ["batch", "tokens", width])
    nodes.append(gs.Node("Relu", "reader", {}, [y], [final]))
    graph = gs.Graph(nodes, [h], [final], opset=20, ir_version=10)
    return graph, down_projection(graph.nodes, weight, 3), b


def redirected(
    neurons: tuple[RegisterNeuron, ...],
    options: RedirectOptions,
    bias: str = "after",
    prefix: int = 2,
    class_token: bool = True,
) -> tuple[onnx.ModelProto, int]:
    graph, down, _ = projection(bias)
    added = redirect_neurons(graph, down, neurons, options, layout(options, prefix, class_token))
    model = write(graph, shapes_changed=True)
    onnx.checker.check_model(model, full_check=True)
    return model, added


def expected(
    h: NDArray[np.float32],
    neurons: tuple[RegisterNeuron, ...],
    options: RedirectOptions,
    prefix: int = 2,
    class_token: bool = True,
    bias: bool = True,
) -> NDArray[np.float64]:
    weight, offset = weights()
    changed = algorithm2.redirect(
        h, neurons, options, prefix=prefix, patches=6, class_token=class_token
    )
    return np.maximum(changed @ weight + offset * bias, 0)


@pytest.mark.parametrize("neurons", [POSITIVE, MIXED], ids=["positive", "mixed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_graph_is_algorithm_2(
    options: RedirectOptions, neurons: tuple[RegisterNeuron, ...]
) -> None:
    model, _ = redirected(neurons, options)
    h = np.random.default_rng(1).normal(size=(3, 8 + options.registers, 7)).astype(np.float32)
    result = graphs.run(model, {"h": h})["final"]
    np.testing.assert_allclose(result, expected(h, neurons, options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", ["before", "none"])
@pytest.mark.parametrize("value", ["per-neuron", "per-layer", "constant"])
def test_every_form_of_the_bias(value: str, bias: str) -> None:
    options = RedirectOptions(value)
    model, _ = redirected(MIXED, options, bias)
    h = np.random.default_rng(2).normal(size=(2, 9, 7)).astype(np.float32)
    result = graphs.run(model, {"h": h})["final"]
    right = expected(h, MIXED, options, bias=bias != "none")
    np.testing.assert_allclose(result, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prefix", "class_token"), [(0, False), (1, True), (3, False), (5, True)])
@pytest.mark.parametrize("patches", ["zero", "only-outliers"])
def test_every_kind_of_prefix(prefix: int, class_token: bool, patches: str) -> None:
    options = RedirectOptions(cls="keep", patches=patches)
    model, _ = redirected(POSITIVE, options, prefix=prefix, class_token=class_token)
    h = np.random.default_rng(3).normal(size=(2, prefix + 7, 7)).astype(np.float32)
    result = graphs.run(model, {"h": h})["final"]
    right = expected(h, POSITIVE, options, prefix, class_token)
    np.testing.assert_allclose(result, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "neurons", "bias", "nodes"),
    [
        ("per-neuron", POSITIVE, "after", 5),
        ("per-neuron", POSITIVE, "none", 5),
        ("per-neuron", MIXED, "after", 6),
        ("constant", POSITIVE, "after", 0),
        ("constant", MIXED, "before", 0),
        ("constant", POSITIVE, "none", 1),
    ],
)
def test_the_default_form_costs_few_nodes(
    value: str, neurons: tuple[RegisterNeuron, ...], bias: str, nodes: int
) -> None:
    before = len(write(projection(bias)[0], shapes_changed=True).graph.node)
    model, added = redirected(neurons, RedirectOptions(value), bias)
    assert added == nodes
    assert len(model.graph.node) - before == nodes


def test_the_five_nodes() -> None:
    model, _ = redirected(POSITIVE, RedirectOptions())
    added = [n.op_type for n in model.graph.node if n.name.startswith("regraft.")]
    assert added == ["Gather", "ReduceMax", "MatMul", "Mul", "Add"]


def test_the_activation_is_read_by_nothing_but_the_product_and_the_columns() -> None:
    model, _ = redirected(MIXED, RedirectOptions(patches="only-outliers", cls="keep"))
    assert sorted(n.op_type for n in model.graph.node if "h" in n.input) == ["Gather", "MatMul"]


@pytest.mark.parametrize("value", ["per-neuron", "constant"])
def test_the_rows_are_zero_in_a_copy_of_the_weight(value: str) -> None:
    graph, down, bias = projection()
    original = down.weight
    kept = original.values.copy(), bias.values.copy()
    options = RedirectOptions(value)
    redirect_neurons(graph, down, POSITIVE, options, layout(options))
    rewritten = down.matmul.inputs[1]
    assert rewritten.name == "regraft.redirect.3.weight"
    assert not rewritten.values[[1, 4]].any()
    others = [0, 2, 3, 5, 6]
    np.testing.assert_array_equal(rewritten.values[others], kept[0][others])
    np.testing.assert_array_equal(original.values, kept[0])
    np.testing.assert_array_equal(bias.values, kept[1])


def test_a_constant_value_gives_every_token_its_bias() -> None:
    options = RedirectOptions("constant", registers=2, scale=(1.0, 3.0))
    graph, down, bias = projection()
    redirect_neurons(graph, down, MIXED, options, layout(options))
    table = next(t for t in down.bias_add.inputs if isinstance(t, gs.Constant)).values
    weight = weights()[0]
    written = 2.0 * weight[1] - 1.5 * weight[4]
    assert table.shape == (10, 5)
    np.testing.assert_array_equal(table[:8], np.tile(bias.values, (8, 1)))
    np.testing.assert_allclose(table[8], bias.values + written, rtol=1e-5)
    np.testing.assert_allclose(table[9], bias.values + 3 * written, rtol=1e-5)


@pytest.mark.parametrize(
    ("scale", "value", "what", "mend"),
    [
        (65504.0, 21.0, "they write", "give a smaller --scale, or a wider precision"),
        (1.0, 1e5, "recorded values are", "give a wider precision"),  # no scale would help
    ],
)
def test_a_constant_that_overflows_is_refused(
    scale: float, value: float, what: str, mend: str
) -> None:
    options = RedirectOptions("constant", scale=(scale,))
    graph, down, _ = projection(dtype=np.float16)
    said = (
        rf"^layer 3, value = constant: {what} numbers up to [1-9].*e\+0\d, which float16 cannot "
        rf"hold; {mend}$"
    )
    with pytest.raises(InputError, match=said):
        redirect_neurons(graph, down, [RegisterNeuron(3, 1, value=value)], options, layout(options))


def test_a_bias_that_other_layers_share_is_theirs_as_before() -> None:
    # The exporter keeps one tensor of zeros for all biases that are zero.
    graph, down, bias = projection()
    other = gs.Variable("other", np.float32, ["batch", "tokens", 5])
    graph.nodes.append(gs.Node("Add", "elsewhere", {}, [down.output, bias], [other]))
    graph.outputs.append(other)
    options = RedirectOptions("constant")
    redirect_neurons(graph, down, POSITIVE, options, layout(options))
    assert graph.nodes[-1].inputs[1] is bias
    h = np.random.default_rng(0).normal(size=(1, 9, 7)).astype(np.float32)
    out = graphs.run(write(graph, shapes_changed=True), {"h": h})
    difference = np.maximum(out["other"] - bias.values, 0) - out["final"]
    np.testing.assert_allclose(difference, 0, atol=1e-5)


def test_a_constant_value_without_values_names_the_neuron() -> None:
    graph, down, _ = projection()
    neurons = (RegisterNeuron(3, 1, value=2.0), RegisterNeuron(3, 4))
    options = RedirectOptions("constant")
    with pytest.raises(NeuronsError) as caught:
        redirect_neurons(graph, down, neurons, options, layout(options))
    assert str(caught.value) == (
        "value = constant needs the `value` of every neuron; (layer 3, index 4) has none (written "
        "by hand?): run `regraft find`, or use value = per-neuron"
    )


def test_half_precision_stays_half_precision() -> None:
    for options in OPTIONS[::5]:
        graph, down, _ = projection(dtype=np.float16)
        redirect_neurons(graph, down, MIXED, options, layout(options))
        model = write(graph, shapes_changed=True)
        onnx.checker.check_model(model, full_check=True)
        floats = {t.data_type for t in model.graph.initializer} - {onnx.TensorProto.INT64}
        assert floats == {onnx.TensorProto.FLOAT16}
        h = np.random.default_rng(4).normal(size=(2, 8 + options.registers, 7))
        result = graphs.run(model, {"h": h.astype(np.float16)})["final"]
        right = expected(h.astype(np.float16), MIXED, options)
        np.testing.assert_allclose(result.astype(np.float64), right, rtol=2e-2, atol=2e-2)


def test_two_redirected_layers_get_names_of_their_own() -> None:
    graph, down, _ = projection()
    options = RedirectOptions(patches="only-outliers", cls="keep")
    redirect_neurons(graph, down, MIXED, options, layout(options))
    redirect_neurons(graph, down, POSITIVE, options, layout(options))
    model = write(graph, shapes_changed=True)
    names = [t.name for t in model.graph.initializer] + [n.name for n in model.graph.node]
    assert len(names) == len(set(names))


@given(
    st.integers(1, 3),
    st.integers(0, 3),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from(OPTIONS),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_shape_equals_the_loops(
    batch: int,
    prefix: int,
    grid: tuple[int, int],
    hidden: int,
    width: int,
    options: RedirectOptions,
    class_token: bool,
    random: object,
) -> None:
    rng = np.random.default_rng(random.randrange(2**32))
    chosen = rng.permutation(hidden)[: rng.integers(1, hidden + 1)]
    neurons = tuple(
        RegisterNeuron(3, int(i), sign=int(rng.choice([-1, 1])), value=float(rng.normal()))
        for i in sorted(chosen)
    )
    class_token = class_token and prefix > 0
    patches = grid[0] * grid[1]
    # Of two patches each is one deviation off the mean: rounding would decide.
    assume(options.patches != "only-outliers" or patches != 2)
    tokens = TokenLayout(class_token, prefix, grid, width, 4, 1, options.registers)
    graph, down, _ = projection(hidden=hidden, width=width)
    redirect_neurons(graph, down, neurons, options, tokens)
    count = prefix + patches + options.registers
    h = rng.normal(size=(batch, count, hidden)).astype(np.float32)
    result = graphs.run(write(graph, shapes_changed=True), {"h": h}, optimize=False)["final"]
    weight, offset = weights(hidden, width)
    changed = algorithm2.redirect(
        h, neurons, options, prefix=prefix, patches=patches, class_token=class_token
    )
    right = np.maximum(changed @ weight + offset, 0)
    np.testing.assert_allclose(result, right, rtol=1e-4, atol=1e-4)


def test_a_weight_is_found_by_its_value() -> None:
    weight = weights()[0]
    graph, _, _ = projection()
    found = down_projection(graph.nodes, weight.copy(), 3)
    assert (found.matmul.name, found.activation.name, found.output.name) == ("matmul", "h", "y")
    assert found.bias_add is not None
    near = weight.copy()
    near[6, 4] = np.nextafter(near[6, 4], np.float32(9))
    for other in (near, weight.T.copy(), weight.astype(np.float64), weight[:-1]):
        with pytest.raises(RewriteError) as caught:
            down_projection(graph.nodes, other, 3)
        assert str(caught.value) == (
            "layer 3: 0 MatMul nodes multiply by the down-projection's weight "
            f"{tuple(other.shape)}; expected exactly one"
        )


def test_two_equal_weights_in_one_block_are_refused() -> None:
    graph, down, _ = projection()
    again = gs.Variable("again", np.float32)
    graph.nodes.append(
        gs.Node("MatMul", "twin", {}, [down.activation, gs.Constant("w2", weights()[0])], [again])
    )
    with pytest.raises(RewriteError) as caught:
        down_projection(graph.nodes, weights()[0], 3)
    assert str(caught.value) == (
        "layer 3: 2 MatMul nodes multiply by the down-projection's weight (7, 5); expected exactly "
        "one"
    )


def test_an_add_that_is_no_bias_is_left_alone() -> None:
    weight = weights()[0]
    graph, _, _ = projection()
    bias = graph.nodes[1]
    bias.inputs[1] = gs.Constant("table", np.ones((9, 5), np.float32))
    found = down_projection(graph.nodes, weight, 3)
    assert (found.bias_add, found.bias, found.output.name) == (None, None, "product")
    bias.inputs[1] = gs.Variable("residual", np.float32)
    assert down_projection(graph.nodes, weight, 3).bias_add is None


def test_a_product_with_two_readers_has_no_bias_of_its_own() -> None:
    graph, down, _ = projection()
    extra = gs.Variable("extra", np.float32)
    graph.nodes.append(gs.Node("Neg", "extra", {}, [down.matmul.outputs[0]], [extra]))
    found = down_projection(graph.nodes, weights()[0], 3)
    assert (found.bias_add, found.output.name) == (None, "product")
