"""A torch.hub folder laid out as facebookresearch/dinov2: entries, and classes of its structure.

Written anew for the tests; module and parameter names, token order and arithmetic are those of the
published models, so that their state dicts would load.
"""

from vision_transformer import DinoVisionTransformer

dependencies = ["torch"]

_SIZES = {  # width, depth, heads
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "g": (1536, 40, 24),
}


def _published(size, registers, pretrained, **options):
    if pretrained:
        raise RuntimeError("no weights are published with this folder; call with pretrained=False")
    width, depth, heads = _SIZES[size]
    settings = {"width": width, "depth": depth, "heads": heads, "swiglu": size == "g"}
    return DinoVisionTransformer(**{**settings, "registers": registers, **options})


def dinov2_vits14(*, pretrained=True, **options):
    return _published("s", 0, pretrained, **options)


def dinov2_vitb14(*, pretrained=True, **options):
    return _published("b", 0, pretrained, **options)


def dinov2_vitl14(*, pretrained=True, **options):
    return _published("l", 0, pretrained, **options)


def dinov2_vitg14(*, pretrained=True, **options):
    return _published("g", 0, pretrained, **options)


def dinov2_vits14_reg(*, pretrained=True, **options):
    return _published("s", 4, pretrained, **options)


def dinov2_vitb14_reg(*, pretrained=True, **options):
    return _published("b", 4, pretrained, **options)


def dinov2_vitl14_reg(*, pretrained=True, **options):
    return _published("l", 4, pretrained, **options)


def dinov2_vitg14_reg(*, pretrained=True, **options):
    return _published("g", 4, pretrained, **options)


def tiny():
    """Small, for tests; takes no ``pretrained``."""
    return DinoVisionTransformer(width=48, depth=3, heads=3, image_size=112)


def tiny_g_reg(*, pretrained=True):
    """Small, with SwiGLU and trained registers."""
    return _published(
        "g", 4, pretrained, width=48, depth=3, heads=3, image_size=112, antialias=True
    )


def dinov2_vitg14_of_depth_4(*, pretrained=True):
    """For tests: all 40 blocks want more memory than many machines have."""
    return _published("g", 0, pretrained, depth=4)


def dinov2_vitg14_reg_of_depth_4(*, pretrained=True):
    """Likewise, with trained registers."""
    return _published("g", 4, pretrained, depth=4)


def with_preprocessing():
    """An entry that brings its own preprocessing."""
    config = {"input_size": (3, 56, 56), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return tiny(), {**config, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}


def not_a_model():
    return [1, 2, 3]


def failing():
    raise ValueError("this entry is broken")
