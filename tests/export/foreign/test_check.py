"""The check of patched foreign files passes right ones, of every exporter, family and precision."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tests.export.foreign.test_optimum import DATA, FILES
from tests.export.foreign.test_optimum import NEURONS as OPTIMUM_NEURONS
from tests.support import handmade_vit, models
from tests.support.algorithm2 import redirect as with_loops
from tests.support.checking import checked
from tests.support.exporters import ANY, BATCH, CASES, EVERYTHING, dynamo, torchscript
from tests.support.pictures import pixels
from torch import Tensor, nn
from torch.nn import functional as F

import regraft_export.foreign.check
from regraft.neurons import Neurons, RegisterNeuron
from regraft.parity import LIMITS
from regraft.redirect import RedirectOptions
from regraft_export.foreign.check.checked import Checked
from regraft_export.foreign.check.method import redirect
from regraft_export.vit.structure import from_module

PAPER = RedirectOptions()
NEURONS = Neurons(tuple(RegisterNeuron(*n) for n in ((0, 3), (2, 5), (2, 7))))


def assert_equal(result: Checked, batch: int = 2) -> None:
    """It passed, far within the limits, and the patch does something that it compared."""
    assert result.failures == []
    assert (result.images, result.batch) == (3, batch)
    exact = [c for c in result.parity if result.precision != "fp16" or "float32" in c.graph]
    assert len(exact) >= 2
    assert max(c.relative_error for c in exact) < 5e-6
    for name, change in result.changes.items():
        assert change > 1e-3 or name in ("input", "add")  # what enters the first block


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
@pytest.mark.parametrize("options", [PAPER, EVERYTHING], ids=["paper", "everything"])
def test_files_of_torch_s_exporters(
    case: Any, options: RedirectOptions, file: Callable[..., Path]
) -> None:
    family = case[0]
    fixed = case[1] == "torchscript" and "axes" not in case[3]
    result = checked(
        file(*case),
        models.neurons(models.vit(family)),
        options,
        pixels(3, models.FAMILIES[family].size),
    )
    assert_equal(result, 1 if fixed else 2)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family(family: str, file: Callable[..., Path]) -> None:
    path = file(family, "dynamo", 22, {})
    vit, size = models.vit(family), models.FAMILIES[family].size
    options = RedirectOptions(value="constant", patches="mean", registers=30, scale=(0.5,) * 30)
    assert_equal(checked(path, models.neurons(vit), PAPER, pixels(3, size)))
    assert_equal(checked(path, models.neurons(vit), options, pixels(3, size)))


@pytest.mark.parametrize("name", FILES)
def test_optimum_s_files(name: str) -> None:
    path, (output, prefix) = DATA / f"{name}-optimum.onnx", FILES[name]
    result = checked(path, OPTIMUM_NEURONS, PAPER, pixels(3, (32, 32)), prefix=prefix)
    assert_equal(result)
    assert output in {c.output for c in result.parity}
    if name == "clip":
        assert set(result.left_out) == {"logits_per_image", "logits_per_text", "text_embeds"}
        assert result.left_out["text_embeds"] == ["attention_mask", "input_ids"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("options", [PAPER, EVERYTHING], ids=["paper", "everything"])
def test_narrow_files(precision: str, options: RedirectOptions, tmp_path: Path) -> None:
    vit, size = models.vit("timm"), models.FAMILIES["timm"].size
    module = copy.deepcopy(vit.module).to({"fp16": torch.half, "bf16": torch.bfloat16}[precision])
    dynamo(module, size, tmp_path / "in.onnx", 22)
    result = checked(tmp_path / "in.onnx", models.neurons(vit), options, pixels(3, size))
    assert_equal(result)
    assert result.precision == precision
    graphs = {c.graph for c in result.parity}
    narrow = [c for c in result.parity if c.graph == "patched"]
    if precision == "bf16":
        assert (graphs, narrow) == ({"patched, as float32"}, [])
        return
    assert graphs == {"patched, as float32", "patched"}
    assert all(1e-6 < c.relative_error < LIMITS["fp16"].relative_error for c in narrow)


@pytest.mark.parametrize("size", [(32, 32), (48, 24), (64, 40)], ids=str)
@pytest.mark.parametrize("options", [PAPER, EVERYTHING], ids=["paper", "everything"])
def test_a_file_for_any_image_size(
    size: tuple[int, int], options: RedirectOptions, tmp_path: Path
) -> None:
    module = handmade_vit.AnySize()
    module.load_state_dict(handmade_vit.planted()[0].state_dict())
    module.eval().requires_grad_(False)
    torchscript(module, (32, 32), tmp_path / "in.onnx", 17, ANY)
    neurons = models.neurons(from_module(module, (32, 32)), layers=(1, 2))
    result = checked(tmp_path / "in.onnx", neurons, options, pixels(3, size))
    assert_equal(result)
    assert result.image_size == size


class Maps(nn.Module):
    """Every hidden state and attention map leaves."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        o = self.vit(x, output_hidden_states=True, output_attentions=True)
        return (o.last_hidden_state, *o.hidden_states, *o.attentions)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_hidden_states_and_attention_maps(exporter: str, tmp_path: Path) -> None:
    config = tf.ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
        intermediate_size=96,
        attn_implementation="eager",
    )
    module = Maps(models.livened(tf.ViTModel(config, add_pooling_layer=False)))
    if exporter == "dynamo":
        dynamo(module, (32, 32), tmp_path / "in.onnx", 20)
    else:
        torchscript(module, (32, 32), tmp_path / "in.onnx", 17, BATCH)
    for options in PAPER, EVERYTHING:
        result = checked(tmp_path / "in.onnx", NEURONS, options, pixels(3, (32, 32)))
        assert_equal(result)
        assert len(result.parity) == 1 + 4 + 3


class TokensFirst(nn.Module):
    """As OpenAI's CLIP: (T, B, D) between the blocks, torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 48, 8, 8)
        self.cls = nn.Parameter(torch.zeros(1, 1, 48))
        self.positions = nn.Parameter(torch.zeros(1, 17, 48))
        self.before, self.last = nn.LayerNorm(48), nn.LayerNorm(48)
        self.blocks = nn.ModuleList(nn.ModuleDict(self._block()) for _ in range(3))

    def _block(self) -> dict[str, nn.Module]:
        return {
            "first": nn.LayerNorm(48),
            "attention": nn.MultiheadAttention(48, 3),
            "second": nn.LayerNorm(48),
            "up": nn.Linear(48, 96),
            "down": nn.Linear(96, 48),
        }

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.cut(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.before(x).permute(1, 0, 2)
        for b in self.blocks:
            y = b["first"](x)  # type: ignore[index]  # nn.Module gives no types
            x = x + b["attention"](y, y, y, need_weights=False)[0]  # type: ignore[index]
            x = x + b["down"](F.gelu(b["up"](b["second"](x))))  # type: ignore[index]
        return self.last(x.permute(1, 0, 2))


@pytest.mark.parametrize("batch", [None, 1, 4], ids=str)
def test_tokens_first_and_a_fixed_batch(batch: int | None, tmp_path: Path) -> None:
    module, path = models.livened(TokensFirst()), tmp_path / "in.onnx"
    torchscript(module, (32, 32), path, 17, BATCH if batch is None else None, batch=batch or 1)
    for options in PAPER, EVERYTHING:
        assert_equal(checked(path, NEURONS, options, pixels(3, (32, 32))), batch or 2)


def test_rows_of_tokens(tmp_path: Path) -> None:
    module, _ = handmade_vit.planted()
    module.eval().requires_grad_(False)
    for block in module.layers:  # type: ignore[union-attr]  # nn.Module gives no types
        block.__class__ = handmade_vit.FlatBlock
    torchscript(module, (32, 32), tmp_path / "in.onnx", 17, BATCH)
    for options in PAPER, RedirectOptions(patches="mean"):
        assert_equal(checked(tmp_path / "in.onnx", NEURONS, options, pixels(3, (32, 32))))


@pytest.mark.parametrize("value", ["per-neuron", "per-layer", "constant"])
@pytest.mark.parametrize("cls", ["zero", "keep"])
@pytest.mark.parametrize("patches", ["zero", "mean", "only-outliers", "keep"])
def test_the_method_equals_algorithm_2_said_with_loops(value: Any, cls: Any, patches: Any) -> None:
    options = RedirectOptions(value, cls, patches, registers=2, scale=(1.0, -0.5))
    draw = np.random.default_rng(0)
    chosen = [RegisterNeuron(0, 2, sign=1, value=3.0), RegisterNeuron(0, 6, sign=-1, value=-2.0)]
    for prefix, class_token in ((0, False), (1, True), (3, True)):
        h = draw.normal(size=(3, prefix + 12 + 2, 9))
        got = redirect(h, chosen, options, patches=12, class_token=class_token)
        expected = with_loops(
            h, chosen, options, prefix=prefix, patches=12, class_token=class_token
        )
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_the_check_imports_nothing_of_the_rewrite() -> None:
    allowed = ("regraft_export.onnx_file", "regraft_export.foreign.check")
    surveying = {
        "regraft_export.foreign.survey": {"Survey"},
        "regraft_export.foreign.shapes": {"Shape", "Shapes"},
    }
    files = list(Path(regraft_export.foreign.check.__path__[0]).glob("*.py"))
    assert len(files) >= 8
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("regraft_export") for alias in node.names)
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("regraft_export") and not module.startswith(allowed):
                assert {a.name for a in node.names} <= surveying.get(module, set()), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "exporter"),
    [
        ("vit_base_patch16_224", "dynamo"),
        ("vit_base_patch16_clip_224", "torchscript"),
        ("vit_small_patch14_dinov2", "dynamo"),
        ("vit_base_patch16_siglip_224", "torchscript"),
    ],
)
def test_published_sizes(name: str, exporter: str, tmp_path: Path) -> None:
    import timm

    size = (518, 518) if "dinov2" in name else (224, 224)
    module = models.livened(timm.create_model(name, pretrained=False, num_classes=0))
    if exporter == "dynamo":
        dynamo(module, size, tmp_path / "in.onnx", 20)
    else:
        torchscript(module, size, tmp_path / "in.onnx", 17, BATCH)
    chosen = [RegisterNeuron(layer, index) for layer in (4, 5, 6) for index in (3, 50, 700)]
    result = checked(tmp_path / "in.onnx", Neurons(tuple(chosen)), PAPER, pixels(3, size))
    assert_equal(result)
