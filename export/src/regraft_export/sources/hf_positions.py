"""Position embeddings of transformers' ViTs at another image size than the checkpoint's.

transformers resamples them in every forward pass, some models always and others when asked to by
an argument. The image size of a bundle is fixed, so the model's own rule is applied once.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft_export.sources.data_config import check_patches


def fix_image_size(subject: str, module: nn.Module, image_size: tuple[int, int]) -> None:
    """Makes ``module(pixel_values)`` work at this image size and no other.

    Raises:
        ModelError: the size is no multiple of the patch size, or the model cannot take it.
    """
    config: Any = module.config
    native, patch = _pair(config.image_size), _pair(config.patch_size)
    check_patches(subject, image_size, patch)
    if native == image_size or hasattr(module, "rope_embeddings"):
        return  # rotary positions are computed from the picture's size
    embeddings: Any = _embeddings(subject, module)
    learned = isinstance(getattr(embeddings, "position_embeddings", None), nn.Parameter)
    if not learned and image_size[0] != image_size[1]:
        raise ModelError(
            f"{subject}: {type(module).__name__} takes square images alone, not {image_size}; "
            "give another --image-size"
        )
    positions = _resampled(embeddings, image_size, patch, learned)
    if learned:
        embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)
        embeddings.image_size = embeddings.patch_embeddings.image_size = image_size
    else:
        embeddings.position_embedding = nn.Embedding(positions.shape[1], positions.shape[2])
        embeddings.position_embedding.weight = nn.Parameter(positions[0], requires_grad=False)
        embeddings.position_ids = torch.arange(positions.shape[1])[None]
        prefix = embeddings.num_positions - embeddings.num_patches
        embeddings.num_positions = positions.shape[1]
        embeddings.num_patches = positions.shape[1] - prefix
        embeddings.image_size = image_size[0]
    # DINOv2 asks for the resampled embedding in every pass; it has it already.
    embeddings.interpolate_pos_encoding = types.MethodType(_fixed_positions, embeddings)
    config.image_size = image_size[0] if image_size[0] == image_size[1] else list(image_size)


def _embeddings(subject: str, module: nn.Module) -> nn.Module:
    for part in module.modules():
        if hasattr(part, "interpolate_pos_encoding"):
            return part
    raise ModelError(
        f"{subject}: {type(module).__name__} cannot take another image size than "
        f"{module.config.image_size}"  # type: ignore[union-attr]
    )


@torch.no_grad()
def _resampled(
    embeddings: Any, image_size: tuple[int, int], patch: tuple[int, int], learned: bool
) -> Tensor:
    """The position embedding (1, P + patches, D) by the model's own rule."""
    own = embeddings.position_embeddings if learned else embeddings.position_embedding.weight[None]
    native = embeddings.patch_embeddings.num_patches if learned else embeddings.num_patches
    prefix = own.shape[1] - native
    patches = (image_size[0] // patch[0]) * (image_size[1] // patch[1])
    tokens = own.new_zeros(1, prefix + patches, own.shape[2])
    resampled: Tensor = embeddings.interpolate_pos_encoding(tokens, *image_size)
    return resampled.clone()


def _fixed_positions(self: Any, embeddings: Tensor, height: int, width: int) -> Tensor:
    """Stands in for ``interpolate_pos_encoding`` of an embedding that is resampled already."""
    if hasattr(self, "position_embedding"):
        positions: Tensor = self.position_embedding(self.position_ids)
    else:
        positions = self.position_embeddings
    return positions


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return int(first), int(second)
