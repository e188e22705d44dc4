"""The shipped ViT: its architecture, its data config and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from regraft_export.demo.drawing import LABELS

IMAGE_SIZE = 96
PATCH_SIZE = 12
WEIGHTS_FILE = "shipped_vit.safetensors"
DATA_CONFIG: dict[str, Any] = {
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def build_vit() -> nn.Module:
    """The architecture with random weights: class token, learned positions, GELU MLPs, logits."""
    model: nn.Module = VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=128,
        depth=8,
        num_heads=4,
        num_classes=len(LABELS),
    )
    return model


def load_vit(weights: Path) -> nn.Module:
    """The ViT with the weights of a safetensors file, stored as fp16, as float32 in eval mode."""
    model = build_vit()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return model.eval()


def load_shipped_vit() -> tuple[nn.Module, dict[str, Any]]:
    """The ViT with the weights that ship with the package, and a copy of its data config."""
    return load_vit(Path(__file__).resolve().parent / WEIGHTS_FILE), dict(DATA_CONFIG)
