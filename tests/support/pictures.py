"""Textured pictures drawn with Pillow: flat and rough areas, edges, shapes; no two alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from regraft.preprocessing import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def draw(seed: int, width: int = 72, height: int = 60) -> Image.Image:
    """One picture: a gradient, a rough half, stripes, coloured shapes."""
    rng = np.random.default_rng(seed)

    def colour() -> tuple[int, ...]:
        return tuple(int(v) for v in rng.integers(0, 256, 3))

    low, high = np.array(colour()), np.array(colour())
    ramp = np.linspace(0, 1, width)[None, :, None]
    canvas = np.broadcast_to(low + (high - low) * ramp, (height, width, 3))
    image = Image.fromarray(canvas.astype(np.uint8))
    grain = rng.integers(0, 256, (height // 2, width, 3), np.uint8)
    rough = Image.fromarray(grain).filter(ImageFilter.GaussianBlur(1))
    image.paste(rough, (0, int(rng.integers(0, height // 2))))
    pen = ImageDraw.Draw(image)
    for x in range(0, width // 2, int(rng.integers(4, 9))):
        pen.line((x, 0, x + width // 4, height), fill=colour(), width=2)
    for _ in range(4):
        x, y = int(rng.integers(0, width - 16)), int(rng.integers(0, height - 16))
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        size = int(rng.integers(8, 16))
        shape((x, y, x + size, y + size), fill=colour())
    return image


def preprocessing(size: tuple[int, int]) -> Preprocessing:
    """What turns such pictures into pixels of a size (H, W)."""
    return Preprocessing(
        image_size=size,
        mean=MEAN,
        std=STD,
        resize="cover",
        resize_size=size,
        interpolation="bicubic",
    )


def pixels(count: int, size: tuple[int, int], first: int = 0) -> NDArray[np.float32]:
    """Different pictures, preprocessed: (count, 3, H, W)."""
    prepare = preprocessing(size)
    return np.stack([prepare(draw(first + i)) for i in range(count)])


def write(folder: Path, count: int, first: int = 0) -> Path:
    """Writes pictures as PNG; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        draw(first + i).save(folder / f"picture-{i:03}.png")
    return folder


def warned(images: int) -> str:
    """What `regraft find` says on stderr where it could use so few images, and nothing else."""
    return (
        f"regraft: warning: found on {images} images; expected 100 or more like those the model "
        "will see: with so few, units and figures may be chance\n"
    )
