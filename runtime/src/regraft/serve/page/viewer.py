"""Looks at single images with the probe graphs, apart from the engines that answer requests.

Everything runs in one thread of low priority: the graphs are opened when an image is first looked
at, of one model at a time, and closed once nobody has asked for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from regraft.bundle import Bundle
from regraft.engines import EngineOptions, engine_class
from regraft.report.measure import ENGINE, Source, measure
from regraft.report.measurement import Measurement
from regraft.serve.model import Model
from regraft.serve.pixels import open_image
from regraft.serve.refusals import Kind, Refusal, unavailable
from regraft.serve.settings import Settings
from regraft.timing import Times, race
from regraft.verification import Engines
from regraft.wording import counted

_MOST = 4  # images that are looked at or wait for it
_IDLE = 120.0  # seconds until the graphs are closed
_SECONDS, _ROUNDS = 0.5, 3  # of timing, at least
_NICE = 10
_NEEDED = ("probe", "probe_baseline", "baseline")

Result = TypeVar("Result")


class Viewer:
    """Measures images for the page; needs a running event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, "regraft-page", initializer=_step_back)
        self._jobs = 0
        self._closing: asyncio.TimerHandle | None = None
        # Of the thread alone:
        self._model: Model | None = None
        self._engines: Engines | None = None

    async def look(
        self, model: Model, file: bytes, show: Callable[[Measurement], Result]
    ) -> Result:
        """Norms and attention of every layer, before and after.

        Args:
            model: whose bundle.
            file: an encoded image.
            show: makes the result from them, in the same thread.

        Raises:
            Refusal: the image cannot be decoded, the bundle has nothing to look with, or too many
                images wait already.
        """

        def job() -> Result:
            image = open_image("image", file, self._settings.limits.pixels)
            engines = self._opened(model)
            return show(measure(engines.bundle, [Source(image, "the image")], engines=engines))

        return await self._run(job)

    async def time(self, model: Model, file: bytes) -> tuple[dict[str, Times], str]:
        """Times baseline and patched graph on one image, in turn.

        Args:
            model: whose bundle.
            file: an encoded image.

        Returns:
            Times of ``baseline`` and ``patched``, and what ran them.

        Raises:
            Refusal: as :meth:`look`.
        """

        def job() -> tuple[dict[str, Times], str]:
            image = open_image("image", file, self._settings.limits.pixels)
            engines = self._opened(model)
            pixels = engines.bundle.manifest.preprocessing(image)[None]
            baseline, patched = engines["baseline"], engines["model"]
            # Both give what the baseline has, as in `regraft bench`.
            names = list(baseline.outputs)
            times = race(
                {
                    "baseline": lambda: baseline.run(pixels, names),
                    "patched": lambda: patched.run(pixels, names),
                },
                seconds=_SECONDS,
                rounds=_ROUNDS,
                warm_up=1,
            )
            return times, f"{patched.name}, {counted(int(patched.details()['threads']), 'thread')}"

        return await self._run(job)

    async def close(self) -> None:
        """Waits for what runs and frees everything."""
        if self._closing is not None:
            self._closing.cancel()
        self._thread.submit(self._close_engines)
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self, job: Callable[[], Result]) -> Result:
        if self._jobs >= _MOST:
            raise unavailable(
                f"{self._jobs} images are being looked at, expected at most {_MOST}; try again "
                "later"
            )
        loop = asyncio.get_running_loop()
        self._jobs += 1
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        try:
            return await loop.run_in_executor(self._thread, job)
        finally:
            self._jobs -= 1
            if not self._jobs:
                self._closing = loop.call_later(_IDLE, self._thread.submit, self._close_engines)

    def _opened(self, model: Model) -> Engines:
        if self._engines is None or self._model is not model:
            self._close_engines()
            if reason := obstacle(model):
                raise Refusal(Kind.NOT_FOUND, f"there are no maps of '{model.name}': {reason}")
            # What was checked when the model was loaded may have changed since.
            bundle = Bundle.open(model.bundle.path)
            if bundle.manifest.text() != model.bundle.manifest.text():
                raise unavailable(
                    f"the bundle of '{model.name}' was replaced on disk; load the model again"
                )
            options = EngineOptions(threads=self._settings.engine.threads)
            self._engines, self._model = Engines(bundle, ENGINE, options), model
        return self._engines

    def _close_engines(self) -> None:
        if self._engines is not None:
            self._engines.close()
            self._engines = self._model = None
            _give_back()


def obstacle(model: Model) -> str:
    """Why a model's images cannot be looked at, in one sentence; empty if they can."""
    manifest = model.bundle.manifest
    if not set(_NEEDED) <= set(manifest.graphs):
        return (
            "the bundle was exported with --no-baseline: it has neither the baseline to compare "
            "with nor the probe graphs that maps are made from; export it again without"
        )
    if manifest.precision == "bf16":
        return (
            f"the bundle is bf16, and maps are computed by {ENGINE}, which has no bf16; export it "
            "with --precision fp32 to see them"
        )
    reason = engine_class(ENGINE).unavailable(manifest.precision)
    return f"maps are computed by {ENGINE}: {reason}" if reason else ""


def about(model: Model) -> dict[str, Any]:
    """What the page says of a model before it has seen an image."""
    manifest = model.bundle.manifest
    return {
        "name": model.name,
        "version": model.version,
        "source": manifest.model.get("source", "unknown model"),
        "variant": manifest.variant,
        "obstacle": obstacle(model),
    }


def _give_back() -> None:
    """Returns freed memory to the system; glibc keeps two fifths of what the graphs took."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library has no such function
            ctypes.CDLL(None).malloc_trim(0)


def _step_back() -> None:
    """Lets requests have the cores first: this thread, and those that engines start from it."""
    if sys.platform == "linux":  # elsewhere priorities are of processes
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
