"""ViTs by construction whose outlier tokens matter: later attention needs them.

The ViT that ships with regraft was never trained to need a register: zeroing its neurons does as
well as redirecting them. Here random weights get what training gives the paper's models, by hand:

1. A few hidden units of two blocks fire on few patches and write one direction there, so that
   the norm becomes many times the median.
2. In every later block the keys of tokens along that direction get a component that every query
   looks for, so that outlier tokens, or the register, draw a large share of all attention.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from regraft.neurons import Neurons, RegisterNeuron
from regraft_export.vit.hooks import redirected
from regraft_export.vit.observe import observe
from regraft_export.vit.structure import VisionTransformer, from_module

UNITS = 3  # per writing block
FIRING = 0.02  # share of patches
TIMES_MEDIAN = 12.0  # norm of an outlier token over the median


def planted(
    pixels: Tensor,
    *,
    depth: int = 8,
    width: int = 96,
    heads: int = 4,
    patch: int = 8,
    share: float = 0.4,
    seed: int = 0,
) -> tuple[VisionTransformer, Neurons]:
    """A timm VisionTransformer, and its true register neurons with their ``value``.

    Args:
        pixels: (N, 3, S, S), preprocessed images to which the construction is fitted.
        depth: blocks; those at a quarter and right behind it write.
        width: of a token.
        heads: per attention.
        patch: side of a patch in pixels.
        share: what CLS gives to the register, on average over heads, in the first block behind.
        seed: of the weights.
    """
    size = pixels.shape[2]
    module = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=size,
        patch_size=patch,
        depth=depth,
        embed_dim=width,
        num_heads=heads,
        num_classes=0,
    )
    generator = torch.Generator().manual_seed(seed)
    _draw(module, generator)
    vit = from_module(module.eval().requires_grad_(False), (size, size))
    direction = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    direction = torch.nn.functional.normalize(direction - direction.mean(), dim=0)
    writing = (depth // 4, depth // 4 + 1)
    found = []
    for layer in writing:
        for index in torch.randperm(4 * width, generator=generator)[:UNITS].tolist():
            _write(vit, pixels, layer, index, direction, generator)
            found.append(RegisterNeuron(layer, index, score=1.0, sign=1, value=0.0))
    neurons = Neurons(tuple(found))
    for layer in range(writing[1], depth):
        _attend(vit, layer, direction, _strength(pixels, patch, share))
    return vit, _valued(vit, neurons, pixels)


def _draw(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + ("bias" not in name))
            elif "token" in name or "pos" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def _write(
    vit: VisionTransformer,
    pixels: Tensor,
    layer: int,
    index: int,
    direction: Tensor,
    generator: torch.Generator,
) -> None:
    """Lets one hidden unit fire on few patches and write ``direction`` there."""
    block: Any = vit.blocks[layer].module
    up, prefix = block.mlp.fc1, vit.layout.prefix
    seen: list[Tensor] = []
    handle = up.register_forward_pre_hook(lambda m, args: seen.append(args[0][:, prefix:]))
    with torch.no_grad():
        norms = observe(vit, pixels, layers=[layer]).hidden[layer][:, prefix:].norm(dim=-1)
        handle.remove()
        row = torch.randn(up.in_features, generator=generator)
        read = (seen[0] @ row).flatten()
        edge, top = read.quantile(1 - FIRING), read.max()
        scale = 10 / float(top - edge)
        up.weight[index], up.bias[index] = row * scale, -edge * scale
        amount = TIMES_MEDIAN * float(norms.median()) / (5 * UNITS)
        vit.blocks[layer].down.weight[:, index] = direction * amount


def _strength(pixels: Tensor, patch: int, share: float) -> float:
    """The score that lifts one of the tokens to ``share`` where the others have about none."""
    tokens = (pixels.shape[2] // patch) * (pixels.shape[3] // patch) + 1
    return float(torch.logit(torch.tensor(share)) + torch.log(torch.tensor(float(tokens))))


def _attend(vit: VisionTransformer, layer: int, direction: Tensor, strength: float) -> None:
    """Lets every query of a block look for tokens along ``direction``, by ``strength``."""
    block: Any = vit.blocks[layer].module
    width, heads = vit.layout.width, vit.layout.heads
    size = width // heads
    reading = direction / block.norm1.weight
    with torch.no_grad():
        for head in range(heads):
            query, key = head * size, width + head * size
            block.attn.qkv.weight[query], block.attn.qkv.bias[query] = 0.0, size**0.5
            block.attn.qkv.weight[key] = reading * strength / width**0.5
            block.attn.qkv.bias[key] = 0.0


def _valued(vit: VisionTransformer, neurons: Neurons, pixels: Tensor) -> Neurons:
    """The neurons with what the register receives, averaged over images."""
    count, kept = vit.layout.count, dict[int, Tensor]()
    handles = []
    with torch.no_grad(), redirected(vit, neurons):
        for layer in neurons.layers:

            def keep(m: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
                kept[layer] = args[0][:, count].mean(dim=0)

            handles.append(vit.blocks[layer].down.register_forward_pre_hook(keep))
        vit.module(pixels)
    for handle in handles:
        handle.remove()
    rows = (
        RegisterNeuron(n.layer, n.index, n.score, n.sign, float(kept[n.layer][n.index]))
        for n in neurons.neurons
    )
    return Neurons(tuple(rows))
