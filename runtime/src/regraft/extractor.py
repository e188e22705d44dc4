"""Features from images: preprocessing in worker threads, ahead of the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from regraft import pipeline
from regraft.bundle import Bundle
from regraft.engines import AUTO, Engine, EngineOptions, open_graph
from regraft.errors import ImageError, InputError
from regraft.features import Features
from regraft.images import ImageSource, name_of
from regraft.pipeline import Batch, Failure
from regraft.pixel_extractor import PixelExtractor
from regraft.wording import unread


class Extractor(PixelExtractor):
    """Turns images into features. A context manager; closing it frees the engine.

    ::

        with Extractor.open("bundle") as extractor:
            features = extractor.extract(["cat.jpg", "dog.jpg"])

    Threads may share one extractor: decoding and preprocessing run side by side, runs of the engine
    one after the other (a lock per engine), and each call gets its own results.

    Attributes:
        bundle: what it serves.
        engine: name of the engine in use, which with ``auto`` was chosen at opening.
        precision: fp32, fp16 or bf16: of the engine's arithmetic.
        fields: the fields of :class:`Features` that it fills.
        batch_size: images per run of the engine.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        *,
        batch_size: int | None = None,
        workers: int | None = None,
        draft: bool = False,
        outputs: Iterable[str] | None = None,
    ) -> None:
        """Joins a bundle and an opened engine, which it then owns; see :meth:`open`."""
        super().__init__(bundle, engine, batch_size=batch_size, outputs=outputs)
        self._workers = workers
        self._draft = draft

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        engine: str | Engine = AUTO,
        *,
        threads: int | None = None,
        precision: str | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        draft: bool = False,
        outputs: Iterable[str] | None = None,
    ) -> Self:
        """Opens a bundle with an engine.

        Args:
            bundle: the folder that ``regraft export`` wrote, or one opened before.
            engine: a name (``auto``, ``ort-cpu``, ``openvino``), or an engine opened on the
                bundle's ``model``.
            threads: threads inside one run of the engine; None for the cores that may be used.
            precision: of the arithmetic, for engines that have a choice; None for the bundle's.
            batch_size: images per run; None for 8.
            workers: threads that decode and preprocess; None for a sensible number.
            draft: decode large JPEG files at a reduced size: faster, but it changes pixels.
            outputs: fields of :class:`Features` wanted; None for all that the bundle gives.

        Raises:
            BundleError: the bundle is damaged, or of a newer schema.
            EngineError: the engine is not installed, not built here or cannot run this bundle.
            InputError: an option is wrong.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        if isinstance(engine, str):
            options = EngineOptions(threads=threads, precision=precision)
            engine = open_graph(bundle, "model", engine, options)
        try:
            return cls(
                bundle,
                engine,
                batch_size=batch_size,
                workers=workers,
                draft=draft,
                outputs=outputs,
            )
        except BaseException:
            engine.close()
            raise

    def extract(self, images: Any) -> Features:
        """The features of some images, all at once in memory.

        Args:
            images: a list of paths, PIL images or uint8 arrays of shape (H, W, 3), mixed at will;
                one of these alone; or preprocessed images, a float32 array of shape (B, 3, H, W).

        Returns:
            Features of B rows, in the order of ``images``.

        Raises:
            ImageError: images cannot be read; the message says how many, and names the first ones.
            InputError: there are no images, or an array has another dtype or shape, or
                preprocessed images hold NaN or Inf.
            EngineError: the engine failed, or the features hold NaN or Inf.
        """
        if isinstance(images, np.ndarray) and images.dtype != np.uint8:
            parts = list(self._stream_pixels(images))
        else:
            parts = self._all_of(images)
        if not parts:
            raise InputError("there are no images; expected at least one")
        return Features.concatenate(parts)

    def stream(
        self,
        images: Iterable[ImageSource],
        on_error: Callable[[Failure], None] | None = None,
        *,
        ahead: bool = False,
    ) -> Iterator[Features]:
        """The features of any number of images, batch by batch, in order.

        At most two batches of images are in memory besides the one the engine runs: worker
        threads decode ahead of it.

        Args:
            images: paths, bytes of files, PIL images or uint8 arrays of shape (H, W, 3), or one of
                these alone; consumed as needed, so it may be endless. An array may be filled anew
                for the next image.
            on_error: called for each image that cannot be read, which is then left out (the
                batch's ``indices`` say which are there). Without it the first one raises.
            ahead: start the next batch before one is handed out, on engines that copy and compute
                at the same time: faster for many images at hand, one batch later for a source that
                one waits for, such as a camera.

        Raises:
            ImageError: an image cannot be read, and there is no ``on_error``.
            EngineError: the engine failed, or the features hold NaN or Inf.
        """
        names: dict[int, str] = {}
        batches = self._prepared(_as_items(images), names, on_error)
        return self.stream_batches(batches, names, ahead=ahead)

    def _all_of(self, images: Any) -> list[Features]:
        """The features of every image, or an error that names those that cannot be read."""
        failed: list[str] = []
        names: dict[int, str] = {}
        seen = 0

        def count(items: Iterable[ImageSource]) -> Iterator[ImageSource]:
            nonlocal seen
            for item in items:
                seen += 1
                yield item

        prepared = self._prepared(
            count(_as_items(images)), names, lambda failure: failed.append(failure.message)
        )
        parts = list(self.stream_batches(_until(failed, prepared), names))
        if failed:
            raise ImageError(unread(failed, seen))
        return parts

    def _prepared(
        self,
        items: Iterable[ImageSource],
        names: dict[int, str],
        on_error: Callable[[Failure], None] | None,
    ) -> Generator[Batch, None, None]:
        return pipeline.batches(
            _remember_names(items, names),
            self.bundle.manifest.preprocessing,
            self.batch_size,
            self._workers,
            on_error=on_error,
            draft=self._draft,
        )


def _as_items(images: Any) -> Iterable[ImageSource]:
    """A lone image becomes a list of one."""
    lone = isinstance(images, str | os.PathLike | bytes | Image.Image)
    if lone or (isinstance(images, np.ndarray) and images.ndim == 3):
        return [images]
    if not isinstance(images, Iterable):
        raise InputError(
            f"images: got {type(images).__name__}; expected paths, PIL images, uint8 arrays "
            "(H, W, 3), or one float32 array (B, 3, H, W)"
        )
    return images


def _until(
    failed: Sequence[str], batches: Generator[Batch, None, None]
) -> Generator[Batch, None, None]:
    """The batches before the first failure; later ones are decoded, to know all that fail."""
    with closing(batches):
        for batch in batches:
            if not failed:
                yield batch


def _remember_names(images: Iterable[ImageSource], names: dict[int, str]) -> Iterator[ImageSource]:
    for index, image in enumerate(images):
        names[index] = name_of(image)
        yield image
