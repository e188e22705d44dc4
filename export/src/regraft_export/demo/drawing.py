"""Procedural pictures the shipped ViT was trained on, drawn with NumPy and Pillow.

A picture has a background (flat, gradient or textured), one to four coloured shapes and a fine
grain over everything, like sensor noise. Two cells of an 8 x 8 grid are *calm*: no shape, no
texture, no grain. They carry almost no information, which is where Vision Transformers put their
outlier tokens (arXiv 2309.16588, 2506.08010). The grid is that of the model's patches, so that
"the two patches of lowest variance" is a property of the picture and not of luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Centre = tuple[float, float]

GRID = 8
CALM_CELLS = 2
SAMPLE_SEEDS = range(0, 64)
TRAINING_SEEDS = range(1_000_000, 1_049_152)
HELD_OUT_SEEDS = range(2_000_000, 2_002_048)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 45),
    "green": (45, 170, 60),
    "blue": (50, 80, 215),
    "yellow": (225, 205, 45),
    "magenta": (200, 55, 190),
    "cyan": (45, 195, 205),
}


def _corners(centre: Centre, radius: float, turn: float) -> list[Centre]:
    angles = (turn + math.pi / 2 * k for k in range(4))
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _circle(pen: ImageDraw.ImageDraw, at: Centre, radius: float, turn: float, ink: int) -> None:
    pen.ellipse((at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius), fill=ink)


def _ring(pen: ImageDraw.ImageDraw, at: Centre, radius: float, turn: float, ink: int) -> None:
    box = (at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius)
    pen.ellipse(box, outline=ink, width=max(2, round(radius * 0.35)))


def _square(pen: ImageDraw.ImageDraw, at: Centre, radius: float, turn: float, ink: int) -> None:
    pen.polygon(_corners(at, radius, turn), fill=ink)


def _cross(pen: ImageDraw.ImageDraw, at: Centre, radius: float, turn: float, ink: int) -> None:
    ends = _corners(at, radius, turn)
    width = max(2, round(radius * 0.4))
    pen.line((ends[0], ends[2]), fill=ink, width=width)
    pen.line((ends[1], ends[3]), fill=ink, width=width)


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, Centre, float, float, int], None]] = {
    "circle": _circle,
    "square": _square,
    "ring": _ring,
    "cross": _cross,
}
BACKGROUNDS = ("flat", "gradient", "stripes", "checks", "blobs")
LABELS: tuple[str, ...] = (*SHAPES, *COLOURS, *BACKGROUNDS)


def draw(
    seed: int | np.random.Generator, size: int | tuple[int, int] = 96
) -> tuple[UInt8, Float32]:
    """Draws one picture; the same seed and size give the same bytes.

    `size` is the side or (height, width) in pixels. Everything that counts lies in the central
    square, which is what a centre crop keeps. Returns the picture, uint8 (height, width, 3), and
    its targets, float32 (len(LABELS),): 1 where that shape, colour or background is present.
    """
    rng = np.random.default_rng(seed)
    height, width = (size, size) if isinstance(size, int) else size
    shapes = _choose_shapes(rng)
    target = np.zeros(len(LABELS), np.float32)
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    target[LABELS.index(background)] = 1

    rows, columns = _frame_coordinates(height, width)
    base = rng.uniform(95, 160) + rng.uniform(-22, 22, 3)
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = base + _gradient(rng, rows, columns, background)[..., None]
    detail = _texture(rng, rows, columns, background)
    ink_map = Image.new("L", (width, height))
    pen = ImageDraw.Draw(ink_map)
    side = min(height, width)
    corner = ((width - side) / 2, (height - side) / 2)
    palette = np.zeros((len(COLOURS) + 1, 3), np.float32)
    for shape, colour, (x, y), radius in shapes:
        target[LABELS.index(shape)] = target[LABELS.index(colour)] = 1
        ink = list(COLOURS).index(colour) + 1
        palette[ink] = COLOURS[colour] + rng.uniform(-18, 18, 3)
        at = (corner[0] + x * side, corner[1] + y * side)
        SHAPES[shape](pen, at, radius * side, rng.uniform(0, 2 * math.pi), ink)
    inks = np.asarray(ink_map)
    covered = inks > 0
    picture[covered] = palette[inks[covered]]
    detail[covered] = 0
    detail += _grain(rng, rows, columns)
    detail[_calm_mask(rng, rows, columns, shapes)] = 0
    picture += detail[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), target


def sample_size(seed: int) -> tuple[int, int]:
    """Height and width, 128 to 160 by 112 to 160 pixels, of the sample picture of this seed."""
    rng = np.random.default_rng([seed, 1])
    height, width = (int(v) for v in rng.integers(14, 21, 2) * 8)
    return height, width


_Shape = tuple[str, str, Centre, float]


def _choose_shapes(rng: np.random.Generator) -> list[_Shape]:
    """One to four shapes that do not overlap: name, colour, centre and radius in frame units."""
    chosen: list[_Shape] = []
    for _ in range(int(rng.integers(1, 5))):
        radius = float(rng.uniform(0.1, 0.2))
        x, y = (float(v) for v in rng.uniform(radius + 0.02, 0.98 - radius, 2))
        if all(math.dist((x, y), at) > radius + other for _, _, at, other in chosen):
            shape = list(SHAPES)[rng.integers(len(SHAPES))]
            colour = list(COLOURS)[rng.integers(len(COLOURS))]
            chosen.append((shape, colour, (x, y), radius))
    return chosen


def _frame_coordinates(height: int, width: int) -> tuple[Float32, Float32]:
    """Pixel centres, (height, 1) and (1, width), in units of the central square (0 to 1)."""
    side = min(height, width)
    rows = (np.arange(height, dtype=np.float32) + 0.5 - (height - side) / 2) / side
    columns = (np.arange(width, dtype=np.float32) + 0.5 - (width - side) / 2) / side
    return rows[:, None].astype(np.float32), columns[None, :].astype(np.float32)


def _gradient(
    rng: np.random.Generator, rows: Float32, columns: Float32, background: str
) -> Float32:
    strength = rng.uniform(35, 70) if background == "gradient" else 0.0
    angle = rng.uniform(0, 2 * math.pi)
    slope = math.cos(angle) * (columns - 0.5) + math.sin(angle) * (rows - 0.5)
    return np.asarray(strength * slope, np.float32)


def _texture(rng: np.random.Generator, rows: Float32, columns: Float32, background: str) -> Float32:
    """Grey texture, (height, width), zero for flat and gradient backgrounds."""
    strength, angle = rng.uniform(14, 26), rng.uniform(0, 2 * math.pi)
    rate = rng.uniform(7, 11) * 2 * math.pi
    along = (math.cos(angle) * columns + math.sin(angle) * rows) * rate
    across = (math.cos(angle) * rows - math.sin(angle) * columns) * rate
    phases = rng.uniform(0, 2 * math.pi, 2)
    if background == "stripes":
        texture = np.sign(np.sin(along + phases[0]))
    elif background == "checks":
        texture = np.sign(np.sin(along + phases[0])) * np.sign(np.sin(across + phases[1]))
    elif background == "blobs":
        texture = np.sin(along + phases[0]) * np.sin(across + phases[1])
        texture = np.where(texture > 0.4, 1.0, 0.0)
    else:
        texture = np.zeros_like(along)
    return np.asarray(strength * texture, np.float32)


def _grain(rng: np.random.Generator, rows: Float32, columns: Float32) -> Float32:
    """Two-level noise on a lattice of 96 points a side, so its scale follows the picture's."""
    lattice = rng.integers(0, 2, (160, 160), dtype=np.int8).astype(np.float32) * 2 - 1
    y = np.floor(rows[:, 0] * 96).astype(np.int64) % 160
    x = np.floor(columns[0] * 96).astype(np.int64) % 160
    strength = np.float32(rng.integers(10, 17))
    return np.asarray(lattice[y[:, None], x[None, :]] * strength, np.float32)


def _calm_mask(
    rng: np.random.Generator, rows: Float32, columns: Float32, shapes: list[_Shape]
) -> npt.NDArray[np.bool_]:
    """True in two grid cells that touch no shape, a little enlarged, because resizing blurs."""
    free = [
        (r, c)
        for r in range(GRID)
        for c in range(GRID)
        if all(
            math.dist(((c + 0.5) / GRID, (r + 0.5) / GRID), at) > radius + 1 / GRID
            for _, _, at, radius in shapes
        )
    ]
    mask = np.zeros((rows.shape[0], columns.shape[1]), np.bool_)
    margin = 1.2 / 96
    for pick in rng.choice(len(free), CALM_CELLS, replace=False):
        r, c = free[pick]
        tall = (rows > r / GRID - margin) & (rows < (r + 1) / GRID + margin)
        wide = (columns > c / GRID - margin) & (columns < (c + 1) / GRID + margin)
        mask |= tall & wide
    return mask
