"""One version of one bundle, opened and ready to answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from regraft.bundle import Bundle
from regraft.engines import Engine, EngineOptions, open_graph
from regraft.serve.batcher import Batcher
from regraft.serve.pixels import PixelReader
from regraft.serve.refusals import unavailable
from regraft.serve.settings import Settings
from regraft.serve.signature import SUFFIX, Signature
from regraft.serve.statistics import Statistics

Floats = NDArray[np.float32]
_log = logging.getLogger("regraft.serve")


class Model:
    """A bundle, its engine, and the queue in front of it.

    Attributes:
        name: of the model that takes pixels; with ``_images`` behind it, of the one for images.
        version: a number from 1, as text.
        bundle: what it serves.
        engine: executes the graph.
        signatures: public name -> what it takes and gives.
        statistics: public name -> what it did.
        reader: makes pixels of requests.
        preferred_batch: images in one run of several requests.
        batcher: where pixels wait for the engine.
    """

    def __init__(
        self,
        name: str,
        version: str,
        bundle: Bundle,
        engine: Engine,
        settings: Settings,
        pool: ThreadPoolExecutor,
    ) -> None:
        """Joins a bundle and an opened engine, which it then owns; needs a running event loop."""
        batching = settings.batching
        self.name = name
        self.version = version
        self.bundle = bundle
        self.engine = engine
        manifest, size = bundle.manifest, batching.max_batch
        self.signatures = {
            name: Signature.tensors(name, manifest, size),
            name + SUFFIX: Signature.images(name + SUFFIX, manifest, size),
        }
        self.statistics = {public: Statistics() for public in self.signatures}
        self.reader = PixelReader(manifest.preprocessing, pool, settings.limits.pixels)
        self.preferred_batch = min(size, batching.preferred_batch or engine.preferred_batch or size)
        self.batcher = Batcher(engine.run, self.preferred_batch, batching.max_delay)
        self._max_queue = batching.max_queue
        self._images = self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def open(
        cls, name: str, version: str, path: Path, settings: Settings, pool: ThreadPoolExecutor
    ) -> Self:
        """Opens a bundle and its engine, in a thread.

        Raises:
            BundleError, EngineError: as :meth:`regraft.Extractor.open`.
        """
        bundle, engine = await asyncio.to_thread(_open, path, settings)
        return cls(name, version, bundle, engine, settings, pool)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps the model open for a request; to be entered before anything is waited for."""
        self._requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    @contextmanager
    def admitted(self, images: int) -> Iterator[None]:
        """Holds a place for a request's images until it is answered.

        Raises:
            Refusal: too many images wait already.
        """
        if self._images + images > self._max_queue:
            raise unavailable(
                f"Exceeds maximum queue size: {self._images} images are waiting, expected at most "
                f"{self._max_queue}; try again later"
            )
        self._images += images
        try:
            yield
        finally:
            self._images -= images

    def about(self) -> Mapping[str, str]:
        """What a configuration says besides inputs and outputs."""
        manifest = self.bundle.manifest
        return {
            "engine": self.engine.name,
            "precision": self.engine.precision,
            "source": manifest.model.get("source", "unknown"),
            "weights_sha256": manifest.model.get("weights_sha256", "unknown"),
        }

    async def close(self) -> None:
        """Waits until every request that keeps it is answered, then frees the engine."""
        await self._idle.wait()
        await self.batcher.close()
        await asyncio.to_thread(self.engine.close)


def _open(path: Path, settings: Settings) -> tuple[Bundle, Engine]:
    bundle = Bundle.open(path)
    choice = settings.engine
    options = EngineOptions(threads=choice.threads, precision=choice.precision)
    engine = open_graph(bundle, "model", choice.name, options)
    try:
        _warm_up(engine, list(bundle.manifest.outputs))
    except BaseException:
        engine.close()
        raise
    return bundle, engine


def _warm_up(engine: Engine, outputs: Sequence[str]) -> None:
    """One image through the engine, so that the first client does not wait for what is lazy."""
    engine.run(np.zeros((1, 3, *engine.size), np.float32), outputs)
