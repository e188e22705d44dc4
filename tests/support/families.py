"""Families of models by the scheme that loads them, at small sizes and at real ones.

Every model is its library's real class, randomly initialised; :func:`planting.plant` makes units of
it write outlier tokens. A family is saved as a user would have it: a folder, or code and a
checkpoint, so that the command line loads it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def _open_clip(
    config: Callable[[], dict[str, Any]], size: int, patch: int, prefix: int = 1, **about: Any
) -> Family:
    """An OpenCLIP model of a configuration, as ``open_clip:local-dir:FOLDER``.

    open_clip is imported when a model is made: machines with a card may be without it.
    """

    def build() -> nn.Module:
        module: nn.Module = importlib.import_module("open_clip").CLIP(**config())
        return module

    def save(module: nn.Module, folder: Path) -> tuple[str, ...]:
        preprocess = {"mean": [0.5] * 3, "std": [0.2] * 3, "resize_mode": "squash"}
        about = {"model_cfg": config(), "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(about))
        save_file(module.state_dict(), folder / "open_clip_model.safetensors")
        return (f"open_clip:local-dir:{folder}",)

    return Family(
        build,
        save,
        size, patch, prefix,
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
_CLIP = {
    "embed_dim": 20,
    "quick_gelu": True,
    "vision_cfg": {"layers": 3, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 64},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1, "vocab_size": 64},
}

SMALL = {
    "open_clip": _open_clip(lambda: _CLIP, 64, 8),
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

# Further ones, of which tests export ONNX files as somebody else would.
EXPORTED = {
    "timm_vit": _timm("vit_tiny_patch16_224", 64, 8, 1, patch_size=8, **_TIMM),
    "timm_clip": _timm("vit_base_patch16_clip_224", 64, 8, 1, patch_size=8, **_TIMM),
    "timm_swiglu": _timm(
        "vit_giant_patch14_dinov2", 112, 14, 1, **_TIMM, init_values=1.0, mlp_ratio=4.0
    ),
    "timm_siglip": _timm("vit_base_patch16_siglip_224", 64, 8, 0, patch_size=8, **_TIMM),
    "hf_clip": _hf(tf.CLIPVisionModel, tf.CLIPVisionConfig, 1, **_HF),
    "hf_vit": _hf(tf.ViTModel, tf.ViTConfig, 1, **_HF, pooler_output_size=48),
    "hf_dinov2": _hf(
        tf.Dinov2Model,
        tf.Dinov2Config,
        1,
        **{k: v for k, v in _HF.items() if k != "intermediate_size"},
    ),
    **{name: SMALL[name] for name in ("open_clip", "hub_dinov2_g_reg", "hf_siglip")},
}


def _hf_dinov2(size: int, width: int, depth: int, heads: int, **options: Any) -> Family:
    return _hf(
        tf.Dinov2Model,
        tf.Dinov2Config,
        1,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=size,
        patch_size=14,
        **options,
    )


def _hf_siglip(size: int, patch: int, **options: Any) -> Family:
    settings = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "layers": (6,),
        **options,
    }
    return _hf(
        tf.SiglipVisionModel,
        tf.SiglipVisionConfig,
        0,
        image_size=size,
        patch_size=patch,
        **settings,
    )


def _published_clip(architecture: str, patch: int, **about: Any) -> Family:
    def config() -> dict[str, Any]:
        found: dict[str, Any] = importlib.import_module("open_clip").get_model_config(architecture)
        return found

    return _open_clip(config, 224, patch, **about)


_CLIP_L = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
}
_B = {"layers": (6,)}
_FOUR = {"depth": 4, "layers": (2,)}

# Published sizes: width, heads, patch, tokens and (where `reduced` says nothing) depth.
REAL = {
    "hub_dinov2_vits14": _hub("dinov2_vits14", 224, 1, **_B),
    "hub_dinov2_vitb14_reg": _hub("dinov2_vitb14_reg", 224, 5, **_B),
    "hub_dinov2_vitl14": _hub("dinov2_vitl14", 224, 1, layers=(12,)),
    "timm_dinov2_s_518_reg": _timm("vit_small_patch14_reg4_dinov2", 518, 14, 5, **_B),
    "timm_dinov2_b": _timm("vit_base_patch14_dinov2", 224, 14, 1, **_B),
    "hf_dinov2_b": _hf_dinov2(224, 768, 12, 12, **_B),
    "hf_dinov2_g": _hf_dinov2(
        224, 1536, 4, 24, use_swiglu_ffn=True, layers=(2,), reduced="depth 4 of 40"
    ),
    "timm_dinov2_g_reg": _timm(
        "vit_giant_patch14_reg4_dinov2", 224, 14, 5, **_FOUR, reduced="depth 4 of 40"
    ),
    "open_clip_b32_quickgelu": _published_clip("ViT-B-32-quickgelu", 32, **_B),
    "open_clip_b16": _published_clip("ViT-B-16", 16, **_B),
    "open_clip_l14": _published_clip("ViT-L-14", 14, layers=(12,)),
    "timm_clip_b16_quickgelu": _timm("vit_base_patch16_clip_quickgelu_224", 224, 16, 1, **_B),
    # As LLaVA reads it: --layers 22, the block before the last.
    "hf_clip_l14_336": _hf(
        tf.CLIPVisionModel, tf.CLIPVisionConfig, 1, **_CLIP_L, image_size=336, layers=(12,)
    ),
    "hf_siglip_b16_196_tokens": _hf_siglip(224, 16),
    "hf_siglip_b16_256_tokens": _hf_siglip(256, 16),
    "hf_siglip_so400m_729_tokens": _hf_siglip(
        378,
        14,
        hidden_size=1152,
        num_hidden_layers=4,
        num_attention_heads=16,
        intermediate_size=4304,
        layers=(2,),
        reduced="depth 4 of 27",
    ),
    "timm_siglip_b16": _timm("vit_base_patch16_siglip_224", 224, 16, 0, **_B),
    "timm_deit_b": _timm("deit_base_patch16_224", 224, 16, 1, **_B),
    "timm_deit_b_distilled": _timm("deit_base_distilled_patch16_224", 224, 16, 2, **_B),
    "timm_deit3_b": _timm("deit3_base_patch16_224", 224, 16, 1, **_B),
    "timm_vit_b": _timm("vit_base_patch16_224", 224, 16, 1, **_B),  # AugReg's and MAE's
    "timm_eva02_b": _timm("eva02_base_patch14_224", 224, 14, 1, **_B, rotary=True, norm=6.0),
    "timm_dinov3_b": _timm("vit_base_patch16_dinov3", 256, 16, 5, **_B, rotary=True),
    "timm_dinov3_7b": _timm(
        "vit_7b_patch16_dinov3",
        224,
        16,
        5,
        depth=2,
        layers=(0,),
        rotary=True,
        reduced="depth 2 of 40",
    ),
    "hf_dinov3_b": _hf(
        tf.DINOv3ViTModel,
        tf.DINOv3ViTConfig,
        5,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        num_register_tokens=4,
        image_size=224,
        patch_size=16,
        rotary=True,
        **_B,
    ),
    "timm_internvit_300m": _timm(
        "vit_intern300m_patch14_448", 448, 14, 1, **_FOUR, reduced="depth 4 of 24"
    ),
    "hf_internvit_6b": _hf(
        tf.InternVLVisionModel,
        tf.InternVLVisionConfig,
        1,
        hidden_size=3200,
        num_hidden_layers=3,
        num_attention_heads=25,
        intermediate_size=12800,
        norm_type="rms_norm",
        use_qk_norm=True,
        image_size=224,
        patch_size=14,
        layers=(1,),
        reduced="depth 3 of 45",
    ),
}


def planted_module(family: Family) -> nn.Module:
    """The family's module, livened, with planted units and dead ones."""
    module = family.build().eval().requires_grad_(False)
    tower = livened(family.visual(module))
    pixels = flagged_pictures(8, 1, family.size, family.patch)
    planted = plant(tower, pixels, units_of(family), norm=family.norm)
    for layer, index in DEAD:
        if layer < len(planted.vit.blocks):
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
