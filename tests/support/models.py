"""Small models of every family, with weights that make every part count."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import transformers as tf
from tests.support import handmade_vit
from torch import nn

from regraft.neurons import Neurons, RegisterNeuron
from regraft_export.vit.structure import VisionTransformer, from_module

torch.set_num_threads(1)  # two test processes share two cores


@dataclass(frozen=True)
class Family:
    """How to build a small model, and what its structure is.

    Attributes:
        build: makes the module, with the library's own initial weights.
        size: (H, W).
        grid: patch grid.
        prefix: prefix tokens.
        class_token: whether token 0 is CLS.
        hidden: neurons per block.
        scaled: whether LayerScale follows the MLP.
        entry: the module before which the register enters; how its name ends.
        final: the module whose output is ``last_hidden_state``; how its name ends.
        pooled: shape of what the forward returns for an image, without the batch.
    """

    build: Callable[[], nn.Module]
    size: tuple[int, int]
    grid: tuple[int, int]
    prefix: int
    class_token: bool
    hidden: int
    scaled: bool
    entry: str
    final: str
    pooled: tuple[int, ...] | None


def _timm(name: str, **options: object) -> Callable[[], nn.Module]:
    options = {"depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 0, **options}
    return lambda: timm.create_model(name, pretrained=False, **options)


_HF = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}


def _hf(model: type, config: type, **options: object) -> Callable[[], nn.Module]:
    return lambda: model(config(**{**_HF, **options}))


_P8 = {"img_size": (48, 32), "patch_size": 8}
_P14 = {"img_size": (56, 42)}

FAMILIES = {
    "timm": Family(
        _timm("vit_tiny_patch16_224", **_P8),
        (48, 32), (6, 4), 1, True, 192, False, "blocks.0", "norm", (48,),
    ),
    "timm_without_class_token": Family(
        _timm("vit_tiny_patch16_224", **_P8, class_token=False, global_pool="avg"),
        (48, 32), (6, 4), 0, False, 192, False, "blocks.0", "blocks.2", (48,),
    ),
    "timm_average_pool": Family(
        _timm("vit_tiny_patch16_224", **_P8, global_pool="avg"),
        (48, 32), (6, 4), 1, True, 192, False, "blocks.0", "blocks.2", (48,),
    ),
    "timm_trained_registers": Family(
        _timm("vit_small_patch14_reg4_dinov2", **_P14, init_values=1.0),
        (56, 42), (4, 3), 5, True, 192, True, "blocks.0", "norm", (48,),
    ),
    "timm_layer_scale": Family(
        _timm("vit_small_patch14_dinov2", **_P14, init_values=1.0),
        (56, 42), (4, 3), 1, True, 192, True, "blocks.0", "norm", (48,),
    ),
    "timm_swiglu": Family(
        _timm("vit_giant_patch14_dinov2", **_P14, init_values=1.0, mlp_ratio=4.0),
        (56, 42), (4, 3), 1, True, 96, True, "blocks.0", "norm", (48,),
    ),
    "timm_clip": Family(
        _timm("vit_base_patch16_clip_224", **_P8),
        (48, 32), (6, 4), 1, True, 192, False, "norm_pre", "norm", (48,),
    ),
    "timm_siglip": Family(
        _timm("vit_base_patch16_siglip_224", **_P8),
        (48, 32), (6, 4), 0, False, 192, False, "blocks.0", "norm", (48,),
    ),
    "timm_distilled": Family(
        _timm("deit_tiny_distilled_patch16_224", **_P8),
        (48, 32), (6, 4), 2, True, 192, False, "blocks.0", "norm", (48,),
    ),
    "hf_dinov2": Family(
        _hf(tf.Dinov2Model, tf.Dinov2Config),
        (32, 32), (4, 4), 1, True, 192, True, "encoder.layer.0", "layernorm", (48,),
    ),
    "hf_dinov2_swiglu": Family(
        _hf(tf.Dinov2Model, tf.Dinov2Config, use_swiglu_ffn=True),
        (32, 32), (4, 4), 1, True, 128, True, "encoder.layer.0", "layernorm", (48,),
    ),
    "hf_dinov2_registers": Family(
        _hf(tf.Dinov2WithRegistersModel, tf.Dinov2WithRegistersConfig, num_register_tokens=4),
        (32, 32), (4, 4), 5, True, 192, True, "encoder.layer.0", "layernorm", (48,),
    ),
    "hf_vit": Family(
        _hf(tf.ViTModel, tf.ViTConfig, intermediate_size=96, pooler_output_size=48),
        (32, 32), (4, 4), 1, True, 96, False, "layers.0", "layernorm", (48,),
    ),
    "hf_deit": Family(
        _hf(tf.DeiTModel, tf.DeiTConfig, intermediate_size=96, pooler_output_size=48),
        (32, 32), (4, 4), 2, True, 96, False, "layers.0", "layernorm", (48,),
    ),
    "hf_clip": Family(
        _hf(tf.CLIPVisionModel, tf.CLIPVisionConfig, intermediate_size=96),
        (32, 32), (4, 4), 1, True, 96, False,
        "pre_layrnorm", "encoder.layers.2", (48,),
    ),
    "hf_clip_projection": Family(
        _hf(
            tf.CLIPVisionModelWithProjection,
            tf.CLIPVisionConfig,
            intermediate_size=96,
            projection_dim=20,
        ),
        (32, 32), (4, 4), 1, True, 96, False,
        "pre_layrnorm", "encoder.layers.2", (20,),
    ),
    "handmade": Family(
        lambda: handmade_vit.planted()[0],
        (32, 32), (4, 4), 1, True, 96, False, "layers.0", "last", (48,),
    ),
}  # fmt: skip


def livened(module: nn.Module, seed: int = 0) -> nn.Module:
    """Redraws all weights, so that no zero bias, unit norm or tiny scale hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = parameter.ndim == 1 and not name.endswith("bias")
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise + around_one)
            elif "token" in name or "pos" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.eval().requires_grad_(False)


@functools.cache
def vit(name: str) -> VisionTransformer:
    """The small model of a family and its structure; shared, so leave it as it is."""
    family = FAMILIES[name]
    return from_module(livened(family.build()), family.size)


def neurons(vit: VisionTransformer, layers: tuple[int, ...] = (0, 2), seed: int = 0) -> Neurons:
    """Four neurons in each of some layers: both signs, and values as finding records them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layer in layers:
        hidden = vit.blocks[layer].down.in_features
        chosen = torch.randperm(hidden, generator=generator)[:4].tolist()
        values = torch.randn(4, generator=generator).tolist()
        found += [
            RegisterNeuron(layer, index, score=1.0, sign=sign, value=2 * value)
            for index, sign, value in zip(chosen, (1, 1, -1, 1), values, strict=True)
        ]
    return Neurons(tuple(found))
