"""A ViT written by hand, and one with planted register neurons.

Needs torch alone, so that the command line loads it as ``python:FILE.py:FUNCTION``, also in a
process of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, PATCH, WIDTH, HIDDEN, HEADS, DEPTH = 32, 8, 48, 96, 3, 4
# (layer, index, sign) of the units that write the outliers of `planted`.
PLANTED = ((1, 7, 1), (1, 40, 1), (2, 13, 1))
CONFIG = {
    "input_size": (3, SIZE, SIZE),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.widen, self.narrow = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + self.narrow(F.gelu(self.widen(self.before_mlp(x))))


class HandmadeVit(nn.Module):
    """Returns the normalised CLS token."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (SIZE // PATCH) ** 2, WIDTH))
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.cut(pixels).flatten(2).transpose(1, 2)
        x = (
            torch.cat([self.cls_token.expand(pixels.shape[0], -1, -1), patches], dim=1)
            + self.positions
        )
        for layer in self.layers:
            x = layer(x)
        return self.last(x)[:, 0]


def _drawn(seed: int) -> HandmadeVit:
    generator = torch.Generator().manual_seed(seed)
    module = HandmadeVit()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + ("weight" in name))
            elif "token" in name or "positions" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module


def plain() -> tuple[nn.Module, dict[str, object]]:
    """Random weights, no outliers."""
    return _drawn(1), CONFIG


def planted() -> tuple[nn.Module, dict[str, object]]:
    """Random weights, and units that fire on a few patches and write a large vector there."""
    module = _drawn(0)
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(WIDTH, generator=generator)
    direction /= direction.norm()
    with torch.no_grad():
        for layer, index, sign in PLANTED:
            block = module.layers[layer]
            probe = torch.randn(WIDTH, generator=generator)
            block.widen.weight[index] = probe - probe.mean()
            block.widen.bias[index] = -8.0
            block.narrow.weight[:, index] = sign * 40.0 * direction
    return module, CONFIG


def without_preprocessing() -> nn.Module:
    """A module without a config: the command line must be given one."""
    return _drawn(1)


def not_a_vit() -> tuple[nn.Module, dict[str, object]]:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 8)), CONFIG


class FlatBlock(Block):
    """Its MLP works on rows of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        rows = self.before_mlp(x).reshape(-1, WIDTH)
        return x + self.narrow(F.gelu(self.widen(rows))).reshape(x.shape)


class AnySize(HandmadeVit):
    """Positions are resampled to the image."""

    def forward(self, pixels: Tensor) -> Tensor:
        grid = self.cut(pixels)
        at = self.positions[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        at = F.interpolate(at, size=grid.shape[2:], mode="bilinear")
        patches = (grid + at).flatten(2).transpose(1, 2)
        first = (self.cls_token + self.positions[:, :1]).expand(pixels.shape[0], -1, -1)
        x = torch.cat([first, patches], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)
