"""A bucket's buffers on the card, and the one batch that may be in them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.engines.cuda_runtime import Cuda
from regraft.engines.host_copies import HostCopies
from regraft.engines.parts import Part
from regraft.errors import EngineError
from regraft.manifest import INPUT

Array = NDArray[np.float32]


@dataclass
class Job:
    """A batch in a slot, until its results are taken out."""

    slot: Slot
    count: int
    outputs: Sequence[str]
    results: list[Array] | None = None

    def collect(self) -> list[Array]:
        """Waits for the results, and frees the slot; they are the caller's."""
        if self.results is None and self.slot.job is self:
            self.slot.empty()
        if self.results is None:
            raise EngineError("ort-cuda: this batch was lost with an earlier failure; run it again")
        return self.results


class Slot:
    """Fixed addresses, as a CUDA graph demands.

    Attributes:
        job: what is in it; None if it is free.
        plain: whether it is never recorded again, for want of memory.
        session: runs the session on its buffers, as a CUDA graph or not; set once they are bound.
    """

    def __init__(
        self,
        cuda: Cuda,
        streams: tuple[object, ...],
        stack: ExitStack,
        parts: Mapping[str, Part],
        copies: HostCopies,
    ) -> None:
        """Takes no memory yet, see :meth:`place`.

        Args:
            cuda: the calls into the CUDA runtime.
            streams: that copies in, that computes, that copies back.
            stack: frees what the slot takes.
            parts: outputs that are parts of another.
            copies: within the host's memory.
        """
        self._cuda, self._stack, self._parts, self._copies = cuda, stack, parts, copies
        self._in, self._main, self._out = streams
        self._device: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._host: dict[str, tuple[int, Array]] = {}
        self._uploaded, self._computed, self._downloaded = (cuda.event(stack) for _ in range(3))
        self.job: Job | None = None
        self.plain = False
        self.session: Callable[[bool], None]
        self._here = threading.local()

    def place(self, name: str, shape: tuple[int, ...]) -> int:
        """Takes memory on the card for an input or output of the graph, and beside it in the host.

        Returns:
            The address on the card.
        """
        self._device[name] = self._cuda.allocate(4 * int(np.prod(shape)))
        self._stack.callback(self._cuda.release, "cudaFree", self._device[name])
        self._shapes[name] = shape
        parts = {n: (*shape[:1], p.stop - p.start, *shape[2:]) for n, p in self._of(name)}
        for part, size in (parts or {name: shape}).items():
            address, array = self._cuda.pinned(size)
            self._stack.callback(self._cuda.release, "cudaFreeHost", address)
            self._host[part] = (address, array)
        return self._device[name]

    def _of(self, whole: str) -> list[tuple[str, Part]]:
        return [(name, part) for name, part in self._parts.items() if part.whole == whole]

    @property
    def is_new(self) -> bool:
        """Whether this thread has recorded no graph of it: its graphs are its own."""
        return not getattr(self._here, "recorded", False)

    def record(self) -> None:
        """Starts the run that records this thread's graph."""
        self.session(True)
        self._here.recorded = True

    def compute(self) -> None:
        """Starts a run on its buffers, as a graph if there is one."""
        self.session(not self.is_new)

    def launch(self, pixels: Array, outputs: Sequence[str]) -> Job:
        """Starts a batch: copy in, compute, copy the named outputs back."""
        address, staging = self._host[INPUT]
        count = len(pixels)
        self._copies.copy(staging[:count], pixels)
        # Images do not see each other, so any padding would do; zeros are the same in every run.
        staging[count:] = 0
        self._cuda.copy_in(self._device[INPUT], address, staging.nbytes, self._in)
        self._cuda.record(self._uploaded, self._in)
        self._cuda.follow(self._main, self._uploaded)
        self.compute()
        self._cuda.record(self._computed, self._main)
        self._cuda.follow(self._out, self._computed)
        for name in outputs:
            self._copy_back(name, count)
        self._cuda.record(self._downloaded, self._out)
        self.job = Job(self, count, outputs)
        return self.job

    def _copy_back(self, name: str, count: int) -> None:
        host, array = self._host[name]
        row = int(array[0].nbytes)
        part = self._parts.get(name)
        if part is None:
            self._cuda.copy_out(host, self._device[name], row * count, self._out)
            return
        _, tokens, *inner = self._shapes[part.whole]
        token = 4 * int(np.prod(inner))
        start = self._device[part.whole] + part.start * token
        self._cuda.copy_rows_out(host, start, row, tokens * token, count, self._out)

    def empty(self) -> None:
        """Waits for the batch that is in it, if any, and hands its results to its job."""
        job, self.job = self.job, None
        if job is None:
            return
        self._cuda.wait_for(self._downloaded)  # if this fails, the job is lost and says so
        job.results = [self._copies.copied(self._host[n][1][: job.count]) for n in job.outputs]
