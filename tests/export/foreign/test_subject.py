"""An ONNX file gives finding the same numbers as the PyTorch model it was exported from."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from tests.support import handmade_vit, models
from tests.support.exporters import ANY, BATCH, dynamo, torchscript
from tests.support.traces import error
from torch import Tensor, nn

from regraft.errors import InputError, ModelError
from regraft_export.finding.pytorch import PyTorchSubject
from regraft_export.finding.subject import PLAIN, Floats, Intervention
from regraft_export.foreign import subject as subject_module
from regraft_export.foreign.opening import Opened, open_file
from regraft_export.foreign.subject import OnnxSubject
from regraft_export.sources.data_config import PreprocessingOverrides
from regraft_export.vit.structure import VisionTransformer, from_module

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
GIVEN = PreprocessingOverrides(**COLOURS, interpolation="bicubic", crop_pct=1.0, crop_mode="center")
CASES = [
    ("timm", "dynamo", 18, {}),
    ("timm", "torchscript", 14, {"axes": BATCH}),
    ("timm", "torchscript", 17, {}),
    ("timm_without_class_token", "dynamo", 20, {}),
    ("timm_average_pool", "dynamo", 20, {}),
    ("timm_swiglu", "dynamo", 20, {"optimize": False}),
    ("timm_swiglu", "torchscript", 17, {}),
    ("timm_layer_scale", "torchscript", 17, {"axes": BATCH}),
    ("timm_clip", "dynamo", 24, {}),
    ("timm_distilled", "dynamo", 20, {}),
    ("hf_vit", "dynamo", 23, {"optimize": False}),
    ("hf_dinov2", "dynamo", 20, {}),
    ("hf_dinov2_registers", "dynamo", 20, {}),
    ("timm_siglip", "torchscript", 18, {"axes": BATCH}),
    ("hf_clip", "torchscript", 17, {"axes": BATCH}),
    ("hf_clip_projection", "dynamo", 18, {}),
]


def images(size: tuple[int, int], count: int = 5) -> Floats:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3)).numpy()


def written(module: nn.Module, size: Any, path: Path, exporter: str, opset: int, more: Any) -> Path:
    (dynamo if exporter == "dynamo" else torchscript)(module, size, path, opset, **more)
    return path


def check(got: OnnxSubject, vit: VisionTransformer, pixels: Floats, limit: float = 1e-5) -> None:
    """Every answer that finding asks for, against PyTorch with hooks."""
    right = PyTorchSubject(vit)
    assert (got.hidden, got.patches) == (right.hidden, right.patches)
    norms = right.norms(pixels)
    assert error(got.norms(pixels), norms) < limit
    neurons, last = models.neurons(vit, layers=(1, 2)), vit.layout.depth - 1
    assert {n.sign for n in neurons.neurons} == {1, -1}
    done = Intervention(True, neurons)
    redirected = right.norms_at(pixels, last, done)
    assert error(redirected, norms[last]) > 1e-3  # the redirect does something here
    assert error(got.norms_at(pixels, last, done), redirected) < limit
    start = (1, got.state(pixels, 1))
    assert error(got.norms_at(pixels, last, done, start), redirected) < limit
    assert error(got.norms_at(pixels, 1), norms[1]) < limit
    for kind in PLAIN, done, Intervention(True), Intervention(False, neurons):
        a, b = got.observe(pixels, kind), right.observe(pixels, kind)
        assert a.output == b.output
        assert error(a.norms, b.norms) < limit
        assert error(a.outputs, b.outputs) < 3 * limit
    received = right.received(pixels, neurons)
    for layer, values in got.received(pixels, neurons).items():
        assert error(values, received[layer]) < limit
    threshold = float(np.quantile(norms[last], 0.8))
    mine, theirs = (s.contributions(pixels, last, threshold, 3) for s in (got, right))
    assert mine is not None
    assert theirs is not None
    counts = ("outliers", "ordinary", "images", "images_with_outliers")
    assert [getattr(mine, n) for n in counts] == [getattr(theirs, n) for n in counts]
    for name in ("at_outliers", "elsewhere", "activation", "activation_by_image"):
        for x, y in zip(getattr(mine, name), getattr(theirs, name), strict=True):
            assert error(x, y) < 10 * limit
    assert got.contributions(pixels, last, float(norms.max()) * 2, 3) is None
    for layer in range(vit.layout.depth):
        for a_part, b_part in zip(got.down(layer), right.down(layer), strict=True):
            assert (a_part is None) == (b_part is None)
            assert a_part is None or error(a_part, b_part) < 1e-3 * limit


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, (*c[:3], *c[3]))))
def test_every_answer_equals_pytorch(case: Any, tmp_path: Path) -> None:
    family, exporter, opset, more = case
    vit, size = models.vit(family), models.FAMILIES[family].size
    path = written(vit.module, size, tmp_path / "in.onnx", exporter, opset, more)
    check(open_file(path, GIVEN).subject, vit, images(size))


def test_a_fixed_batch_is_filled_up(tmp_path: Path) -> None:
    vit, size = models.vit("timm"), models.FAMILIES["timm"].size
    torchscript(vit.module, size, tmp_path / "in.onnx", 17, batch=2)
    check(open_file(tmp_path / "in.onnx", GIVEN).subject, vit, images(size))


def test_all_norms_come_in_bounded_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, size = models.vit("timm"), models.FAMILIES["timm"].size
    path = written(vit.module, size, tmp_path / "in.onnx", "dynamo", 20, {})
    subject, batches = open_file(path, GIVEN).subject, list[int]()
    run = subject._run

    def spy(graph: Any, start: Any, wanted: Any, pixels: Floats, neurons: Any = None) -> Any:
        batches.append(len(pixels))
        return run(graph, start, wanted, pixels, neurons)

    monkeypatch.setattr(subject, "_run", spy)
    # 25 tokens of 48 numbers, three blocks, 4 bytes: 14,400 an image, so two fit.
    monkeypatch.setattr(subject_module, "MAX_TOKENS_BYTES", 40_000)
    assert error(subject.norms(images(size)), PyTorchSubject(vit).norms(images(size))) < 1e-5
    assert batches == [2, 2, 1]


def test_rows_of_tokens(tmp_path: Path) -> None:
    module = handmade_vit.planted()[0].eval().requires_grad_(False)
    vit = from_module(module, (32, 32))
    flat = handmade_vit.planted()[0].eval().requires_grad_(False)
    for block in flat.layers:  # type: ignore[union-attr]  # nn.Module gives no types
        block.__class__ = handmade_vit.FlatBlock
    path = written(flat, (32, 32), tmp_path / "in.onnx", "torchscript", 17, {"axes": BATCH})
    assert "Gemm" in {n.op_type for n in onnx.load(path).graph.node}
    check(open_file(path, GIVEN).subject, vit, images((32, 32)))


@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_an_open_image_size(size: tuple[int, int], tmp_path: Path) -> None:
    module = handmade_vit.AnySize()
    module.load_state_dict(handmade_vit.planted()[0].state_dict())
    module.eval().requires_grad_(False)
    path = written(module, (32, 32), tmp_path / "in.onnx", "torchscript", 17, {"axes": ANY})
    with pytest.raises(ModelError, match=r"lacks input_size; give --image-size"):
        open_file(path, GIVEN)
    given = PreprocessingOverrides(**{**GIVEN.given(), "image_size": size})
    opened = open_file(path, given)
    assert opened.preprocessing.image_size == size
    check(opened.subject, from_module(module, size), images(size))


def test_fp16(tmp_path: Path) -> None:
    import copy

    vit, size = models.vit("timm"), models.FAMILIES["timm"].size
    path = tmp_path / "in.onnx"
    dynamo(copy.deepcopy(vit.module).half(), size, path, 20)
    opened = open_file(path, GIVEN)
    assert opened.about["precision"] == "fp16"
    assert opened.subject.state_bytes == (25 + 1) * 48 * 2
    pixels = images(size)
    right = PyTorchSubject(vit)
    done = Intervention(True, models.neurons(vit, layers=(1, 2)))
    assert error(opened.subject.norms(pixels), right.norms(pixels)) < 3e-3
    got, wanted = opened.subject.observe(pixels, done), right.observe(pixels, done)
    assert error(got.norms, wanted.norms) < 3e-3
    assert error(got.outputs, wanted.outputs) < 1e-2


def test_bf16_runs_as_its_float32_twin(tmp_path: Path) -> None:
    import copy

    vit, size = models.vit("timm"), models.FAMILIES["timm"].size
    module = copy.deepcopy(vit.module).bfloat16()
    dynamo(module, size, tmp_path / "in.onnx", 22)
    opened = open_file(tmp_path / "in.onnx", GIVEN)
    assert opened.about["precision"] == "bf16"
    # The twin has the rounded weights, and rounds nothing between the nodes.
    check(opened.subject, from_module(module.float(), size), images(size), limit=1e-4)


def test_external_data(tmp_path: Path) -> None:
    vit, size = models.vit("timm"), models.FAMILIES["timm"].size
    path = written(vit.module, size, tmp_path / "one.onnx", "dynamo", 20, {})
    onnx.save(
        onnx.load(path),
        tmp_path / "in.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=256,
    )
    opened = open_file(tmp_path / "in.onnx", GIVEN)
    assert list(opened.about["files_sha256"]) == ["in.onnx", "w.bin"]
    check(opened.subject, vit, images(size))


def test_sessions_share_the_weights(tmp_path: Path) -> None:
    vit, size = models.vit("timm"), models.FAMILIES["timm"].size
    path = written(vit.module, size, tmp_path / "in.onnx", "dynamo", 20, {})
    subject = open_file(path, GIVEN).subject
    pixels = images(size)
    # What was handed over is what runs: a change shows in a session that was made before.
    before = subject.norms(pixels)
    name = subject._found.stack.mlps[2].weight.source.name
    value = subject._weights.value(name)
    ctypes.memset(value.data_ptr(), 0, 48 * 192 * 4)
    after = subject.norms(pixels)
    assert error(after[:2], before[:2]) == 0
    assert error(after[2], before[2]) > 1e-3


DATA = Path(__file__).parent / "data"


def test_one_tower_of_two(tmp_path: Path) -> None:
    path = DATA / "clip-optimum.onnx"
    with pytest.raises(ModelError, match=r"2 stacks of transformer blocks .* choose one with"):
        open_file(path, GIVEN)
    opened = open_file(path, GIVEN, prefix="vision_model")
    assert opened.about["output"] == "image_embeds"
    pixels = images((32, 32), 3)
    seen = opened.subject.observe(pixels, PLAIN)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    text = {"input_ids": np.array([[98, 5, 99]] * 3), "attention_mask": np.ones((3, 3), np.int64)}
    whole = session.run(["image_embeds"], {"pixel_values": pixels, **text})[0]
    assert seen.outputs == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert seen.norms.shape == (3, 3, 16)
    with pytest.raises(InputError, match="--output is 'logits_per_image'; expected an output comp"):
        open_file(path, GIVEN, prefix="vision_model", output="logits_per_image")


class Heads(nn.Module):
    """A ViT of timm with any outputs."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.vit, self.give = models.vit("timm").module, give

    def forward(self, pixels: Tensor) -> Any:
        return self.give(self.vit.forward_features(pixels))


def opened(give: Callable[[Tensor], Any], folder: Path, names: list[str], **more: Any) -> Opened:
    module = Heads(give).eval()
    size = models.FAMILIES["timm"].size
    dynamo(module, size, folder / "in.onnx", 20, output_names=names)
    return open_file(folder / "in.onnx", GIVEN, **more)


def test_a_pooled_output_comes_before_tokens(tmp_path: Path) -> None:
    made = opened(lambda t: (t, t[:, 0], t[:, 1:].mean(1)), tmp_path, ["all", "a", "pooler_output"])
    assert made.about["output"] == "pooler_output"
    made = open_file(tmp_path / "in.onnx", GIVEN, output="a")
    assert made.about["output"] == "a"
    assert made.subject.observe(images((48, 32)), PLAIN).output == "pooled"


def test_tokens_give_their_class_token(tmp_path: Path) -> None:
    made = opened(lambda t: t, tmp_path, ["tokens"])
    seen = made.subject.observe(images((48, 32)), PLAIN)
    assert seen.output == "class token"
    with torch.no_grad():
        right = models.vit("timm").module.forward_features(torch.from_numpy(images((48, 32))))
    assert error(seen.outputs, right[:, 0].numpy()) < 1e-5


def test_patches_alone_give_their_mean(tmp_path: Path) -> None:
    made = opened(lambda t: t[:, 1:], tmp_path, ["patches"])
    seen = made.subject.observe(images((48, 32)), PLAIN)
    assert seen.output == "mean patch"
    with torch.no_grad():
        right = models.vit("timm").module.forward_features(torch.from_numpy(images((48, 32))))
    assert error(seen.outputs, right[:, 1:].mean(1).numpy()) < 1e-5


def test_of_several_outputs_one_must_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        opened(lambda t: (t[:, 0], t[:, 1]), tmp_path, ["one", "two"])
    message = str(caught.value)
    assert "2 outputs could be the model's own for an image ('one', 'two')" in message
    # Sizes as the file names them, not those at which the graph was walked.
    batch = onnx.load(tmp_path / "in.onnx").graph.output[0].type.tensor_type.shape.dim[0].dim_param
    sizes = f"'one' ({batch} x 48), 'two' ({batch} x 48)"
    assert f"choose one with --output. Its outputs: {sizes}" in message
    chosen = open_file(tmp_path / "in.onnx", GIVEN, output="two")
    assert chosen.about["output"] == "two"
    with pytest.raises(InputError, match="--output is 'three'; expected an output"):
        open_file(tmp_path / "in.onnx", GIVEN, output="three")


def test_no_output_that_will_do(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"no output is a vector .* outputs: 'map' \(\w+ x 48 x 6 x 4\)"
    ):
        opened(lambda t: t[:, 1:].transpose(1, 2).reshape(-1, 48, 6, 4), tmp_path, ["map"])


def test_every_missing_part_of_the_preprocessing_is_named(tmp_path: Path) -> None:
    vit, size = models.vit("timm"), models.FAMILIES["timm"].size
    path = written(vit.module, size, tmp_path / "in.onnx", "dynamo", 20, {})
    some = PreprocessingOverrides(mean=(0.5, 0.5, 0.5), crop_pct=1.0)
    with pytest.raises(ModelError) as caught:
        open_file(path, some)
    assert str(caught.value) == (
        f"{path}: the preprocessing lacks std, interpolation, crop_mode; give --std "
        "--interpolation --crop-mode"
    )
    other = PreprocessingOverrides(**{**GIVEN.given(), "image_size": (64, 64)})
    with pytest.raises(ModelError, match=r"is for images of 48 x 32, not 64 x 64; leave --image-s"):
        open_file(path, other)
    same = PreprocessingOverrides(**{**GIVEN.given(), "image_size": size})
    assert open_file(path, same).about["image_size"] == [48, 32]


def test_grey_images_are_refused(tmp_path: Path) -> None:
    import timm

    module = models.livened(
        timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3,
            num_classes=0, in_chans=1,
        )
    )  # fmt: skip
    torchscript(module, (32, 32), tmp_path / "in.onnx", 17, channels=1)
    with pytest.raises(ModelError, match=r"takes FLOAT \(1, 1, 32, 32\); expected preprocessed"):
        open_file(tmp_path / "in.onnx", GIVEN)


class NormedAfter(handmade_vit.Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.before_mlp(self.narrow(torch.nn.functional.gelu(self.widen(x))))


def test_an_mlp_whose_result_is_normalised_is_refused(tmp_path: Path) -> None:
    module = handmade_vit.planted()[0].eval().requires_grad_(False)
    for block in module.layers:  # type: ignore[union-attr]  # nn.Module gives no types
        block.__class__ = NormedAfter
    path = written(module, (32, 32), tmp_path / "in.onnx", "torchscript", 17, {})
    with pytest.raises(ModelError, match=r"what the MLP writes is normalised before it is added"):
        open_file(path, GIVEN)


def test_further_inputs_are_refused(tmp_path: Path) -> None:
    model = onnx.load(
        written(models.vit("timm").module, (48, 32), tmp_path / "plain.onnx", "dynamo", 20, {})
    )
    body = model.graph
    # A factor on what the first block reads: the stack is then computed from it as well.
    add = next(n for n in body.node if n.op_type == "Add")
    scaled = onnx.helper.make_node("Mul", [add.output[0], "factor"], ["scaled"])
    for node in body.node:
        for k, name in enumerate(node.input):
            if name == add.output[0]:
                node.input[k] = "scaled"
    body.node.insert(list(body.node).index(add) + 1, scaled)
    body.input.append(onnx.helper.make_tensor_value_info("factor", 1, [1]))
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(ModelError, match=r"its blocks also read the input factor; expected images"):
        open_file(tmp_path / "in.onnx", GIVEN)
