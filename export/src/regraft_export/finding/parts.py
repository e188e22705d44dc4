"""The images that finding works on, and their split into three parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from regraft.errors import InputError
from regraft.pipeline import Failure, batches
from regraft.preprocessing import Preprocessing
from regraft.wording import counted
from regraft_export.finding.subject import Floats

MIN_IMAGES = 6
MAX_PART = 32
CACHE_BYTES = 512 << 20


class Images(Protocol):
    """Preprocessed images by position, in batches; may be asked for the same ones again."""

    def __len__(self) -> int:
        """How many there are."""

    def batches(self, positions: Sequence[int]) -> Iterator[Floats]:
        """Those at ``positions``, as float32 (B, 3, H, W); bad ones are left out."""


@dataclass(frozen=True)
class ArrayImages:
    """Images that are in memory: float32 (N, 3, H, W), preprocessed."""

    pixels: Floats
    batch_size: int = 16

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, positions: Sequence[int]) -> Iterator[Floats]:
        """Those at ``positions``."""
        for start in range(0, len(positions), self.batch_size):
            yield self.pixels[list(positions[start : start + self.batch_size])]


class FileImages:
    """Image files, decoded and preprocessed in worker threads.

    The last images that were asked for are kept if they take at most :data:`CACHE_BYTES`, so that
    the two passes over the score part decode a few hundred images once.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocessing: Preprocessing,
        *,
        batch_size: int = 16,
        workers: int | None = None,
        on_failure: Callable[[Failure], None] = lambda failure: None,
    ) -> None:
        """Reads nothing yet.

        Args:
            paths: in a fixed order, on which the split depends.
            preprocessing: from picture to pixels.
            batch_size: images per batch.
            workers: threads; None for one per core.
            on_failure: told once of each file that cannot be decoded; it is then left out.
        """
        self._paths, self._preprocessing = list(paths), preprocessing
        self._batch_size, self._workers, self._on_failure = batch_size, workers, on_failure
        self._failed: set[int] = set()
        self._kept: tuple[tuple[int, ...], list[Floats]] = ((), [])

    def __len__(self) -> int:
        return len(self._paths)

    def batches(self, positions: Sequence[int]) -> Iterator[Floats]:
        """Those at ``positions`` that can be decoded."""
        wanted = tuple(positions)
        if wanted == self._kept[0]:
            yield from self._kept[1]
            return
        self._kept = ((), [])
        height, width = self._preprocessing.image_size
        keep = len(wanted) * 3 * height * width * 4 <= CACHE_BYTES
        seen: list[Floats] = []
        for pixels in self._read(wanted):
            if keep:
                seen.append(pixels)
            yield pixels
        if keep:
            self._kept = (wanted, seen)

    def _read(self, wanted: Sequence[int]) -> Iterator[Floats]:
        positions = [i for i in wanted if i not in self._failed]

        def failed(failure: Failure) -> None:
            position = positions[failure.index]
            self._failed.add(position)
            self._on_failure(replace(failure, index=position))

        paths = (self._paths[i] for i in positions)
        for batch in batches(
            paths, self._preprocessing, self._batch_size, self._workers, on_error=failed
        ):
            yield batch.pixels


@dataclass(frozen=True)
class Parts:
    """Positions of the images of each part, ascending; a partition of all images."""

    score: tuple[int, ...]
    select: tuple[int, ...]
    report: tuple[int, ...]


def split(count: int, seed: int) -> Parts:
    """Splits ``count`` images by ``seed``.

    A quarter each goes to select and report, at most 32; the rest to scoring.

    Raises:
        InputError: there are fewer than six.
    """
    if count < MIN_IMAGES:
        raise InputError(
            f"{counted(count, 'image')} came; finding needs at least {MIN_IMAGES}, "
            "for its three parts (score, select, report), and is meant for 100 or more"
        )
    order = np.random.default_rng(seed).permutation(count).tolist()
    size = min(MAX_PART, count // 4)
    return Parts(
        score=tuple(sorted(order[2 * size :])),
        select=tuple(sorted(order[:size])),
        report=tuple(sorted(order[size : 2 * size])),
    )


def gathered(images: Images, positions: Sequence[int], part: str) -> Floats:
    """All images of a small part at once: (N, 3, H, W).

    Raises:
        InputError: none of them could be read.
    """
    batches = list(images.batches(positions))
    if not batches:
        raise InputError(
            f"no image of the {part} part ({counted(len(positions), 'image')}) could be read; "
            "expected at least one: give more images"
        )
    return np.concatenate(batches)
