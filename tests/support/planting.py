"""ViTs in which known units are made to write outlier tokens, and pictures for them.

Works on any structure: the rows to set are those of the Linear layers in front of the neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regraft_export.vit.structure import Block, VisionTransformer, first_tensor, from_module

Unit = tuple[int, int]
SIZE, PATCH = 64, 8


def flagged_pictures(count: int, seed: int, size: int = SIZE, patch: int = PATCH) -> Tensor:
    """(count, 3, size, size): noise, and in each picture two flat patches of one colour."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, size, size, generator=draw)
    side = size // patch
    for picture in pixels:
        for place in torch.randperm(side * side, generator=draw)[:2].tolist():
            row, col = divmod(place, side)
            area = (slice(row * patch, (row + 1) * patch), slice(col * patch, (col + 1) * patch))
            picture[:, *area] = torch.tensor([1.5, -1.0, 0.5])[:, None, None]
    return pixels


@dataclass(frozen=True)
class Planted:
    """A ViT, its true units, and those of them that act through negative activations."""

    vit: VisionTransformer
    units: tuple[Unit, ...]
    negative: tuple[Unit, ...]


def up_projections(block: Block) -> tuple[tuple[nn.Linear, int], tuple[nn.Linear, int] | None]:
    """The Linear and first row in front of the non-linearity; in SwiGLU those of the value too."""
    hidden, width = block.down.in_features, block.down.out_features
    linears = [m for m in block.module.modules() if isinstance(m, nn.Linear)]
    ups = [m for m in linears if m.in_features == width and m.out_features == hidden]
    packed = [m for m in linears if m.in_features == width and m.out_features == 2 * hidden]
    if packed:
        return (packed[0], 0), (packed[0], hidden)
    return (ups[0], 0), ((ups[1], 0) if len(ups) > 1 else None)


def separate(inputs: Tensor, flagged: Tensor) -> tuple[Tensor, Tensor]:
    """A row (D,) and bias with row . x + bias = 1 at flagged tokens on average, -1 elsewhere."""
    yes, no = inputs[flagged], inputs[~flagged]
    row = yes.mean(0) - no.mean(0)
    high, low = (yes @ row).mean(), (no @ row).mean()
    scale = 2 / (high - low)
    return row * scale, 1 - high * scale


def plant(
    module: nn.Module,
    pixels: Tensor,
    units: Sequence[Unit],
    *,
    negative: Sequence[Unit] = (),
    norm: float = 8.0,
) -> Planted:
    """Makes ``units`` write tokens of about ``norm`` times the median at the flat patches.

    The units of one layer share the work; later layers write as much again. A negative unit holds
    GELU's least value (SwiGLU: a large negative one) there and 0 elsewhere.
    """
    vit = from_module(module, (pixels.shape[2], pixels.shape[3]))
    draw = torch.Generator().manual_seed(1)
    target = torch.nn.functional.normalize(torch.randn(vit.layout.width, generator=draw), dim=0)
    rows, cols = vit.layout.grid
    cells = pixels.unfold(2, pixels.shape[2] // rows, pixels.shape[2] // rows)
    cells = cells.unfold(3, pixels.shape[3] // cols, pixels.shape[3] // cols)
    is_flat = (cells.std(dim=(4, 5)).amax(dim=1) < 1e-4).flatten(1)
    flagged = torch.cat([torch.zeros(len(pixels), vit.layout.prefix, dtype=torch.bool), is_flat], 1)
    layers = sorted({layer for layer, _ in units})
    for layer in layers:
        here = [index for at, index in units if at == layer]
        block = vit.blocks[layer]
        with torch.no_grad():
            inputs, out, _ = _seen(vit, pixels, layer)
            row, bias = separate(inputs, flagged)
            median = out[:, vit.layout.prefix :].norm(dim=-1).median()
            share = norm * median / len(here) / len(layers)
            for index in here:
                _set_unit(block, index, row, bias, -1.0 if (layer, index) in negative else 1.0)
            # Measured, because a norm may lie between the non-linearity and the neuron.
            hidden = _seen(vit, pixels, layer)[2]
            for index in here:
                activation = float(hidden[:, :, index][flagged].mean())
                column = target * share / activation
                block.down.weight[:, index] = (
                    column if block.scale is None else column / block.scale
                )
    return Planted(vit, tuple(units), tuple(negative))


def _seen(vit: VisionTransformer, pixels: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the MLP's first Linear of a layer is given, what the block gives, the activation."""
    seen: dict[str, Tensor] = {}
    block = vit.blocks[layer]
    up = up_projections(block)[0][0]
    hooks = [
        up.register_forward_pre_hook(lambda m, a: seen.update(inputs=a[0])),
        block.module.register_forward_hook(lambda m, a, out: seen.update(out=first_tensor(out))),
        block.down.register_forward_pre_hook(lambda m, a: seen.update(hidden=a[0])),
    ]
    vit.module(pixels)
    for hook in hooks:
        hook.remove()
    return seen["inputs"], seen["out"], seen["hidden"]


def _set_unit(block: Block, index: int, row: Tensor, bias: Tensor, sign: float) -> None:
    """Sets one unit's rows."""
    (up, first), value = up_projections(block)
    if value is not None:
        # The gate is about 12 or 0 (silu of plus or minus 12), the value +1 or -1 everywhere.
        up.weight[first + index], up.bias[first + index] = 12 * row, 12 * bias
        linear, start = value
        linear.weight[start + index], linear.bias[start + index] = 0.0, sign
    elif sign > 0:
        up.weight[index], up.bias[index] = 12 * row, 12 * bias
    else:
        # GELU's least value, -0.17, is at -0.75; elsewhere the input is -12.75 and the value 0.
        up.weight[index], up.bias[index] = 6 * row, 6 * bias - 6.75


def grey_levels(pixels: Tensor, std: float = 0.2) -> NDArray[np.uint8]:
    """uint8 (N, H, W, 3), which mean 0.5 and ``std`` turn back into about ``pixels``."""
    levels = ((pixels * std + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).numpy()
