from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from tests.support import graphs, models, pictures, traces
from tests.support.handmade_vit import HandmadeVit
from torch import Tensor, nn

from regraft.errors import InputError, ModelError
from regraft.redirect import RedirectOptions
from regraft_export import trace as trace_module
from regraft_export.graph.patch import Patch, Wanted, build
from regraft_export.trace import trace
from regraft_export.vit.observe import observe
from regraft_export.vit.structure import from_module

SIZE = (32, 32)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_anchors_are_the_places_of_the_model(
    tmp_path_factory: pytest.TempPathFactory, family: str
) -> None:
    vit, made = models.vit(family), traces.traced(tmp_path_factory, family)
    model = onnx.ModelProto()
    model.CopyFrom(made.proto)
    known = {o.name for o in model.graph.output}
    names = [made.anchors.tokens, *made.anchors.hidden, made.anchors.final]
    model.graph.output.extend(
        onnx.ValueInfoProto(name=n) for n in dict.fromkeys(names) if n not in known
    )
    pixels = pictures.pixels(3, models.FAMILIES[family].size)
    out = graphs.run(model, {"pixel_values": pixels})
    entered: list[Tensor] = []
    handle = vit.entry.register_forward_pre_hook(
        lambda m, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    seen = observe(vit, torch.from_numpy(pixels), layers=range(vit.layout.depth))
    handle.remove()
    assert traces.error(out[made.anchors.tokens], entered[0].numpy()) < 1e-5
    assert traces.error(out[made.anchors.final], seen.last_hidden_state.numpy()) < 1e-5
    for name, value in zip(made.anchors.hidden, seen.hidden.values(), strict=True):
        assert traces.error(out[name], value.numpy()) < 1e-5
    assert len(made.anchors.hidden) == vit.layout.depth
    assert made.layout == vit.layout
    assert made.pooled == models.FAMILIES[family].pooled
    for i, block in enumerate(vit.blocks):
        np.testing.assert_array_equal(made.down[i], block.down.weight.T.numpy())


def test_the_batch_is_free_and_the_picture_size_is_not(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = traces.traced(tmp_path_factory, "timm").proto
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert model.graph.input[0].name == "pixel_values"
    assert (dims[0].dim_param, [d.dim_value for d in dims[1:]]) == ("batch", [3, 48, 32])
    assert model.opset_import[0].version == 20


@pytest.mark.parametrize("family", ["hf_vit", "hf_clip", "hf_dinov2"])
def test_no_mask_is_left_in_a_traced_transformers_model(
    tmp_path_factory: pytest.TempPathFactory, family: str
) -> None:
    kinds = Counter(n.op_type for n in traces.traced(tmp_path_factory, family).proto.graph.node)
    assert kinds["Softmax"] == 3
    assert kinds["Where"] == kinds["IsNaN"] == 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["timm", "hf_clip"])
def test_half_precision_holds_weights_and_arithmetic_but_not_inputs_and_outputs(
    tmp_path_factory: pytest.TempPathFactory, family: str, precision: str
) -> None:
    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    made = traces.traced(tmp_path_factory, family, precision)
    assert made.opset == {"fp16": 20, "bf16": 22}[precision]
    assert made.down[0].dtype == {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[precision]
    neurons = models.neurons(models.vit(family))
    options = RedirectOptions("per-neuron", "keep", "only-outliers", 2, (1.0, 0.5))
    for patch in (None, Patch(neurons, options), Patch(neurons, RedirectOptions("constant"))):
        for wanted in (Wanted(layers=(0, 2), attentions=(1,)), Wanted(probe=True)):
            model = build(made, patch, wanted).proto
            onnx.checker.check_model(model, full_check=True)
            for value in (*model.graph.input, *model.graph.output):
                assert value.type.tensor_type.elem_type == TensorProto.FLOAT, value.name
            weights = [t for t in model.graph.initializer if t.data_type != TensorProto.INT64]
            large = Counter(t.data_type for t in weights if np.prod(t.dims) > 8)
            assert set(large) == {kind}
            inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
            types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
            products = [n for n in model.graph.node if n.op_type in ("MatMul", "Conv", "Gemm")]
            assert products
            assert {types.get(n.output[0], kind) for n in products} == {kind}


@pytest.mark.parametrize("value", ["per-neuron", "per-layer", "constant"])
def test_half_precision_stays_near_the_float32_reference(
    tmp_path_factory: pytest.TempPathFactory, value: str
) -> None:
    neurons, options = models.neurons(models.vit("timm")), RedirectOptions(value)
    made = traces.traced(tmp_path_factory, "timm", "fp16")
    pixels = pictures.pixels(5, (48, 32))
    for graph, wanted in (
        ("model", Wanted(layers=(2,), attentions=(2,))),
        ("probe", Wanted(probe=True)),
    ):
        built = build(made, Patch(neurons, options), wanted)
        out = graphs.run(built.proto, {"pixel_values": pixels})
        right = traces.right("timm", graph, pixels, list(out), neurons, options)
        for name, found in out.items():
            assert found.dtype == np.float32
            assert 1e-5 < traces.error(found, right[name]) < 1e-2, name


def test_the_model_itself_stays_float32() -> None:
    vit = models.vit("timm")
    before = {name: p.clone() for name, p in vit.module.named_parameters()}
    assert {p.dtype for p in vit.module.parameters()} == {torch.float32}
    for name, parameter in vit.module.named_parameters():
        assert torch.equal(parameter, before[name])


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        trace(models.vit("handmade"), SIZE, "int8")
    assert str(caught.value) == "precision is 'int8'; expected one of fp32, fp16, bf16"


class Counting(HandmadeVit):
    """Takes the batch size as a Python number."""

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.cut(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)[:, 0]


def test_a_model_that_fixes_the_batch_size_is_refused() -> None:
    vit = from_module(Counting().eval(), SIZE)
    with pytest.raises(ModelError) as caught:
        trace(vit, SIZE)
    assert str(caught.value) == (
        "PyTorch's ONNX exporter fixed the batch size at 2: the model's forward makes a Python "
        "number of it (len(x), int(n), a loop over images); take x.shape[0] as it is"
    )


class Branching(nn.Module):
    """Decides by the values of its tokens."""

    def __init__(self, inner: HandmadeVit) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.inner(pixels)
        return out if out.sum() > 0 else -out


def test_the_exporters_refusal_is_one_line() -> None:
    vit = from_module(Branching(HandmadeVit()).eval(), SIZE)
    with pytest.raises(ModelError) as caught:
        trace(vit, SIZE)
    message = str(caught.value)
    assert message.startswith("PyTorch's ONNX exporter refuses this model: ")
    assert "\n" not in message
    assert len(message) > len("PyTorch's ONNX exporter refuses this model: ") + 10


def test_hooks_are_gone_after_a_failed_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = models.vit("timm")

    def fail(*_: object, **__: object) -> None:
        raise torch.onnx.errors.OnnxExporterError("no\nmore")

    monkeypatch.setattr(trace_module.torch.onnx, "export", fail)
    with pytest.raises(ModelError) as caught:
        trace(vit, models.FAMILIES["timm"].size)
    assert str(caught.value) == "PyTorch's ONNX exporter refuses this model: no"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.module.modules())
