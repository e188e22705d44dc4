"""Every family of models at a small size: the real classes, three blocks deep."""

from __future__ import annotations

import transformers as tf
from tests.support.families import (
    of_hub,
    of_open_clip,
    of_timm,
    of_transformers,
    of_transformers_mae,
)

_TIMM = {"depth": 3, "embed_dim": 48, "num_heads": 3}
_TIMM_8 = {**_TIMM, "patch_size": 8}
_DINOV2 = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
_HF = {**_DINOV2, "intermediate_size": 96}
_CLIP = {
    "embed_dim": 20,
    "quick_gelu": True,
    "vision_cfg": {"layers": 3, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 64},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1, "vocab_size": 64},
}

SMALL = {
    "hub_dinov2": of_hub("tiny", 112, 1),
    "hub_dinov2_g_reg": of_hub("tiny_g_reg", 112, 5),
    "timm_dinov2": of_timm("vit_small_patch14_dinov2", 112, 14, 1, **_TIMM),
    "timm_dinov2_reg": of_timm("vit_small_patch14_reg4_dinov2", 112, 14, 5, **_TIMM),
    "timm_dinov2_g": of_timm("vit_giant_patch14_dinov2", 112, 14, 1, **_TIMM, mlp_ratio=4.0),
    "hf_dinov2": of_transformers(tf.Dinov2Model, tf.Dinov2Config, 1, **_DINOV2),
    "hf_dinov2_reg": of_transformers(
        tf.Dinov2WithRegistersModel, tf.Dinov2WithRegistersConfig, 5, **_DINOV2
    ),
    "hf_dinov2_g_reg": of_transformers(
        tf.Dinov2WithRegistersModel,
        tf.Dinov2WithRegistersConfig,
        5,
        **_DINOV2,
        use_swiglu_ffn=True,
    ),
    "open_clip": of_open_clip(lambda: _CLIP, 64, 8),
    "timm_clip": of_timm("vit_base_patch16_clip_224", 64, 8, 1, **_TIMM_8),
    "hf_clip": of_transformers(tf.CLIPVisionModel, tf.CLIPVisionConfig, 1, **_HF),
    "hf_clip_projection": of_transformers(
        tf.CLIPVisionModelWithProjection, tf.CLIPVisionConfig, 1, **_HF, projection_dim=20
    ),
    "timm_siglip": of_timm("vit_base_patch16_siglip_224", 64, 8, 0, **_TIMM_8),
    "hf_siglip": of_transformers(tf.SiglipVisionModel, tf.SiglipVisionConfig, 0, **_HF),
    "timm_vit": of_timm("vit_tiny_patch16_224", 64, 8, 1, **_TIMM_8),  # DeiT, AugReg and MAE too
    "timm_deit_distilled": of_timm("deit_tiny_distilled_patch16_224", 64, 8, 2, **_TIMM_8),
    "timm_deit3": of_timm("deit3_small_patch16_224", 64, 8, 1, **_TIMM_8),
    "hf_vit": of_transformers(tf.ViTModel, tf.ViTConfig, 1, **_HF, pooler_output_size=48),
    "hf_deit": of_transformers(tf.DeiTModel, tf.DeiTConfig, 2, **_HF, pooler_output_size=48),
    "hf_mae": of_transformers_mae(**_HF),
    "timm_eva02": of_timm("eva02_tiny_patch14_224", 112, 14, 1, **_TIMM, rotary=True, norm=6.0),
    "timm_rope_mixed": of_timm(
        "vit_small_patch16_rope_mixed_224", 112, 16, 1, **_TIMM, rotary=True
    ),
    "timm_dinov3": of_timm("vit_small_patch16_dinov3", 112, 16, 5, **_TIMM, rotary=True),
    "hf_dinov3": of_transformers(
        tf.DINOv3ViTModel, tf.DINOv3ViTConfig, 5, **_HF, num_register_tokens=4, rotary=True
    ),
    "timm_internvit": of_timm("vit_intern300m_patch14_448", 112, 14, 1, **_TIMM),
    "hf_internvit": of_transformers(
        tf.InternVLVisionModel,
        tf.InternVLVisionConfig,
        1,
        **_HF,
        norm_type="rms_norm",
        use_qk_norm=True,
    ),
}

# Those of which tests export ONNX files as somebody else would.
EXPORTED = {
    name: SMALL[name]
    for name in (
        "timm_vit",
        "timm_clip",
        "timm_dinov2_g",
        "timm_siglip",
        "hf_clip",
        "hf_vit",
        "hf_dinov2",
        "open_clip",
        "hub_dinov2_g_reg",
        "hf_siglip",
    )
}
