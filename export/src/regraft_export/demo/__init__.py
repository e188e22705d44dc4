"""A small ViT that ships with the package, so that everything runs without a download.

It was trained for this purpose and writes outlier tokens with twelve known MLP units: `vit.py`
loads it, `drawing.py` draws the pictures it knows, `samples/` holds 64 of them, `train.py` made
the weights and `train.log` says how that went, `measure.py` has what the log reports. Importing
this package does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["sample_images_folder", "shipped_vit"]


def shipped_vit() -> tuple[nn.Module, dict[str, Any]]:
    """The shipped ViT, float32 in eval mode, and its timm data config; needs torch and timm.

    Takes (B, 3, 96, 96) float32 and returns (B, labels) float32 logits. As a MODEL on the command
    line it is `python:regraft_export.demo:shipped_vit`.
    """
    from regraft_export.demo.vit import load_shipped_vit

    return load_shipped_vit()


def sample_images_folder() -> Path:
    """The folder of 64 sample pictures, PNG, none of which was used in training."""
    return Path(__file__).resolve().parent / "samples"
