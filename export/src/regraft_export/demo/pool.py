"""The training pictures: drawn on all cores, kept in memory, served in seeded batches."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from regraft_export.demo import drawing
from regraft_export.demo.vit import IMAGE_SIZE


@dataclass(frozen=True)
class Pool:
    """Pictures as the model sees them, uint8 (N, 96, 96, 3), and targets, float32 (N, labels)."""

    pictures: Tensor
    targets: Tensor

    def batch(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float32 (B, 3, 96, 96) and targets of the chosen pictures."""
        pixels = self.pictures[choice].permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels, self.targets[choice]

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` pictures and targets, as `batch` returns them."""
        return self.batch(torch.arange(count, device=self.targets.device))

    def batches(self, steps: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Seeded random batches, each in one of the square's eight symmetries."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            choice = torch.randint(len(self.targets), (size,), generator=generator)
            which = int(torch.randint(8, (), generator=generator))
            pixels, targets = self.batch(choice.to(self.targets.device))
            yield _symmetry(pixels, which), targets


def _symmetry(pixels: Tensor, which: int) -> Tensor:
    """No label depends on orientation, so each picture counts eight times."""
    pixels = pixels.flip(3) if which & 1 else pixels
    pixels = pixels.flip(2) if which & 2 else pixels
    return pixels.transpose(2, 3) if which & 4 else pixels


def model_view(picture: drawing.UInt8) -> drawing.UInt8:
    """Shortest side resized to 96 and the centre cropped, as the data config says."""
    height, width = picture.shape[:2]
    if height == width == IMAGE_SIZE:
        return picture
    scale = IMAGE_SIZE / min(height, width)
    size = (max(IMAGE_SIZE, int(width * scale)), max(IMAGE_SIZE, int(height * scale)))
    image = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - IMAGE_SIZE) / 2) for side in size)
    return np.asarray(image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE)))


def _draw_one(seed: int) -> tuple[drawing.UInt8, drawing.Float32]:
    # Half of the pictures pass through the resize that files of other sizes go through.
    size = IMAGE_SIZE if seed % 2 else drawing.sample_size(seed)
    picture, target = drawing.draw(seed, size)
    return model_view(picture), target


def draw_pool(seeds: range, device: torch.device) -> Pool:
    """Draws one picture per seed, on all cores."""
    pictures = np.empty((len(seeds), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    targets = np.empty((len(seeds), len(drawing.LABELS)), np.float32)
    with multiprocessing.get_context("spawn").Pool() as workers:
        for i, (picture, target) in enumerate(workers.imap(_draw_one, seeds, chunksize=256)):
            pictures[i], targets[i] = picture, target
    return Pool(torch.from_numpy(pictures).to(device), torch.from_numpy(targets).to(device))
