"""Runs a session of ONNX Runtime on the card: buffers, padded batches, a CUDA graph per bucket.

Three streams: one copies in, one computes (the session was given it), one copies back, all from and
to pinned memory. Each bucket has up to two slots, so that while the card computes in one, the other
is filled and emptied. Where the card has no room for the second, one has to do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.engines.buckets import buckets, pieces
from regraft.engines.cuda_runtime import Cuda
from regraft.engines.host_copies import HostCopies
from regraft.engines.ort_cuda.gate import GATE
from regraft.engines.ort_cuda.slot import Job, Slot
from regraft.engines.parts import Part
from regraft.manifest import INPUT

LARGEST = 64  # images in one run; a larger batch is cut into pieces
SIZES = buckets(1, LARGEST)  # the batches that are executed
_SLOTS = 2  # of each bucket
_SKIP = "-1"  # the annotation that neither records nor replays
# What CUDA and ONNX Runtime say when the card is full.
NO_MEMORY = ("out of memory", "failed to allocate memory", "cudaerrormemoryallocation")
_log = logging.getLogger("regraft")


def is_full(error: Exception) -> bool:
    """Whether it says that the card has no memory left; onnxruntime's have no common base."""
    return any(sign in str(error).lower() for sign in NO_MEMORY)


@dataclass(frozen=True)
class Started:
    """A batch on its way, as the jobs that it was cut into."""

    jobs: Sequence[Job]
    outputs: int


class Runner:
    """Runs a session; not for several threads at once.

    Attributes:
        graphs: whether CUDA graphs are used.
    """

    def __init__(
        self,
        session: Any,
        ort: Any,
        cuda: Cuda,
        stream: Any,
        inner: Mapping[str, tuple[int, ...]],
        parts: Mapping[str, Part] | None = None,
        *,
        graphs: bool,
        threads: int,
    ) -> None:
        """Allocates nothing yet: a bucket gets its memory when it is first used.

        Args:
            session: an ``InferenceSession`` whose ``user_compute_stream`` is ``stream``.
            ort: the module ``onnxruntime``.
            cuda: the calls into the CUDA runtime.
            stream: where it computes; freed by :meth:`close`.
            inner: name of the input and of every output of the graph -> shape without the batch.
            parts: outputs that are parts of one of these.
            graphs: whether the session was opened with CUDA graphs.
            threads: that may copy within the host's memory.
        """
        self._session, self._ort, self._cuda = session, ort, cuda
        self._inner, self._parts, self.graphs = dict(inner), dict(parts or {}), graphs
        self._copies = HostCopies(threads)
        self._slots: dict[int, list[Slot]] = {}
        self._most = _SLOTS
        with ExitStack() as stack:
            stack.callback(cuda.release, "cudaStreamDestroy", stream)
            self._streams = (self._stream(stack), stream, self._stream(stack))
            self._stack = stack.pop_all()

    def _stream(self, stack: ExitStack) -> Any:
        stream = self._cuda.stream()
        stack.callback(self._cuda.release, "cudaStreamDestroy", stream)
        return stream

    def start(self, pixels: NDArray[np.float32], outputs: Sequence[str]) -> Started:
        """Starts a batch of any size and returns as soon as its last piece is on its way.

        What was started and never finished costs nothing but its slots, which the next batch takes
        over.

        Args:
            pixels: float32 (B, 3, H, W); may be changed afterwards.
            outputs: which to copy back; the others stay on the card.

        Raises:
            EngineError: CUDA failed.
        """
        jobs = []
        for start, stop, bucket in pieces(len(pixels), SIZES):
            slot = self._free(bucket)
            with GATE.together():
                jobs.append(slot.launch(pixels[start:stop], outputs))
        return Started(jobs, len(outputs))

    def finish(self, started: Started) -> list[NDArray[np.float32]]:
        """Waits for a batch; the outputs, in order, owned by the caller."""
        with GATE.together():
            found = [job.collect() for job in started.jobs]
        if len(found) == 1:
            return found[0]
        return [np.concatenate([part[i] for part in found]) for i in range(started.outputs)]

    def device_seconds(self, batch: int, runs: int) -> float:
        """Seconds per run on the card, of the buckets that execute a batch of that size."""
        needed = [bucket for _, _, bucket in pieces(batch, SIZES)]
        slots = {b: self._free(b) for b in set(needed)}

        def work() -> None:
            for _ in range(runs):
                for bucket in needed:
                    slots[bucket].compute()

        with GATE.together():
            return self._cuda.seconds(self._streams[1], work) / runs

    def _free(self, bucket: int) -> Slot:
        """A slot that is not in use; if there is none, the older one, once it has been emptied."""
        slots = self._slots.setdefault(bucket, [])
        idle = next((slot for slot in slots if slot.job is None), None)
        if idle is None and len(slots) < self._most:
            idle = self._another(bucket, len(slots))
        if idle is None:
            idle = slots[0]
            with GATE.together():
                idle.empty()
        if self.graphs and idle.is_new and not idle.plain:
            self._record_late(idle)
        # The one that was handed out last stands last.
        slots[:] = [*(slot for slot in slots if slot is not idle), idle]
        return idle

    def _another(self, bucket: int, number: int) -> Slot | None:
        """A new slot; None if there is no memory for it, and one that can do its work."""
        try:
            return self._prepare(bucket, number)
        except Exception as error:
            if number == 0 or not is_full(error):
                raise
        self._most = number
        _log.warning(
            "ort-cuda: the card has too little free memory to copy one batch of %d while another "
            "is computed; takes one after the other from here on, more slowly",
            bucket,
        )
        return None

    def _prepare(self, bucket: int, number: int) -> Slot:
        """A slot that has run once: all memory that it ever takes is taken here."""
        taken = ExitStack()
        try:
            with GATE.together():
                slot = self._bound(taken, bucket, str(_SLOTS * bucket + number))
            if not (self.graphs and self._record(slot)):
                with GATE.together():
                    slot.compute()
                    self._cuda.wait(self._streams[1])
        except BaseException:
            with GATE.together():
                taken.close()
            raise
        self._stack.enter_context(taken)
        return slot

    def _bound(self, taken: ExitStack, bucket: int, graph: str) -> Slot:
        """A slot with memory for a bucket; what it takes is freed by ``taken``."""
        slot = Slot(self._cuda, self._streams, taken, self._parts, self._copies)
        binding = self._session.io_binding()
        for name, shape in self._inner.items():
            address = slot.place(name, (bucket, *shape))
            bind = binding.bind_input if name == INPUT else binding.bind_output
            bind(name, "cuda", 0, np.float32, [bucket, *shape], address)
        options = {False: self._options(_SKIP), True: self._options(graph)}
        slot.session = lambda recorded: self._session.run_with_iobinding(binding, options[recorded])
        return slot

    def _options(self, graph: str) -> Any:
        """Of a run: the first with a new number records it, the others replay it."""
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph)
        # The copies back wait on the card; waiting for the session first would cost a round.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _record(self, slot: Slot) -> bool:
        """Records this thread's graph of a slot; not while an engine is opened: the next time."""
        with GATE.alone() as alone:
            if alone:
                slot.record()
                self._cuda.wait(self._streams[1])
        return alone

    def _record_late(self, slot: Slot) -> None:
        """Records a slot that works without; where there is no memory for it, it goes on so."""
        try:
            self._record(slot)
        except Exception as error:
            if not is_full(error):
                raise
            slot.plain = True
            _log.warning(
                "ort-cuda: the card has too little free memory for a CUDA graph more; some "
                "batches run without, more slowly"
            )

    def close(self) -> None:
        """Frees everything; the runner cannot be used afterwards. Closing twice is allowed."""
        self._copies.close()  # before the memory that an interrupted copy still writes to
        with GATE.opening():
            self._slots.clear()
            self._session = None  # before the stream it runs on
            self._stack.close()
