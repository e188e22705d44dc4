"""From a decoded RGB picture to ``pixel_values``, with numpy and Pillow alone.

The stored form says everything in plain numbers (to which size, by which rule, where the crop
lies, what the padding holds), so that neither timm nor transformers is needed to apply it. Resizing
is Pillow's own, as in timm's transforms and transformers' Pillow processors, and the values come
from a table of 256 entries per channel: the result is theirs bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regraft.cropping import CropOffset, cut, offset, window

ResizeRule = Literal["shortest-edge", "cover", "fit", "exact", "none"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

_FILTERS = {name: Image.Resampling[name.upper()] for name in get_args(Interpolation)}
MAX_EDGE = 16384
# A 1 x 10000 picture whose shortest edge becomes 256 is 655 million pixels, of which the crop
# needs a ten thousandth. Above this many pixels only the crop's window is resized, which rounds
# differently (Pillow may swap its two passes) and is therefore not done to save time.
_MAX_RESIZED_PIXELS = 1 << 26


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centred crop (or padding), normalisation.

    Attributes:
        image_size: (H, W) of ``pixel_values``.
        mean: per channel (R, G, B), in units after ``rescale``.
        std: per channel, in the same units.
        resize: how the picture comes to its size before the crop. ``shortest-edge``: the shorter
            edge becomes ``resize_size[0]`` and the longer follows, rounded down (torchvision,
            transformers). ``cover``: the smallest picture of the same aspect that covers
            ``resize_size``, rounded to nearest (timm, crop mode center with unequal sides).
            ``fit``: the largest one within ``resize_size``, rounded (timm, crop mode border).
            ``exact``: ``resize_size`` whatever the aspect. ``none``: as it is.
        resize_size: (H, W) the rule works with.
        interpolation: Pillow's filter, in lower case.
        crop_offset: which pixel an odd margin is given to. ``round``: timm's and torchvision's
            rule; ``floor``: transformers'.
        fill: (R, G, B) from 0 to 255, where the picture is smaller than the crop.
        rescale: factor on the grey levels before mean and std.
    """

    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: ResizeRule
    resize_size: tuple[int, int]
    interpolation: Interpolation = "bicubic"
    crop_offset: CropOffset = "round"
    fill: tuple[int, int, int] = (0, 0, 0)
    rescale: float = 1 / 255

    def __post_init__(self) -> None:
        for name in ("image_size", "resize_size"):
            _check_size(name, getattr(self, name))
        for name, kind in (
            ("resize", ResizeRule),
            ("interpolation", Interpolation),
            ("crop_offset", CropOffset),
        ):
            got = getattr(self, name)
            if got not in get_args(kind):
                raise ValueError(f"{name} is {got!r}; expected one of {', '.join(get_args(kind))}")
        for name in ("mean", "std"):
            _check_numbers(name, getattr(self, name))
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std!r}; expected numbers above 0")
        if not _is_tuple((self.rescale,), 1, int, float) or not 0 < self.rescale < math.inf:
            raise ValueError(f"rescale is {self.rescale!r}; expected a finite number above 0")
        fill = self.fill
        if not _is_tuple(fill, 3, int) or not all(0 <= v <= 255 for v in fill):
            raise ValueError(f"fill is {fill!r}; expected three integers from 0 to 255")

    def __call__(
        self, image: Image.Image, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Turns one picture into the model's input.

        Args:
            image: any size; converted to RGB if it is not.
            out: float32 (3, H, W) to write into, e.g. a row of a batch.

        Returns:
            ``pixel_values`` of one image: float32 (3, H, W); ``out`` if it was given.
        """
        return self.normalise(np.asarray(self.view(image)), out)

    def normalise(
        self, pixels: NDArray[np.uint8], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """The second half of the preprocessing: what :meth:`view` gave, as the model's input.

        Args:
            pixels: uint8 (H, W, 3), RGB, of ``image_size``.
            out: as in :meth:`__call__`.
        """
        if out is None:
            out = np.empty((3, *self.image_size), np.float32)
        for channel in range(3):
            # "clip" spares numpy a buffered copy; an uint8 never leaves a table of 256.
            np.take(self._table[channel], pixels[:, :, channel], out=out[channel], mode="clip")
        return out

    def view(self, image: Image.Image) -> Image.Image:
        """The picture as the model sees it before normalisation: RGB, W x H pixels."""
        if image.mode != "RGB":
            image = image.convert("RGB")
        resized = self.resized_size((image.height, image.width))
        top, left = (
            offset(have, want, self.crop_offset)
            for have, want in zip(resized, self.image_size, strict=True)
        )
        resampling = _FILTERS[self.interpolation]
        if resized[0] * resized[1] > _MAX_RESIZED_PIXELS:
            image, top, left = window(image, resized, (top, left), self.image_size, resampling)
        elif resized != (image.height, image.width):
            image = image.resize((resized[1], resized[0]), resampling)
        return cut(image, (top, left), self.image_size, self.fill)

    def resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size (H, W) after resizing and before the crop, of a picture of ``size`` (H, W)."""
        height, width = size
        to_height, to_width = self.resize_size
        if self.resize == "none":
            return size
        if self.resize == "exact":
            return self.resize_size
        if self.resize == "shortest-edge":
            longer = int(to_height * max(size) / min(size))
            return (longer, to_height) if width <= height else (to_height, longer)
        pick = min if self.resize == "cover" else max
        ratio = pick(height / to_height, width / to_width)
        # Pillow refuses empty pictures, and "fit" rounds the short edge of a long strip to 0.
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def to_json(self) -> dict[str, Any]:
        """The preprocessing as plain JSON values."""
        return {
            "image_size": list(self.image_size),
            "resize": {
                "rule": self.resize,
                "size": list(self.resize_size),
                "interpolation": self.interpolation,
            },
            "crop": {"offset": self.crop_offset, "fill": list(self.fill)},
            "rescale": self.rescale,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Reads what :meth:`to_json` wrote.

        Raises:
            KeyError: a field is missing.
            ValueError: a field is malformed; the message names it.
        """
        data = _object("preprocessing", data)
        resize, crop = _object("resize", data["resize"]), _object("crop", data["crop"])
        return cls(
            image_size=_tuple("image_size", data["image_size"]),
            mean=_tuple("mean", data["mean"]),
            std=_tuple("std", data["std"]),
            resize=resize["rule"],
            resize_size=_tuple("resize.size", resize["size"]),
            interpolation=resize["interpolation"],
            crop_offset=crop["offset"],
            fill=_tuple("crop.fill", crop["fill"]),
            rescale=data["rescale"],
        )

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        """What each grey level of each channel becomes: float32 (3, 256).

        Rounded at the same places as torch and transformers do, so that the values are equal.
        """
        levels = (np.arange(256) * self.rescale).astype(np.float32)
        mean, std = (np.array(v, np.float32)[:, None] for v in (self.mean, self.std))
        table: NDArray[np.float32] = (levels - mean) / std
        return table


def _is_tuple(value: object, count: int, *kinds: type) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == count
        and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)
    )


def _check_size(name: str, size: tuple[int, int]) -> None:
    if not _is_tuple(size, 2, int) or not all(1 <= v <= MAX_EDGE for v in size):
        raise ValueError(f"{name} is {size!r}; expected (H, W), integers from 1 to {MAX_EDGE}")


def _check_numbers(name: str, values: tuple[float, ...]) -> None:
    if not _is_tuple(values, 3, int, float) or not all(map(math.isfinite, values)):
        raise ValueError(f"{name} is {values!r}; expected three finite numbers, one per channel")


def _object(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}; expected an object")
    return value


def _tuple(name: str, value: object) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {value!r}; expected a list")
    return tuple(value)
