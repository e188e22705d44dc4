"""Features from preprocessed images: runs of the engine, checked, and what is cut out of them."""

from __future__ import annotations

from collections import deque
from collections.abc import (
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from regraft.bundle import Bundle
from regraft.engines import Engine
from regraft.errors import BundleError, EngineError, InputError
from regraft.features import Features, Floats, available_fields, choose_outputs
from regraft.pipeline import Batch

BATCH_SIZE = 8


class PixelExtractor:
    """Turns preprocessed images into features: :class:`regraft.Extractor` without preprocessing.

    Closing it frees the engine. Its attributes are those that are named there.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        *,
        batch_size: int | None = None,
        outputs: Iterable[str] | None = None,
    ) -> None:
        """Joins a bundle and an opened engine, which it then owns.

        Args:
            bundle: opened.
            engine: opened on the bundle's ``model``.
            batch_size: images per run; None for 8.
            outputs: fields of :class:`Features` wanted; None for all that the bundle gives.

        Raises:
            BundleError: the engine's graph lacks outputs that the manifest names.
            InputError: an option is wrong.
        """
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1")
        layout = bundle.manifest.tokens
        if missing := set(bundle.manifest.outputs) - set(engine.outputs):
            raise BundleError(
                f"{bundle.path}: {engine.graph.name} lacks the outputs "
                f"{', '.join(sorted(missing))} that the manifest names; export again"
            )
        available = available_fields(bundle.manifest.outputs, layout)
        self.bundle = bundle
        self.engine = engine.name
        self.precision = engine.precision
        self.fields = available if outputs is None else tuple(dict.fromkeys(outputs))
        self.batch_size = batch_size or BATCH_SIZE
        self._names = choose_outputs(self.fields, bundle.manifest.outputs, layout)
        self._engine = engine

    def stream_batches(
        self,
        batches: Generator[Batch, None, None],
        names: MutableMapping[int, str],
        *,
        ahead: bool = False,
    ) -> Iterator[Features]:
        """The features of batches that were prepared elsewhere, in order.

        Args:
            batches: preprocessed images; closed at the end, however it comes.
            names: how messages call the images, by index; entries that are done with are removed.
            ahead: see :meth:`regraft.Extractor.stream`.

        Raises:
            EngineError: the engine failed, or the features hold NaN or Inf.
        """
        overlap = ahead and self._engine.has_device
        waiting: deque[tuple[Callable[[], Features], int]] = deque()

        def oldest() -> Features:
            finish, last = waiting.popleft()
            features = finish()
            for index in [i for i in names if i <= last]:
                del names[index]
            return features

        failure: BaseException | None = None
        try:
            while True:
                try:
                    batch = next(batches, None)
                    if batch is None:
                        break
                    started = self._start(batch.pixels, batch.indices, names)
                except Exception as error:  # what came before is handed out first
                    failure = error
                    break
                waiting.append((started, batch.indices[-1]))
                if len(waiting) > overlap:
                    yield oldest()
            while waiting:
                yield oldest()
            if failure is not None:
                raise failure
        finally:
            batches.close()

    def run(self, pixels: NDArray[np.float32]) -> Features:
        """The features of one batch of preprocessed images, in one run of the engine.

        Args:
            pixels: float32 (B, 3, H, W).

        Raises:
            InputError: the array has another dtype or shape, or holds NaN or Inf.
            EngineError: the engine failed, or the features hold NaN or Inf.
        """
        return self._run_pixels(pixels, range(_count(pixels)))

    def close(self) -> None:
        """Frees the engine; further calls raise an EngineError."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stream_pixels(self, pixels: NDArray[np.float32]) -> Iterator[Features]:
        for start in range(0, _count(pixels), self.batch_size):
            part = pixels[start : start + self.batch_size]
            yield self._run_pixels(part, range(start, start + len(part)))

    def _run_pixels(self, pixels: NDArray[np.float32], indices: Sequence[int]) -> Features:
        # Other types are the engine's to refuse.
        if pixels.dtype == np.float32 and (bad := _not_finite(pixels)):
            which = ", ".join(_numbered(indices[i]) for i in bad)
            raise InputError(f"pixel_values: NaN or Inf in {which}; expected finite numbers")
        return self._run(pixels, indices, {})

    def _run(
        self, pixels: NDArray[np.float32], indices: Sequence[int], names: Mapping[int, str]
    ) -> Features:
        return self._start(pixels, indices, names)()

    def _start(
        self, pixels: NDArray[np.float32], indices: Sequence[int], names: Mapping[int, str]
    ) -> Callable[[], Features]:
        finish = self._engine.start(pixels, self._names)
        return lambda: self._features(finish(), indices, names)

    def _features(
        self, outputs: Mapping[str, Floats], indices: Sequence[int], names: Mapping[int, str]
    ) -> Features:
        for name, array in outputs.items():
            if bad := _not_finite(array):
                which = [names.get(indices[i], _numbered(indices[i])) for i in bad]
                raise EngineError(
                    f"{self.engine}: {name} holds NaN or Inf for {', '.join(which)}; in fp16 that "
                    "is an overflow (export with --precision fp32), else the weights are broken"
                )
        return Features.from_outputs(outputs, self.bundle.manifest.tokens, indices, self.fields)


def _count(pixels: Any) -> int:
    if isinstance(pixels, np.ndarray) and pixels.ndim:
        return len(pixels)
    got = "a scalar" if isinstance(pixels, np.ndarray) else type(pixels).__name__
    raise InputError(f"pixel_values: got {got}; expected float32 of shape (B, 3, H, W)")


def _numbered(index: int) -> str:
    return f"image {index}, counted from 0"


def _not_finite(array: Floats) -> list[int]:
    """The rows that hold NaN or Inf."""
    finite = np.isfinite(array)
    return [] if finite.all() else np.flatnonzero(~finite.reshape(len(array), -1).all(1)).tolist()
