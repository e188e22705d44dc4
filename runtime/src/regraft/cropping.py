"""The centred crop of a picture, padded where the picture is smaller.

Places and sizes are (top, left) and (H, W) in pixels.
"""

from __future__ import annotations

from typing import Literal

from PIL import Image

CropOffset = Literal["round", "floor"]


def offset(have: int, want: int, rule: CropOffset) -> int:
    """First row (or column) of the crop; negative where the picture is padded.

    Args:
        have: rows (or columns) of the picture.
        want: of the crop.
        rule: which pixel an odd margin is given to, see
            :class:`~regraft.preprocessing.Preprocessing`.
    """
    if rule == "floor":
        return (have - want) // 2
    # Python's rounding to even is part of the rule; padding puts the odd pixel at the end.
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


def cut(
    image: Image.Image, start: tuple[int, int], size: tuple[int, int], fill: tuple[int, int, int]
) -> Image.Image:
    """Cuts the crop out of an RGB picture; what lies outside of the picture is ``fill``."""
    (top, left), (height, width) = start, size
    box = (left, top, left + width, top + height)
    if box == (0, 0, image.width, image.height):
        return image
    inside = (max(left, 0), max(top, 0), min(box[2], image.width), min(box[3], image.height))
    if inside == box:
        return image.crop(box)
    canvas = Image.new("RGB", (width, height), fill)
    canvas.paste(image.crop(inside), (max(-left, 0), max(-top, 0)))
    return canvas


def window(
    image: Image.Image,
    resized: tuple[int, int],
    start: tuple[int, int],
    size: tuple[int, int],
    resampling: Image.Resampling,
) -> tuple[Image.Image, int, int]:
    """Resizes only what the crop will take of an extremely long picture.

    Args:
        image: the picture.
        resized: the size that it would have, resized whole.
        start: of the crop, in the resized picture.
        size: of the crop.
        resampling: Pillow's filter.

    Returns:
        The resized window and where in it the crop begins (top, left).
    """
    (y0, y1), (x0, x1) = (
        (max(first, 0), min(first + want, have))
        for have, want, first in zip(resized, size, start, strict=True)
    )
    down, across = image.height / resized[0], image.width / resized[1]
    part = image.resize(
        (x1 - x0, y1 - y0),
        resampling,
        box=(
            x0 * across,
            y0 * down,
            min(x1 * across, image.width),
            min(y1 * down, image.height),
        ),
    )
    return part, min(start[0], 0), min(start[1], 0)
