"""Every family of models at its published sizes: width, heads, patch, tokens, depth.

Less deep, and named so, are those whose full depth would want more than 24 GiB.
"""

from __future__ import annotations

import importlib
from typing import Any

import transformers as tf
from tests.support.families import Family, of_hub, of_open_clip, of_timm, of_transformers

# Blocks with planted units, by depth: the middle one.
_B, _L, _FOUR = {"layers": (6,)}, {"layers": (12,)}, {"layers": (2,)}
_SHALLOW = {**_FOUR, "reduced": "depth 4 of 40"}


def _sizes(width: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    """A transformers configuration."""
    names = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return {"intermediate_size": 4 * width, **names, **more}


def _dinov2() -> dict[str, Family]:
    """S, B, L and g, each with and without trained registers, by each library."""
    found: dict[str, Family] = {}
    long = {"s": "small", "b": "base", "l": "large", "g": "giant"}
    sizes = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 4, 24)}
    about = {"s": _B, "b": _B, "l": _L, "g": _SHALLOW}
    for size, (width, depth, heads) in sizes.items():
        more: dict[str, Any] = about[size]
        shallow = {"depth": depth} if size == "g" else {}
        for end, reg, prefix in (("", "", 1), ("_reg", "reg4_", 5)):
            found[f"hub_dinov2_{size}{end}"] = of_hub(
                f"dinov2_vit{size}14{end}{'_of_depth_4' if shallow else ''}", 224, prefix, **more
            )
            found[f"timm_dinov2_{size}{end}"] = of_timm(
                f"vit_{long[size]}_patch14_{reg}dinov2", 224, 14, prefix, **shallow, **more
            )
            kind = "Dinov2WithRegisters" if end else "Dinov2"
            config = _sizes(width, depth, heads, use_swiglu_ffn=size == "g")
            del config["intermediate_size"]
            found[f"hf_dinov2_{size}{end}"] = of_transformers(
                getattr(tf, f"{kind}Model"), getattr(tf, f"{kind}Config"), prefix,
                **config, image_size=224, patch_size=14, **more,
            )  # fmt: skip
    # The size it was trained at: 1369 patches.
    found["timm_dinov2_s_reg_518"] = of_timm("vit_small_patch14_reg4_dinov2", 518, 14, 5, **_B)
    return found


def _clip() -> dict[str, Family]:
    """B/32, B/16, L/14 and L/14 at 336 px, by each library; most with OpenAI's QuickGELU."""
    found: dict[str, Family] = {}
    for short, size, patch, in_open_clip, in_timm in (
        ("b32", 224, 32, "ViT-B-32-quickgelu", "vit_base_patch32_clip_quickgelu_224"),
        ("b16", 224, 16, "ViT-B-16", "vit_base_patch16_clip_quickgelu_224"),
        ("l14", 224, 14, "ViT-L-14", "vit_large_patch14_clip_quickgelu_224"),
        ("l14_336", 336, 14, "ViT-L-14-336-quickgelu", "vit_large_patch14_clip_quickgelu_336"),
    ):
        large = short[0] == "l"
        about = _L if large else _B
        config = _sizes(1024, 24, 16) if large else _sizes(768, 12, 12)
        found[f"open_clip_{short}"] = of_open_clip(
            lambda name=in_open_clip: importlib.import_module("open_clip").get_model_config(name),
            size, patch, **about,
        )  # fmt: skip
        found[f"timm_clip_{short}"] = of_timm(in_timm, size, patch, 1, **about)
        found[f"hf_clip_{short}"] = of_transformers(
            tf.CLIPVisionModelWithProjection, tf.CLIPVisionConfig, 1,
            **config, projection_dim=768 if large else 512,
            image_size=size, patch_size=patch, **about,
        )  # fmt: skip
    return found


def _siglip() -> dict[str, Family]:
    """196, 256 and 729 tokens; so400m's MLP is 4304 wide."""
    found: dict[str, Family] = {}
    b16 = _sizes(768, 12, 12)
    so400m = _sizes(1152, 27, 16, intermediate_size=4304)
    for size, patch, short, config, name in (
        (224, 16, "b16_196_tokens", b16, "vit_base_patch16_siglip_224"),
        (256, 16, "b16_256_tokens", b16, "vit_base_patch16_siglip_256"),
        (378, 14, "so400m_729_tokens", so400m, "vit_so400m_patch14_siglip_378"),
    ):
        about = {"layers": (config["num_hidden_layers"] // 2,)}
        found[f"timm_siglip_{short}"] = of_timm(name, size, patch, 0, **about)
        found[f"hf_siglip_{short}"] = of_transformers(
            tf.SiglipVisionModel, tf.SiglipVisionConfig, 0,
            **config, image_size=size, patch_size=patch, **about,
        )  # fmt: skip
    return found


def _supervised() -> dict[str, Family]:
    """ViTs with a class token alone; AugReg's and MAE's are timm's plain one."""
    found = {
        f"timm_{name}": of_timm(f"{name}_patch16_224", 224, 16, 2 if "dist" in name else 1, **_B)
        for name in ("deit_base", "deit_base_distilled", "deit3_base", "vit_base")
    }
    at = {**_sizes(768, 12, 12), "image_size": 224, "patch_size": 16, **_B}
    found["hf_vit_b"] = of_transformers(tf.ViTModel, tf.ViTConfig, 1, **at)
    found["hf_deit_b"] = of_transformers(tf.DeiTModel, tf.DeiTConfig, 2, **at)
    return found


def _rotary() -> dict[str, Family]:
    return {
        "timm_eva02_b": of_timm(
            "eva02_base_patch14_224", 224, 14, 1, **_B, rotary=True, norm=6.0
        ),
        "timm_dinov3_b": of_timm("vit_base_patch16_dinov3", 256, 16, 5, **_B, rotary=True),
        "timm_dinov3_7b": of_timm(
            "vit_7b_patch16_dinov3", 224, 16, 5, depth=2,
            layers=(0,), rotary=True, reduced="depth 2 of 40",
        ),
        "hf_dinov3_b": of_transformers(
            tf.DINOv3ViTModel, tf.DINOv3ViTConfig, 5, **_sizes(768, 12, 12),
            num_register_tokens=4, image_size=224, patch_size=16, rotary=True, **_B,
        ),
    }  # fmt: skip


def _internvit() -> dict[str, Family]:
    return {
        "timm_internvit_300m": of_timm("vit_intern300m_patch14_448", 448, 14, 1, **_L),
        "hf_internvit_6b": of_transformers(
            tf.InternVLVisionModel, tf.InternVLVisionConfig, 1, **_sizes(3200, 3, 25),
            norm_type="rms_norm", use_qk_norm=True, image_size=224, patch_size=14,
            layers=(1,), reduced="depth 3 of 45",
        ),
    }  # fmt: skip


REAL = {**_dinov2(), **_clip(), **_siglip(), **_supervised(), **_rotary(), **_internvit()}
