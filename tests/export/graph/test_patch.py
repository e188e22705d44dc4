"""Traced models, patched: equal to PyTorch with hooks, token by token, on pictures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import timm
import torch
from numpy.typing import NDArray
from tests.support import graphs, models, pictures, shared, traces
from tests.support.handmade_vit import Block, plain

from regraft.errors import RewriteError
from regraft.neurons import Neurons
from regraft.redirect import RedirectOptions
from regraft.rewrite_counts import Sites
from regraft_export.graph import patch as patch_module
from regraft_export.graph.document import tensor
from regraft_export.graph.patch import Built, Patch, Traced, Wanted, build
from regraft_export.trace import trace
from regraft_export.vit.hooks import redirected
from regraft_export.vit.observe import observe
from regraft_export.vit.structure import from_module

Trace = Callable[..., Traced]

LIMIT = 1e-5
OPTIONS = [
    RedirectOptions(value, cls, patches, registers, (1.0, -0.5)[:registers])
    for value, cls, patches, registers in itertools.product(
        ("per-neuron", "per-layer", "constant"),
        ("zero", "keep"),
        ("zero", "mean", "only-outliers", "keep"),
        (1, 2),
    )
]
SOME = [
    RedirectOptions(),
    RedirectOptions("constant"),
    RedirectOptions("per-neuron", "keep", "only-outliers", 2, (1.0, -0.5)),
    RedirectOptions("per-layer", "keep", "mean", 1),
    RedirectOptions("constant", "zero", "keep", 2, (1.0, 2.0)),
]
# Every combination of options on one family, some on each of the others.
CASES = [("timm", options) for options in OPTIONS]
CASES += [(name, options) for name in models.FAMILIES if name != "timm" for options in SOME]


def named(value: object) -> str:
    if isinstance(value, RedirectOptions):
        return f"{value.value}, {value.cls}, {value.patches}, {value.registers}"
    return str(value)


def pictured(family: str, count: int = 5) -> NDArray[np.float32]:
    return pictures.pixels(count, models.FAMILIES[family].size)


def wanted(family: str) -> Wanted:
    attentions = (0, 2) if models.FAMILIES[family].class_token else ()
    return Wanted(layers=(0, 1, 2), attentions=attentions)


def session(built: Built, optimize: bool) -> Callable[[NDArray[np.float32]], dict]:
    opened = graphs.open_session(built.proto, optimize=optimize)
    names = [output.name for output in opened.get_outputs()]
    return lambda pixels: dict(zip(names, opened.run(names, {"pixel_values": pixels}), strict=True))


@pytest.mark.parametrize(("family", "options"), CASES, ids=named)
def test_the_patched_graph_equals_the_hooks(
    traced: Trace, family: str, options: RedirectOptions
) -> None:
    neurons = models.neurons(models.vit(family))
    pixels = pictured(family)
    for graph, outputs in (("model", wanted(family)), ("probe", Wanted(probe=True))):
        built = build(traced(family), Patch(neurons, options), outputs)
        onnx.checker.check_model(built.proto, full_check=True)
        right = traces.right(family, graph, pixels, list(built.outputs), neurons, options)
        for optimize in (False, True):
            run = session(built, optimize)
            batch, single = run(pixels), run(pixels[:1])
            assert list(batch) == list(built.outputs)
            for name, value in batch.items():
                assert value.dtype == np.float32
                assert value.shape == (5, *built.outputs[name][1:])
                assert traces.error(value, right[name]) < LIMIT, (name, optimize)
                assert traces.error(single[name], right[name][:1]) < LIMIT, (name, optimize)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_output_is_there_and_the_redirect_changes_it(traced: Trace, family: str) -> None:
    neurons = models.neurons(models.vit(family))
    pixels, outputs = pictured(family, 2), wanted(family)
    patched = build(traced(family), Patch(neurons, RedirectOptions()), outputs)
    baseline = build(traced(family), None, outputs)
    has_pooled = models.FAMILIES[family].pooled is not None
    names = ["last_hidden_state", *(f"hidden.{i}" for i in (0, 1, 2))]
    names += [f"attentions.{i}" for i in outputs.attentions]
    names += ["pooler_output"] if has_pooled else []
    assert list(baseline.outputs) == names
    assert list(patched.outputs) == [*names, "test_time_registers"]
    # Name for name and shape for shape the baseline's.
    assert {n: patched.outputs[n] for n in names} == baseline.outputs
    assert [i.SerializeToString() for i in patched.proto.graph.input] == [
        i.SerializeToString() for i in baseline.proto.graph.input
    ]
    declared = {o.name: o.SerializeToString() for o in patched.proto.graph.output}
    for output in baseline.proto.graph.output:
        assert declared[output.name] == output.SerializeToString()
    before, after = (session(b, True)(pixels) for b in (baseline, patched))
    no_neurons = Neurons(models.neurons(models.vit(family)).neurons[:1])
    right = traces.right(family, "baseline", pixels, names, no_neurons, RedirectOptions())
    for name in names:
        assert traces.error(before[name], right[name]) < LIMIT
        if name != "attentions.0":  # it is computed before the first redirect
            assert traces.error(after[name], before[name]) > 1e-3, name


@pytest.mark.parametrize("family", ["timm", "timm_siglip", "timm_trained_registers", "hf_clip"])
@pytest.mark.parametrize("probe", [False, True])
def test_a_batch_of_different_images_equals_the_singles(
    traced: Trace, family: str, probe: bool
) -> None:
    neurons = models.neurons(models.vit(family))
    options = RedirectOptions("per-layer", "keep", "only-outliers", 2, (1.0, 0.5))
    outputs = Wanted(probe=True) if probe else wanted(family)
    pixels = pictured(family)
    for patch in (None, Patch(neurons, RedirectOptions()), Patch(neurons, options)):
        run = session(build(traced(family), patch, outputs), True)
        batch, singles = run(pixels), [run(image[None]) for image in pixels]
        assert traces.error(batch["last_hidden_state"][:1], batch["last_hidden_state"][1:2]) > 0.01
        for name, value in batch.items():
            for i, single in enumerate(singles):
                assert traces.error(value[i : i + 1], single[name]) < 1e-5, (name, i)


def test_the_order_of_images_does_not_matter(traced: Trace) -> None:
    patch = Patch(models.neurons(models.vit("timm")), RedirectOptions())
    run = session(build(traced("timm"), patch, Wanted()), True)
    pixels = pictured("timm")
    forwards, backwards = run(pixels), run(pixels[::-1].copy())
    for name, value in forwards.items():
        assert traces.error(backwards[name][::-1], value) < 1e-5


@pytest.mark.parametrize("family", ["timm_average_pool", "timm_without_class_token", "timm_siglip"])
def test_pooling_over_patches_does_not_see_the_register(traced: Trace, family: str) -> None:
    neurons = models.neurons(models.vit(family))
    # A register so large that a mean over it would be far off.
    options = RedirectOptions(scale=(1000.0,))
    built = build(traced(family), Patch(neurons, options), Wanted())
    pixels = pictured(family)
    out = session(built, True)(pixels)
    right = traces.right(family, "model", pixels, list(out), neurons, options)
    norms = np.linalg.norm(out["last_hidden_state"], axis=2)
    register = np.linalg.norm(out["test_time_registers"], axis=2)
    if family != "timm_siglip":  # where a final norm hides it
        assert register.min() > 10 * np.median(norms)
    assert traces.error(out["pooler_output"], right["pooler_output"]) < 1e-4


@pytest.mark.parametrize(
    ("layers", "outputs", "expected"),
    [
        ((0, 5, 11), Wanted(), (1, 3, 2)),
        ((0, 5, 11), Wanted(layers=(3, 11)), (1, 3, 4)),
        ((4,), Wanted(attentions=(11,)), (1, 1, 2)),
        ((0, 5, 11), Wanted(probe=True), (1, 3, 1)),
    ],
)
def test_twelve_blocks_report_their_sites(
    deep: Traced, layers: tuple[int, ...], outputs: Wanted, expected: tuple[int, int, int]
) -> None:
    neurons = Neurons(tuple(replace(NEURON, layer=layer) for layer in layers))
    built = build(deep, Patch(neurons, RedirectOptions()), outputs)
    assert built.sites is not None
    assert (built.sites.token, built.sites.redirect, built.sites.output) == expected
    assert built.nodes_added == dict.fromkeys(layers, 5)
    before = build(deep, None, outputs)
    extra = len(built.proto.graph.node) - len(before.proto.graph.node)
    assert extra == 1 + 5 * len(layers) + expected[2]  # one Pad, five a layer, the slices
    assert (before.sites, before.nodes_added) == (None, {})


def test_a_last_block_that_is_the_final_state_is_cut_once(traced: Trace) -> None:
    # Without a final norm, hidden.2 and last_hidden_state are one tensor.
    patch = Patch(models.neurons(models.vit("timm_average_pool")), RedirectOptions())
    built = build(traced("timm_average_pool"), patch, Wanted(layers=(1, 2)))
    assert built.sites is not None
    assert (built.sites.token, built.sites.redirect, built.sites.output) == (1, 2, 3)
    out = session(built, True)(pictured("timm_average_pool", 2))
    np.testing.assert_array_equal(out["hidden.2"], out["last_hidden_state"])


def test_every_mended_count_is_reported(traced: Trace) -> None:
    patch = Patch(models.neurons(models.vit("timm")), RedirectOptions())
    built = build(traced("timm"), patch, Wanted())
    assert isinstance(built.sites, Sites)
    # Per block: queries, keys and values are split, and heads joined again.
    assert len(built.sites.mended) == 6
    for line in built.sites.mended:
        assert line.endswith(": 25 -> 26"), line


NEURON = models.neurons(models.vit("timm")).neurons[0]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Twelve blocks."""

    def make(_: object) -> Traced:
        module = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=16,
            embed_dim=12,
            num_heads=2,
            mlp_ratio=16,
            num_classes=0,
        )
        return trace(from_module(models.livened(module), (32, 32)), (32, 32))

    return shared.once(tmp_path_factory, "trace-deep", make)


LOST = {
    "append_register": lambda graph, *_: [],
    "redirect_neurons": lambda graph, *_: 0,
}


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (
            "append_register",
            "has 0 token, 2 redirect, 2 output and 0 attention sites; expected 1, 2, 2 and 0",
        ),
        (
            "redirect_neurons",
            "has 1 token, 0 redirect, 2 output and 0 attention sites; expected 1, 2, 2 and 0",
        ),
    ],
)
def test_a_lost_rewrite_is_an_error(
    traced: Trace, monkeypatch: pytest.MonkeyPatch, rewrite: str, message: str
) -> None:
    monkeypatch.setattr(patch_module, rewrite, LOST[rewrite])
    patch = Patch(models.neurons(models.vit("timm")), RedirectOptions())
    with pytest.raises(RewriteError) as caught:
        build(traced("timm"), patch, Wanted())
    assert str(caught.value) == f"the patched graph {message}: a rewrite was lost"


def test_a_cut_that_nothing_reads_is_an_error(
    traced: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = patch_module.remove_register

    def careless(graph: gs.Graph, final: str, hidden: list[str], *counts: int) -> object:
        cut, registers = real(graph, final, hidden, *counts)
        # The tensor with the register leaves instead of the one without.
        return cut | {hidden[0]: tensor(graph, hidden[0])}, registers

    monkeypatch.setattr(patch_module, "remove_register", careless)
    patch = Patch(models.neurons(models.vit("timm")), RedirectOptions())
    with pytest.raises(RewriteError) as caught:
        build(traced("timm"), patch, Wanted(layers=(1,)))
    assert str(caught.value) == (
        "the patched graph has 1 token, 2 redirect, 2 output and 0 attention sites; expected 1, "
        "2, 3 and 0: a rewrite was lost"
    )


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("probe", [False, True])
def test_the_file_is_clean(traced: Trace, family: str, probe: bool) -> None:
    options = RedirectOptions("per-neuron", "keep", "only-outliers", 2, (1.0, 0.5))
    patch = Patch(models.neurons(models.vit(family)), options)
    outputs = Wanted(probe=True) if probe else wanted(family)
    model = build(traced(family), patch, outputs).proto
    onnx.checker.check_model(model, full_check=True)
    names = [t.name for t in model.graph.initializer]
    assert len(names) == len(set(names))
    values = [output for node in model.graph.node for output in node.output]
    assert len(values) == len(set(values))
    nodes = [node.name for node in model.graph.node]
    assert len(nodes) == len(set(nodes))
    shaped = [v.name for v in model.graph.value_info if v.type.tensor_type.HasField("shape")]
    assert shaped == []  # they would tell the old token count
    assert not [p for node in model.graph.node for p in node.metadata_props]
    assert not [node.name for node in model.graph.node if node.doc_string]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    onnx.checker.check_model(inferred, full_check=True)


def renamed(traced: Traced, seed: int) -> Traced:
    """The same graph with every initializer renamed, and listed in another order."""
    model = onnx.ModelProto()
    model.CopyFrom(traced.proto)
    rng = np.random.default_rng(seed)
    kept = list(model.graph.initializer)
    new = {t.name: f"t{i}" for t, i in zip(kept, rng.permutation(len(kept)), strict=True)}
    del model.graph.initializer[:]
    for i in rng.permutation(len(kept)):
        model.graph.initializer.add().CopyFrom(kept[i])
        model.graph.initializer[-1].name = new[kept[i].name]
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = new.get(name, name)
    del model.graph.value_info[:]
    for info in traced.proto.graph.value_info:
        if info.name not in new:
            model.graph.value_info.add().CopyFrom(info)
    return replace(traced, proto=model)


def test_down_projections_are_found_by_weight_not_by_name(traced: Trace) -> None:
    neurons, pixels = models.neurons(models.vit("timm")), pictured("timm", 2)
    patch = Patch(neurons, RedirectOptions())
    expected = session(build(traced("timm"), patch, Wanted()), False)(pixels)
    for seed in (0, 1):
        other = build(renamed(traced("timm"), seed), patch, Wanted())
        found = session(other, False)(pixels)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)


def test_equal_weights_in_different_blocks_are_told_apart() -> None:

    module = plain()[0].eval().requires_grad_(False)
    with torch.no_grad():
        for block in module.layers:
            block.narrow.weight.copy_(module.layers[0].narrow.weight)
            block.narrow.bias.zero_()
    vit = from_module(module, (32, 32))
    made = trace(vit, (32, 32))
    pixels = pictures.pixels(3, (32, 32))
    for value in ("per-neuron", "constant"):
        options, neurons = RedirectOptions(value), models.neurons(vit, layers=(2,))
        run = session(build(made, Patch(neurons, options), Wanted(layers=(0, 1, 2, 3))), True)
        out = run(pixels)
        with redirected(vit, neurons, options):
            seen = observe(vit, torch.from_numpy(pixels), layers=range(4))
        for i in range(4):
            right = seen.hidden[i][:, : vit.layout.count].numpy()
            assert traces.error(out[f"hidden.{i}"], right) < LIMIT


def test_a_block_whose_mlp_ends_it_without_a_residual() -> None:

    module = plain()[0].eval().requires_grad_(False)

    class Blunt(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attention(self.before_attention(x))
            return self.narrow(torch.nn.functional.gelu(self.widen(self.before_mlp(x))))

    for block in module.layers:
        block.__class__ = Blunt
    vit = from_module(module, (32, 32))
    made = trace(vit, (32, 32))
    pixels = pictures.pixels(3, (32, 32))
    neurons = models.neurons(vit, layers=(1, 3))
    for options in (RedirectOptions(), RedirectOptions("constant")):
        with redirected(vit, neurons, options):
            seen = observe(vit, torch.from_numpy(pixels), layers=range(4))
        out = session(build(made, Patch(neurons, options), Wanted(layers=(0, 1, 2, 3))), True)(
            pixels
        )
        probe = session(build(made, Patch(neurons, options), Wanted(probe=True)), True)(pixels)
        for i in range(4):
            hidden = seen.hidden[i].numpy()
            assert traces.error(out[f"hidden.{i}"], hidden[:, : vit.layout.count]) < LIMIT
            assert traces.error(probe[f"norms.{i}"], np.linalg.norm(hidden, axis=2)) < LIMIT


def test_a_weight_that_is_not_in_the_graph_is_an_error(traced: Trace) -> None:
    right = traced("timm")
    wrong = replace(right, down={**right.down, 2: right.down[2] + np.float32(1e-3)})
    patch = Patch(models.neurons(models.vit("timm")), RedirectOptions())
    with pytest.raises(RewriteError) as caught:
        build(wrong, patch, Wanted())
    assert str(caught.value) == (
        "layer 2: 0 MatMul nodes multiply by the down-projection's weight (192, 48); expected "
        "exactly one"
    )


def test_building_leaves_the_trace_as_it_was(traced: Trace) -> None:
    made = traced("timm")
    before = made.proto.SerializeToString()
    patch = Patch(models.neurons(models.vit("timm")), RedirectOptions("constant"))
    build(made, patch, Wanted(layers=(1,)))
    build(made, None, Wanted(probe=True))
    assert made.proto.SerializeToString() == before
