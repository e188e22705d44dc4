"""Graphs with regraft's own operators: where they fit, where they do not, and equal numbers.

The numbers are those of what the operators stand for; their kernels run in `make test-gpu`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from onnx import helper
from tests.export.graph.cuda.test_rewrites import BLOCK, BLOCKS, D, T, model, ops, run
from tests.support import graphs, models, pictures, traces

from regraft.engines.parts import METADATA
from regraft.neurons import Neurons, RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft_export.graph.cuda.choices import Choices
from regraft_export.graph.cuda.fuse import Fused, fuse, prepare
from regraft_export.graph.cuda.gate_operator import gate_by_operator
from regraft_export.graph.cuda.own_functions import spell_out
from regraft_export.graph.cuda.redirect_operator import DOMAIN, MOST_NEURONS, redirect_by_operator
from regraft_export.graph.document import write
from regraft_export.graph.patch import Patch, Traced, Wanted, build

Trace = Callable[..., Traced]
OWN = Choices(operators=True, whole=False)


def own(fused: Fused) -> Counter[str]:
    return Counter(n.op_type for n in fused.proto.graph.node if n.domain == DOMAIN)


def written(found: Counter[str]) -> Counter[str]:
    """Rows that are written, by an activation or alone."""
    kinds: Counter[str] = Counter()
    for name, count in found.items():
        for kind in ("Redirected", "Row"):
            kinds[kind] += count * (f"{kind}_" in name)
    return +kinds


def expect_equal(traced: Traced, family: str, patch: Patch | None) -> Fused:
    """Five pictures through both graphs; returns the one with operators."""
    fused = fuse(prepare(traced, OWN), patch, Wanted(), OWN)
    assert METADATA not in {entry.key for entry in fused.proto.metadata_props}
    spell_out(fused.proto)
    pixels = {"pixel_values": pictures.pixels(5, models.FAMILIES[family].size)}
    right = graphs.run(build(traced, patch, Wanted()).proto, pixels, optimize=False)
    got = graphs.run(fused.proto, pixels, optimize=False)
    for name, value in right.items():
        assert traces.error(got[name], value) < 1e-5
    return fused


@pytest.mark.parametrize("value", ["per-neuron", "constant"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_equals_the_portable_graph(traced: Trace, family: str, value: str) -> None:
    patch = Patch(models.neurons(models.vit(family)), RedirectOptions(value))
    fused = expect_equal(traced(family), family, patch)
    found, depth = own(fused), models.vit(family).layout.depth
    assert written(found) == {"Redirected" if value == "per-neuron" else "Row": 2}
    assert fused.fusions.redirects == 2
    assert fused.fusions.operators == found.total()
    assert fused.fusions.gelus == (0 if "swiglu" in family else depth + ("siglip" in family))
    assert not {"AddRedirected_fp32", "AddRow_fp32"} & set(found)  # each goes along
    activation = {"swiglu": "SwiGlu", "hf_clip": "QuickGelu"}
    name = next((name for part, name in activation.items() if part in family), "Gelu")
    activations = sum(count for op, count in found.items() if op.startswith(f"Biased{name}"))
    assert activations == depth + ("siglip" in family)  # its pooling has an MLP, too
    # Queries, keys and values.
    assert sum(found[f"ThreeProducts{biased}Biased_fp32"] for biased in range(4)) == depth
    # Their projection, and the two of the MLP.
    products = sum(count for name, count in found.items() if "Product" in name)
    assert products - depth >= 3 * depth


def test_signs_of_both_kinds_go_into_the_operator(traced: Trace) -> None:
    some = models.neurons(models.vit("timm")).neurons
    mixed = [
        RegisterNeuron(n.layer, n.index, n.score, (-1) ** i, n.value) for i, n in enumerate(some)
    ]
    fused = expect_equal(traced("timm"), "timm", Patch(Neurons(tuple(mixed)), RedirectOptions()))
    assert own(fused)["BiasedGeluRedirected_fp32"] == 2
    assert not {"Gather", "TopK"} & {
        n.op_type for n in fused.proto.graph.node if n.name.startswith("regraft.redirect")
    }


@pytest.mark.parametrize(
    "options",
    [
        RedirectOptions("per-neuron", "zero", "zero", 2, (1.0, -0.5)),
        RedirectOptions("per-neuron", "zero", "zero", 1, (2.0,)),
        RedirectOptions("constant", "zero", "zero", 2, (1.0, -0.5)),
        RedirectOptions("per-layer"),
        RedirectOptions("per-neuron", "keep"),
        RedirectOptions("per-neuron", "zero", "only-outliers"),
    ],
    ids=lambda o: f"{o.value} {o.cls} {o.patches} {o.registers}",
)
def test_other_redirects_keep_their_nodes(traced: Trace, options: RedirectOptions) -> None:
    patch = Patch(models.neurons(models.vit("timm")), options)
    assert not written(own(expect_equal(traced("timm"), "timm", patch)))


@pytest.mark.parametrize(("family", "name"), [("timm_swiglu", "SwiGlu"), ("hf_clip", "QuickGelu")])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_has_operators_of_its_own(
    traced: Trace, precision: str, family: str, name: str
) -> None:
    neurons = models.neurons(models.vit(family))
    for value, what in (("per-neuron", "Redirected"), ("constant", "Row")):
        patch = Patch(neurons, RedirectOptions(value))
        prepared = prepare(traced(family, precision))
        fused = fuse(prepared, patch, Wanted(), Choices(operators=True))
        found = own(fused)
        alone = models.vit(family).layout.depth - 2
        kinds = (found[f"Biased{name}{what}_{precision}"], found[f"Biased{name}_{precision}"])
        assert kinds == (2, alone)
        assert all(op.endswith(precision) for op in found)


ONE = np.zeros((1, T, 1), np.float32)
ONE[0, -1] = 1
LAYER = {**BLOCKS, "onehot": ONE}


def spelled(graph: gs.Graph, inputs: str = "x") -> NDArray[np.float32]:
    """What a graph gives for drawn inputs, operators spelled out; a letter an input."""
    graph.import_domains = [*graph.import_domains, helper.make_opsetid(DOMAIN, 1)]
    for output in graph.outputs:
        output.dtype = np.float32
    proto = write(graph, shapes_changed=False)
    spell_out(proto)
    rng = np.random.default_rng(1)
    feeds = {name: rng.normal(size=(3, T, D)).astype(np.float32) for name in inputs}
    (value,) = graphs.run(proto, feeds, optimize=False).values()
    return np.asarray(value, np.float32)


def test_a_redirect_is_one_node_on_the_residual() -> None:
    before, graph = run(model(BLOCK, **LAYER)), model(BLOCK, **LAYER)
    assert redirect_by_operator(graph, T, D) == 1
    graph.cleanup()
    (node,) = [n for n in graph.nodes if n.domain == DOMAIN]
    assert node.outputs[0].shape == ["batch", T, D]
    assert not {"Gather", "ReduceMax", "Mul"} & set(ops(graph))
    np.testing.assert_allclose(spelled(graph), before, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        ("y = Add(s, o)", "z = Add(s, o) y = Add(z, o)"),  # the sum has a second reader
        ("y = Add(s, o)", "z = Add(s, o) y = Add(z, s)"),  # the residual has one
        ("ReduceMax<keepdims = 1>(g, axis)", "ReduceMean<keepdims = 1>(g, axis)"),
        ("Gather<axis = 2>(h, columns)", "GatherElements<axis = 2>(h, elements)"),
    ],
    ids=["sum read twice", "residual read twice", "mean", "other columns"],
)
def test_what_only_looks_alike_is_left(change: tuple[str, str]) -> None:
    nodes = BLOCK.replace(*change)
    assert nodes != BLOCK
    elements = np.zeros((1, T, 2), np.int64)
    graph = model(nodes, **LAYER, **({"elements": elements} if "elements" in nodes else {}))
    assert redirect_by_operator(graph, T, D) == 0


def test_a_register_in_the_middle_is_left() -> None:
    onehot = np.roll(ONE, 1, axis=1)
    assert redirect_by_operator(model(BLOCK, **{**LAYER, "onehot": onehot}), T, D) == 0
    assert redirect_by_operator(model(BLOCK, **{**LAYER, "onehot": 2 * ONE}), T, D) == 0


@pytest.mark.parametrize(("count", "found"), [(MOST_NEURONS, 1), (MOST_NEURONS + 1, 0)])
def test_more_neurons_than_travel_with_a_call_are_left(count: int, found: int) -> None:
    many = {"columns": np.arange(count) % D, "signs": np.ones(count, np.float32)}
    weights = {**LAYER, **many, "rows": (count, D)}
    assert redirect_by_operator(model(BLOCK, **weights), T, D) == found


def test_a_width_that_is_no_multiple_of_8_is_left() -> None:
    assert redirect_by_operator(model(BLOCK, **LAYER), T, D + 4) == 0


GATE = """u = MatMul(x, w) ub = Add(u, c) a, b = Split<axis = -1, num_outputs = 2>(ub)
g = Sigmoid(a) s = Mul(a, g) y = Mul(s, b)"""
GATES = {"w": (D, 2 * D), "c": (2 * D,)}


KNOWN = {"a": ("b", T, D), "b": ("b", T, D)}
PAIR = """u = MatMul(x, w) a = Add(u, c) v = MatMul(x, w1) b = Add(v, c1)
g = Sigmoid(a) s = Mul(g, a) y = Mul(b, s)"""
PAIRS = {"w": (D, D), "w1": (D, D), "c": (D,), "c1": (D,)}


@pytest.mark.parametrize(("nodes", "weights"), [(GATE, GATES), (PAIR, PAIRS)])
def test_a_swiglu_is_one_node(nodes: str, weights: dict[str, object]) -> None:
    before, graph = run(model(nodes, **weights)), model(nodes, **weights)
    assert gate_by_operator(graph, T, KNOWN) == 1
    graph.cleanup()
    assert ops(graph) == {"MatMul": 1, "BiasedSwiGlu_fp32": 1}
    assert graph.outputs[0].shape == ["batch", T, D]
    np.testing.assert_allclose(spelled(graph), before, atol=1e-5)


@pytest.mark.parametrize("shape", [("rows", D), ("b", 2, T, D), None])
def test_a_gate_of_another_rank_is_left(shape: tuple[object, ...] | None) -> None:
    known = {} if shape is None else {"a": shape, "b": shape}
    assert gate_by_operator(model(GATE, **GATES), T, known) == 0


@pytest.mark.parametrize(
    ("change", "weights"),
    [
        (("s = Mul(a, g)", "s = Mul(b, g)"), GATES),  # no SiLU
        (("y = Mul(s, b)", "y = Mul(s, a)"), GATES),
        (("y = Mul(s, b)", "z = Mul(s, b) y = Add(z, a)"), GATES),  # a half is read elsewhere
        (("ub = Add(u, c)", "ub = Mul(u, c)"), GATES),
        (("y = Mul(s, b)", "z = Mul(s, b) y = MatMul(z, v)"), {**GATES, "w": (D, 24), "c": (24,)}),
        (("a, b = Split", "b, a = Split"), GATES),
    ],
    ids=["no silu", "one half twice", "read elsewhere", "no bias", "not a multiple of 8", "turned"],
)
def test_other_gates_are_left(change: tuple[str, str], weights: dict[str, object]) -> None:
    nodes = GATE.replace(*change)
    assert nodes != GATE
    more = {"v": (12, D)} if "v)" in nodes else {}
    assert gate_by_operator(model(nodes, **weights, **more), T, KNOWN) == 0


@pytest.mark.parametrize(
    ("change", "weights"),
    [
        (("v = MatMul(x, w1)", "x2 = Neg(x) v = MatMul(x2, w1)"), PAIRS),
        (("b = Add(v, c1)", "b = Add(v, v)"), PAIRS),
        (("y = Mul(b, s)", "z = Mul(b, s) y = Add(z, u)"), PAIRS),
        (("y = Mul(b, s)", "z = Mul(b, s) y = MatMul(z, k)"), {**PAIRS, "k": (4, D)}),
    ],
    ids=["other input", "no bias", "product read elsewhere", "not a multiple of 8"],
)
def test_other_pairs_are_left(change: tuple[str, str], weights: dict[str, object]) -> None:
    nodes = PAIR.replace(*change)
    assert nodes != PAIR
    if "k" in weights:
        weights = {**weights, "w": (D, 4), "w1": (D, 4), "c": (4,), "c1": (4,)}
    assert gate_by_operator(model(nodes, **weights), T, KNOWN) == 0
