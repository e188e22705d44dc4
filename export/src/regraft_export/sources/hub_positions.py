"""Position embeddings of DINOv2's torch.hub models at another image size than the checkpoint's.

They resample the embedding in every forward pass, which would stay in the graph as an operator on
a constant. The image size of a bundle is fixed, so the model's own rule is applied once.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn


def fix_image_size(module: nn.Module, image_size: tuple[int, int]) -> None:
    """Makes the model work at this image size (H, W) and no other; leaves other models as they are.

    A model is taken for one of DINOv2's if it has ``pos_embed``, ``patch_size`` and a method
    ``interpolate_pos_encoding(tokens, height, width)``.
    """
    model: Any = module
    positions, patch = getattr(model, "pos_embed", None), getattr(model, "patch_size", None)
    if not isinstance(positions, Tensor) or not isinstance(patch, int):
        return
    if not callable(getattr(model, "interpolate_pos_encoding", None)):
        return
    patches = (image_size[0] // patch) * (image_size[1] // patch)
    tokens = positions.new_zeros(1, 1 + patches, positions.shape[2])
    with torch.no_grad():
        resampled: Tensor = model.interpolate_pos_encoding(tokens, *image_size)
    model.pos_embed = nn.Parameter(resampled.detach().clone(), requires_grad=False)
    model.interpolate_pos_encoding = types.MethodType(_fixed, model)


def _fixed(self: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    positions: Tensor = self.pos_embed
    return positions
