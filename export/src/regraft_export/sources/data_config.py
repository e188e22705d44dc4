"""Preprocessing in timm's words, and the options that override it.

timm describes preprocessing by six names: ``input_size`` (3, H, W), ``mean``, ``std``,
``interpolation``, ``crop_pct`` (the share of the resized picture that the crop keeps) and
``crop_mode`` (``center``, ``squash``, ``border``). :class:`~regraft.preprocessing.Preprocessing`
holds what these come down to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from regraft.errors import ModelError
from regraft.preprocessing import Preprocessing

NAMES = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
CROP_MODES = ("center", "squash", "border")
# Every override and the name that timm has for it.
_OPTIONS = {"image_size": "input_size", **{name: name for name in NAMES[1:]}}


@dataclass(frozen=True)
class PreprocessingOverrides:
    """What the user sets by hand; None leaves the model's own.

    Attributes:
        image_size: (H, W), ``--image-size``.
        mean: per channel, for values from 0 to 1, ``--mean``.
        std: per channel, ``--std``.
        interpolation: Pillow's filter in lower case, ``--interpolation``.
        crop_pct: above 0, at most 1, ``--crop-pct``.
        crop_mode: ``center``, ``squash`` or ``border``, ``--crop-mode``.
    """

    image_size: tuple[int, int] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None

    def given(self) -> dict[str, Any]:
        """The overrides that were set, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def over(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """timm's names with the overrides applied."""
        given = self.given()
        if "image_size" in given:
            given["input_size"] = (3, *given.pop("image_size"))
        return {**config, **given}


def from_data_config(config: Mapping[str, Any], subject: str, cure: str = "") -> Preprocessing:
    """The preprocessing of timm's evaluation transforms.

    Args:
        config: all of :data:`NAMES`; others are refused.
        subject: what the config belongs to, for messages.
        cure: what else completes the config than the options, for the message that asks for them.

    Raises:
        ModelError: a name is missing, unknown or has a malformed value; the message says which.
    """
    missing = [name for name in NAMES if config.get(name) is None]
    if missing:
        options = {name: "--" + option.replace("_", "-") for option, name in _OPTIONS.items()}
        raise ModelError(
            f"{subject}: the preprocessing lacks {', '.join(missing)}; give "
            f"{' '.join(options[name] for name in missing)}{cure and f', or {cure}'}"
        )
    unknown = sorted(set(config) - set(NAMES))
    if unknown:
        raise ModelError(
            f"{subject}: the preprocessing has unknown names {', '.join(unknown)}; "
            f"expected {', '.join(NAMES)}"
        )
    size = tuple(config["input_size"])
    if len(size) != 3 or size[0] != 3:
        raise ModelError(f"{subject}: input_size is {size!r}; expected (3, H, W)")
    try:
        resize_size = _before_crop(size[1:], config["crop_pct"])
        mean = tuple(config["mean"])
        return Preprocessing(
            image_size=size[1:],
            mean=mean,
            std=tuple(config["std"]),
            resize_size=resize_size,
            interpolation=config["interpolation"],
            **_geometry(config["crop_mode"], resize_size, mean),
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"{subject}: preprocessing: {error}") from error


def override(
    preprocessing: Preprocessing, overrides: PreprocessingOverrides, subject: str
) -> Preprocessing:
    """Applies overrides to preprocessing that did not come from timm.

    Mean, std and interpolation replace what was there. Without ``crop_pct``, another image size
    scales the size before the crop by the same factor, so that the crop keeps the same share of
    the picture. ``crop_mode`` sets the resize rule and the crop's rounding as timm does.

    Raises:
        ModelError: a value is malformed.
    """
    given = overrides.given()
    crop_pct, crop_mode = given.pop("crop_pct", None), given.pop("crop_mode", None)
    image_size = given.get("image_size", preprocessing.image_size)
    mean = given.get("mean", preprocessing.mean)
    try:
        if crop_pct is not None:
            given["resize_size"] = _before_crop(image_size, crop_pct)
        elif image_size != preprocessing.image_size:
            given["resize_size"] = tuple(
                round(resize * new / old)
                for resize, new, old in zip(
                    preprocessing.resize_size, image_size, preprocessing.image_size, strict=True
                )
            )
        resize_size = given.get("resize_size", preprocessing.resize_size)
        if crop_mode is not None:
            given.update(_geometry(crop_mode, resize_size, mean))
        elif preprocessing.resize == "shortest-edge" and resize_size[0] != resize_size[1]:
            given["resize"] = "cover"
        return replace(preprocessing, **given)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{subject}: preprocessing: {error}") from error


def check_patches(subject: str, image_size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Raises ModelError unless patches of size (h, w) fill the image."""
    if any(edge % step for edge, step in zip(image_size, patch, strict=True)):
        raise ModelError(
            f"{subject}: the image size {image_size} is no multiple of the patch size {patch}; "
            "give another --image-size"
        )


def _before_crop(image_size: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    if isinstance(crop_pct, bool) or not isinstance(crop_pct, int | float) or not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct!r}; expected a number above 0, at most 1")
    height, width = image_size
    return math.floor(height / crop_pct), math.floor(width / crop_pct)


def _geometry(
    crop_mode: str, resize_size: tuple[int, int], mean: tuple[float, ...]
) -> dict[str, Any]:
    """What a crop mode of timm's ``transforms_imagenet_eval`` comes down to."""
    if crop_mode == "center":
        # timm hands equal sides to torchvision, which rounds the longer edge down, and rounds
        # to nearest itself otherwise.
        rule = "shortest-edge" if resize_size[0] == resize_size[1] else "cover"
    elif crop_mode in CROP_MODES:
        rule = "exact" if crop_mode == "squash" else "fit"
    else:
        raise ValueError(f"crop_mode is {crop_mode!r}; expected one of {', '.join(CROP_MODES)}")
    fill = tuple(round(255 * v) for v in mean) if crop_mode == "border" else (0, 0, 0)
    return {"resize": rule, "crop_offset": "round", "fill": fill}
