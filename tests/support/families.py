"""Families of models by the scheme that loads them, at small sizes and at real ones.

Every model is its library's real class, randomly initialised; :func:`planting.plant` makes units of
it write outlier tokens. A family is saved as a user would have it: a folder, or code and a
checkpoint, so that the command line loads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers as tf
from safetensors.torch import save_file
from tests.support.models import livened
from tests.support.planting import flagged_pictures, plant
from torch import nn

from regraft.neurons import Neurons, RegisterNeuron

HUB = Path(__file__).parent / "hub_dinov2"
Save = Callable[[nn.Module, Path], tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """One model.

    Attributes:
        build: makes the module, with the library's own initial weights.
        save: writes it planted into a folder; returns MODEL and what else its command line needs.
        size: the image's edge.
        patch: the patch's edge.
        prefix: prefix tokens.
        layers: blocks that get planted units; the last one is the detection layer or before it.
        visual: which part of the module is the image tower.
        rotary: whether positions are given inside attention.
        norm: of the planted outlier tokens, in medians; less where the output is a mean of all.
        reduced: what is smaller than in the published model, for the test's name.
    """

    build: Callable[[], nn.Module]
    save: Save
    size: int
    patch: int
    prefix: int
    layers: tuple[int, ...] = (1,)
    visual: Callable[[nn.Module], nn.Module] = field(default=lambda module: module)
    rotary: bool = False
    norm: float = 8.0
    reduced: str = ""


def _as_python(code: str) -> Save:
    """As ``python:FILE.py:vit`` with ``--weights``."""

    def save(module: nn.Module, folder: Path) -> tuple[str, ...]:
        (folder / "own.py").write_text(code)
        torch.save(module.state_dict(), folder / "own.pth")
        return f"python:{folder / 'own.py'}:vit", "--weights", str(folder / "own.pth")

    return save


def _timm(name: str, size: int, patch: int, prefix: int, **options: Any) -> Family:
    """A timm model; options other than Family's go to ``create_model``."""
    about = {k: options.pop(k) for k in ("layers", "rotary", "norm", "reduced") if k in options}
    settings = {"num_classes": 0, "img_size": size, **options}
    code = (
        "import timm\n\n\ndef vit():\n"
        f"    return timm.create_model({name!r}, **{settings!r}), {{}}\n"
    )
    return Family(
        lambda: timm.create_model(name, **settings),
        _as_python(code),
        size, patch, prefix, **about,
    )  # fmt: skip


def _as_folder(module: nn.Module, folder: Path) -> tuple[str, ...]:
    module.save_pretrained(folder)
    return (f"hf:{folder}",)


def _hf(model: Any, config: Any, prefix: int, **options: Any) -> Family:
    about = {k: options.pop(k) for k in ("layers", "rotary", "norm", "reduced") if k in options}
    settings = {"image_size": 64, "patch_size": 8, **options}
    return Family(
        lambda: model(config(**settings)),
        _as_folder,
        settings["image_size"], settings["patch_size"], prefix, **about,
    )  # fmt: skip


def _open_clip(config: dict[str, Any], prefix: int = 1, **about: Any) -> Family:
    """An OpenCLIP model of a configuration, as ``open_clip:local-dir:FOLDER``."""
    config = {"text_cfg": {"width": 16, "heads": 2, "layers": 1, "vocab_size": 64}, **config}
    vision = config["vision_cfg"]

    def save(module: nn.Module, folder: Path) -> tuple[str, ...]:
        preprocess = {"mean": [0.5] * 3, "std": [0.2] * 3, "resize_mode": "squash"}
        about = {"model_cfg": config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(about))
        save_file(module.state_dict(), folder / "open_clip_model.safetensors")
        return (f"open_clip:local-dir:{folder}",)

    return Family(
        lambda: open_clip.CLIP(**config),
        save,
        vision["image_size"], vision["patch_size"], prefix,
        visual=lambda module: module.visual,
        **about,
    )  # fmt: skip


def _hub(entry: str, size: int, prefix: int, **options: Any) -> Family:
    """A model of the hub folder, through its entry."""
    about = {k: options.pop(k) for k in ("layers", "reduced") if k in options}

    def build() -> nn.Module:
        plain = {"pretrained": False} if entry != "tiny" else {}
        module: nn.Module = torch.hub.load(str(HUB), entry, source="local", **plain, **options)
        return module

    def save(module: nn.Module, folder: Path) -> tuple[str, ...]:
        torch.save(module.state_dict(), folder / "hub.pth")
        return f"hub:{HUB}:{entry}", "--weights", str(folder / "hub.pth")

    return Family(build, save, size, 14, prefix, **about)


_TIMM = {"depth": 3, "embed_dim": 48, "num_heads": 3}
_HF = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}
_CLIP = {"layers": 3, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 64}

SMALL = {
    "open_clip": _open_clip({"embed_dim": 20, "quick_gelu": True, "vision_cfg": _CLIP}),
    "hub_dinov2": _hub("tiny", 112, 1),
    "hub_dinov2_g_reg": _hub("tiny_g_reg", 112, 5),
    "hf_siglip": _hf(tf.SiglipVisionModel, tf.SiglipVisionConfig, 0, **_HF),
    "hf_dinov3": _hf(
        tf.DINOv3ViTModel, tf.DINOv3ViTConfig, 5, **_HF, num_register_tokens=4, rotary=True
    ),
    "timm_dinov3": _timm("vit_small_patch16_dinov3", 112, 16, 5, **_TIMM, rotary=True),
    "timm_eva02": _timm("eva02_tiny_patch14_224", 112, 14, 1, **_TIMM, rotary=True, norm=6.0),
    "timm_rope_mixed": _timm("vit_small_patch16_rope_mixed_224", 112, 16, 1, **_TIMM, rotary=True),
    "hf_internvit": _hf(
        tf.InternVLVisionModel,
        tf.InternVLVisionConfig,
        1,
        **_HF,
        norm_type="rms_norm",
        use_qk_norm=True,
    ),
}


def planted_module(family: Family) -> nn.Module:
    """The family's module, livened, with planted units and dead ones."""
    module = family.build().eval().requires_grad_(False)
    tower = livened(family.visual(module))
    pixels = flagged_pictures(8, 1, family.size, family.patch)
    planted = plant(tower, pixels, units_of(family), norm=family.norm)
    for layer, index in DEAD:
        planted.vit.blocks[layer].down.weight[:, index] = 0
    return module


def units_of(family: Family) -> tuple[tuple[int, int], ...]:
    """(layer, index) of the planted units: two in each of the family's layers."""
    return tuple((layer, index) for layer in family.layers for index in (5, 60))


# Units that write nothing: redirecting them moves nothing.
DEAD = ((0, 7), (2, 7))


def dead_neurons() -> Neurons:
    """:data:`DEAD` as register neurons."""
    return Neurons(tuple(RegisterNeuron(*unit, score=1.0, sign=1, value=0.0) for unit in DEAD))
