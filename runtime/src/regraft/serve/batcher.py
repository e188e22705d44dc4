"""Requests share runs of the engine: a queue in front of it, and one run after the other.

A run takes whatever waits, oldest first, up to the preferred batch; with a delay, the oldest
waiting request is held back that long for others to join it. Requests whose client is gone are
passed over, those whose time is up are answered at that moment, whatever the engine is doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from regraft.serve.refusals import INTERNAL_TEXT, Kind, Refusal, unavailable

Floats = NDArray[np.float32]
Run = Callable[[Floats, Sequence[str]], Mapping[str, Floats]]
_log = logging.getLogger("regraft.serve")


@dataclass(frozen=True)
class Answer:
    """What came out for one request, and how long it took.

    Attributes:
        outputs: name -> float32, as many rows as the request had images.
        queue_ns: from the queue to the run.
        gather_ns: putting the batch together.
        infer_ns: the run of the engine.
        batch: images in that run.
        first: whether this request is the one that the run is counted with.
    """

    outputs: Mapping[str, Floats]
    queue_ns: int
    gather_ns: int
    infer_ns: int
    batch: int
    first: bool


@dataclass(frozen=True)
class _Ran:
    """One run of the engine; ``broken`` are the rows that hold NaN or Inf."""

    outputs: Mapping[str, Floats]
    broken: frozenset[int]
    images: int
    gather_ns: int
    infer_ns: int


@dataclass(eq=False)
class _Job:
    pixels: Floats
    outputs: tuple[str, ...]
    label: str
    done: asyncio.Future[Answer]
    since_ns: int = field(default_factory=time.perf_counter_ns)


class Batcher:
    """A queue and the task that empties it. Lives in one event loop.

    Args:
        run: ``run(pixels, outputs)`` of an engine; called in a thread, never twice at a time.
        preferred: images in one run; more only if a single request has more.
        max_delay: seconds to wait for a fuller batch.
    """

    def __init__(self, run: Run, preferred: int, max_delay: float) -> None:
        self._run = run
        self._preferred = preferred
        self._delay_ns = int(max_delay * 1e9)
        self._queue: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="regraft-engine")
        self._task = asyncio.get_running_loop().create_task(self._work())

    def waiting(self, label: str) -> int:
        """Requests in the queue."""
        return sum(job.label == label and not job.done.done() for job in self._queue)

    async def submit(
        self, pixels: Floats, outputs: tuple[str, ...], label: str, deadline: float
    ) -> Answer:
        """Waits for the answer to one request.

        Args:
            pixels: float32 (N, 3, H, W).
            outputs: those wanted.
            label: what the run is counted under, once per run and label.
            deadline: of the event loop's clock; after it the request is no longer started.

        Raises:
            Refusal: its time was up, or the engine failed.
        """
        loop = asyncio.get_running_loop()
        job = _Job(pixels, outputs, label, loop.create_future())
        self._queue.append(job)
        self._arrived.set()
        timer = loop.call_at(deadline, self._expire, job)
        try:
            return await job.done
        finally:
            timer.cancel()
            # One that gave up leaves at once, so that its pixels do not wait for the engine.
            with contextlib.suppress(ValueError):
                self._queue.remove(job)

    async def close(self) -> None:
        """Ends the task and its thread; nothing may wait any more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def _expire(self, job: _Job) -> None:
        if job in self._queue and not job.done.done():
            self._queue.remove(job)
            job.done.set_exception(unavailable("Request timeout expired"))

    async def _work(self) -> None:
        while True:
            self._arrived.clear()
            if not self._queue:
                await self._arrived.wait()
                continue
            if (left := self._hold_ns()) > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), left / 1e9)
                continue
            if jobs := self._take():
                await self._execute(jobs)

    def _hold_ns(self) -> int:
        """How much longer the oldest request may be held back."""
        images = sum(len(job.pixels) for job in self._queue)
        if not self._delay_ns or images >= self._preferred:
            return 0
        return self._queue[0].since_ns + self._delay_ns - time.perf_counter_ns()

    def _take(self) -> list[_Job]:
        jobs: list[_Job] = []
        room = self._preferred
        while self._queue and (not jobs or len(self._queue[0].pixels) <= room):
            job = self._queue.popleft()
            if not job.done.done():
                jobs.append(job)
                room -= len(job.pixels)
        return jobs

    async def _execute(self, jobs: list[_Job]) -> None:
        loop = asyncio.get_running_loop()
        started = time.perf_counter_ns()
        try:
            ran = await loop.run_in_executor(self._thread, self._run_all, jobs)
        except Exception:
            _log.exception("a run of %d requests failed", len(jobs))
            for job in jobs:
                if not job.done.done():
                    job.done.set_exception(Refusal(Kind.INTERNAL, INTERNAL_TEXT))
            return
        outputs, broken = ran.outputs, ran.broken
        at, counted = 0, set[str]()
        for job in jobs:
            rows = slice(at, at + len(job.pixels))
            at = rows.stop
            first = job.label not in counted
            counted.add(job.label)
            if job.done.done():
                continue
            if broken and not broken.isdisjoint(range(rows.start, rows.stop)):
                _log.error("outputs hold NaN or Inf, in fp16 an overflow, else broken weights")
                job.done.set_exception(Refusal(Kind.INTERNAL, INTERNAL_TEXT))
                continue
            job.done.set_result(
                Answer(
                    outputs={name: outputs[name][rows] for name in job.outputs},
                    queue_ns=started - job.since_ns,
                    gather_ns=ran.gather_ns,
                    infer_ns=ran.infer_ns,
                    batch=ran.images,
                    first=first,
                )
            )

    def _run_all(self, jobs: list[_Job]) -> _Ran:
        begin = time.perf_counter_ns()
        parts = [job.pixels for job in jobs]
        pixels = parts[0] if len(parts) == 1 else np.concatenate(parts)
        wanted = tuple(dict.fromkeys(name for job in jobs for name in job.outputs))
        ready = time.perf_counter_ns()
        outputs = self._run(pixels, wanted)
        ended = time.perf_counter_ns()
        return _Ran(outputs, _broken(outputs), len(pixels), ready - begin, ended - ready)


def _broken(outputs: Mapping[str, Floats]) -> frozenset[int]:
    """The rows that hold NaN or Inf: one image's overflow is not its neighbours'."""
    rows = set[int]()
    for array in outputs.values():
        finite = np.isfinite(array)
        if not finite.all():
            rows |= set(np.flatnonzero(~finite.reshape(len(array), -1).all(1)).tolist())
    return frozenset(rows)
