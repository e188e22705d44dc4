"""Models that benchmarks run: real architectures, random weights, neurons drawn at random.

What is timed does not depend on the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
from timm.layers import LayerScale

from regraft.neurons import Neurons, RegisterNeuron
from regraft_export.register_constants import RegisterConstants
from regraft_export.vit.structure import VisionTransformer, from_module


def load(name: str, image_size: int | None = None, depth: int | None = None) -> VisionTransformer:
    """A timm model without classifier, float32, on the CPU.

    Args:
        name: as timm has it.
        image_size: pixels; None for the model's own.
        depth: fewer blocks, to try a script; None for all.
    """
    options: dict[str, Any] = {"img_size": image_size} if image_size else {}
    if depth:
        options["depth"] = depth
    module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    for layer in module.modules():
        if isinstance(layer, LayerScale):
            # timm starts at 1e-5, which fp16 weights cannot take in, as they can what was trained.
            torch.nn.init.constant_(layer.gamma, 0.1)
    size = (image_size,) * 2 if image_size else module.default_cfg["input_size"][1:]
    return from_module(module.eval().requires_grad_(False), (size[0], size[1]))


def image_size(vit: VisionTransformer) -> tuple[int, int]:
    """(H, W) of its pixels."""
    embed: Any = vit.module.patch_embed
    height, width = embed.img_size
    return int(height), int(width)


def some_neurons(vit: VisionTransformer, layers: list[int], count: int) -> Neurons:
    """``count`` neurons, spread over these layers."""
    rng = np.random.default_rng(0)
    hidden = vit.blocks[0].down.in_features
    chosen = [(layers[i % len(layers)], int(rng.integers(hidden))) for i in range(count)]
    return Neurons(tuple(RegisterNeuron(a, b, value=1.0) for a, b in dict.fromkeys(chosen)))


def some_constants(vit: VisionTransformer, first: int) -> RegisterConstants:
    """Drawn at random, in every block from ``first`` on: kv at its most expensive."""
    heads = vit.layout.heads
    shape = (2, vit.layout.depth - first, heads, 1, vit.layout.width // heads)
    drawn = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    layers = range(first, vit.layout.depth)
    return RegisterConstants(*(dict(zip(layers, of_kind, strict=True)) for of_kind in drawn))
