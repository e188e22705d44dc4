"""The graphs of ort-cuda: equal to the portable ones, token by token, in every family and form.

ONNX Runtime's CPU provider has float32 kernels for all fused operators, so they run here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from tests.support import constants as support
from tests.support import graphs, models, pictures, traces

from regraft.engines import parts
from regraft.parity import cosine
from regraft.redirect import RedirectOptions
from regraft_export.graph.cuda.choices import Choices
from regraft_export.graph.cuda.fuse import Fused, fuse, prepare, why_not_fused
from regraft_export.graph.patch import Patch, Traced, Wanted, build

Trace = Callable[..., Traced]
LIMIT = 1e-5
FORMS = [
    Choices(write=write, maximum=top)
    for write in ("residual", "row", "wide")
    for top in ("topk", "reduce")
]
OPTIONS = [
    RedirectOptions(),
    RedirectOptions("constant"),
    RedirectOptions("per-neuron", "zero", "zero", 2, (1.0, -0.5)),
    RedirectOptions("per-layer"),
    RedirectOptions("per-neuron", "keep"),
    RedirectOptions("constant", "zero", "zero", 2, (1.0, -0.5)),
    RedirectOptions("per-neuron", "keep", "only-outliers", 1, (2.0,)),
]


def compare(traced: Traced, family: str, patch: Patch | None, choices: Choices) -> Fused:
    """Runs both graphs on five pictures and on one; asserts equality; returns the fused one."""
    attended = (0, 2) if models.FAMILIES[family].class_token else ()
    wanted = Wanted(layers=(0, 1, 2), attentions=attended)
    fused = fuse(prepare(traced, choices), patch, wanted, choices)
    portable = build(traced, patch, wanted).proto
    pixels = pictures.pixels(5, models.FAMILIES[family].size)
    session = graphs.open_session(fused.proto, optimize=False)
    right = graphs.run(portable, {"pixel_values": pixels}, optimize=False)
    shapes = {output.name: tuple(output.shape) for output in session.get_outputs()}
    found = parts.parts_of(session.get_modelmeta().custom_metadata_map, shapes)
    assert set(parts.shapes_of(shapes, found)) == set(right)
    cut = patch is not None and patch.constants is None
    assert bool(found) == (cut and choices.whole)

    def run(pixels: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        values = dict(zip(shapes, session.run(list(shapes), {"pixel_values": pixels}), strict=True))
        return {name: parts.cut(name, values, found) for name in right}

    names, got, alone = list(right), run(pixels), run(pixels[3:4])
    for name in names:
        assert traces.error(got[name], right[name]) < LIMIT
        assert traces.error(alone[name], right[name][3:4]) < LIMIT
    tokens = got["last_hidden_state"].astype(np.float64)
    assert cosine(tokens, right["last_hidden_state"].astype(np.float64)).min() > 0.9999
    return fused


@pytest.mark.parametrize("family", models.FAMILIES)
def test_baseline_and_patched_equal_the_portable_graphs(traced: Trace, family: str) -> None:
    trace = traced(family)
    patch = Patch(models.neurons(models.vit(family)), RedirectOptions())
    before = compare(trace, family, None, Choices())
    after = compare(trace, family, patch, Choices())
    depth = trace.layout.depth
    assert not why_not_fused(after, depth)
    a, b = before.fusions, after.fusions
    assert (a.attentions, a.norms, a.gelus) == (b.attentions, b.norms, b.gelus)
    assert b.attentions == b.key_biases == b.value_biases == depth
    assert b.norms >= 2 * depth
    assert b.patches
    assert b.tokens
    assert (a.redirects, b.redirects) == (0, 2)
    scaled = models.FAMILIES[family].scaled
    assert b.layer_scales == (2 * depth if scaled else 0)
    assert a.shape_nodes == b.shape_nodes == 0


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("choices", [Choices(), Choices(biases=False)], ids=["", "with biases"])
def test_the_variant_kv_equals_the_portable_graph(
    traced: Trace, family: str, choices: Choices
) -> None:
    trace, vit = traced(family), models.vit(family)
    for registers in (1, 2):
        chosen = support.drawn(vit, first=1, registers=registers)
        patch = Patch(models.neurons(vit), RedirectOptions(), chosen)
        fusions = compare(trace, family, patch, choices).fusions
        depth = trace.layout.depth
        assert (fusions.attentions, fusions.constants) == (depth, depth - 1)
        assert fusions.key_biases == fusions.value_biases == (depth if choices.biases else 0)
        assert (fusions.redirects, fusions.shape_nodes) == (0, 0)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.value} {o.cls} {o.registers}")
@pytest.mark.parametrize("choices", FORMS, ids=lambda c: f"{c.write} {c.maximum}")
def test_every_form_of_the_redirect(
    traced: Trace, options: RedirectOptions, choices: Choices
) -> None:
    neurons = models.neurons(models.vit("timm"))
    fused = compare(traced("timm"), "timm", Patch(neurons, options), choices)
    ops = Counter(node.op_type for node in fused.proto.graph.node)
    narrow = options.cls == "zero"
    if choices.write == "wide" and narrow and options.value != "per-layer":
        assert ops["ScatterND"] == fused.fusions.redirects == 2
    elif choices.write == "row" and options.value == "per-neuron" and options.registers == 1:
        assert fused.fusions.redirects == 2
        assert ops["Where"] >= 2
    by_topk = choices.maximum == "topk" and options.value == "per-neuron"
    assert ops["TopK"] == (2 if by_topk else 0)


@pytest.mark.parametrize("family", ["timm", "hf_dinov2", "timm_swiglu"])
def test_nothing_chosen_leaves_the_biases_and_the_convolution(traced: Trace, family: str) -> None:
    plain = Choices(
        write="added",
        maximum="reduce",
        patches=False,
        tokens=False,
        biases=False,
        layer_scale=False,
        whole=False,
    )
    patch = Patch(models.neurons(models.vit(family)), RedirectOptions())
    fused = compare(traced(family), family, patch, plain)
    ops = Counter(node.op_type for node in fused.proto.graph.node)
    assert ops["Conv"] == 1
    assert ops["MultiHeadAttention"] == 3
    assert fused.fusions.key_biases == fused.fusions.value_biases == fused.fusions.redirects == 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_fuses_the_same(traced: Trace, precision: str) -> None:
    trace = traced("hf_dinov2", precision)
    patch = Patch(models.neurons(models.vit("hf_dinov2")), RedirectOptions())
    fused = fuse(prepare(trace), patch, Wanted())
    assert fused.fusions.attentions == fused.fusions.value_biases == 3
    assert fused.fusions.layer_scales == 6
    assert fused.fusions.patches
    assert fused.fusions.tokens
    assert fused.fusions.norms == 7
    assert fused.fusions.shape_nodes == 0
    kinds = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
    weights = [t for t in fused.proto.graph.initializer if len(t.dims) == 2]
    assert weights
    assert {t.data_type for t in weights} == {kinds}
    if precision == "bf16":  # no bf16 kernel on CUDA
        casts = {out for n in fused.proto.graph.node if n.op_type == "Cast" for out in n.output}
        for node in fused.proto.graph.node:
            if node.op_type in ("Pad", "ReduceMax", "TopK"):
                assert node.input[0] in casts
    onnx.checker.check_model(fused.proto, full_check=True)


def test_an_unknown_attention_is_named(traced: Trace) -> None:
    trace = traced("timm")
    masked = onnx.ModelProto()
    masked.CopyFrom(trace.proto)
    softmax = next(node for node in masked.graph.node if node.op_type == "Softmax")
    mask = onnx.helper.make_tensor("mask", onnx.TensorProto.FLOAT, [1], [0.5])
    masked.graph.initializer.append(mask)
    add = onnx.helper.make_node("Add", [softmax.input[0], "mask"], ["masked"], "masking")
    masked.graph.node.insert(list(masked.graph.node).index(softmax), add)
    softmax.input[0] = "masked"
    other = Traced(masked, trace.anchors, trace.layout, trace.pooled, trace.down, trace.opset)
    fused = fuse(prepare(other), None, Wanted())
    reason = why_not_fused(fused, 3)
    assert "2 of 3 attentions" in reason
    assert softmax.name in reason
    assert "Add, not from one MatMul" in reason
