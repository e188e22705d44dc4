"""Runs a session of ONNX Runtime on the card: buffers, padded batches, a CUDA graph per bucket.

Everything happens on one stream, which the session was given: copy in from pinned memory, run, copy
the wanted outputs back. Never run on a card where this was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.engines.buckets import buckets, pieces
from regraft.engines.cuda_runtime import Buffer, Cuda
from regraft.manifest import INPUT

LARGEST = 64  # images in one run; a larger batch is cut into pieces
_SKIP = "-1"  # the annotation that neither records nor replays


@dataclass(frozen=True)
class _Slot:
    """A bucket, ready to run: its addresses never change, as a CUDA graph demands."""

    buffers: Mapping[str, Buffer]
    binding: Any
    options: Any


class Runner:
    """Runs a session; not for several threads at once.

    Attributes:
        sizes: the batches that are executed.
        graphs: whether CUDA graphs are used.
    """

    def __init__(
        self,
        session: Any,
        ort: Any,
        cuda: Cuda,
        stream: Any,
        inner: Mapping[str, tuple[int, ...]],
        *,
        graphs: bool,
    ) -> None:
        """Allocates nothing yet: a bucket gets its memory when it is first used.

        Args:
            session: an ``InferenceSession`` whose ``user_compute_stream`` is ``stream``.
            ort: the module ``onnxruntime``.
            cuda: the calls into the CUDA runtime.
            stream: where everything runs; freed by :meth:`close`.
            inner: name of the input and of every output -> shape without the batch.
            graphs: whether the session was opened with CUDA graphs.
        """
        self._session, self._ort, self._cuda, self._stream = session, ort, cuda, stream
        self._inner, self.graphs = dict(inner), graphs
        self.sizes = buckets(1, LARGEST)
        self._slots: dict[int, _Slot] = {}
        self._stack = ExitStack()
        self._stack.callback(cuda.release, "cudaStreamDestroy", stream)

    def run(self, pixels: NDArray[np.float32], outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        """Runs a batch of any size.

        Args:
            pixels: float32 (B, 3, H, W).
            outputs: which to copy back; the others stay on the card.

        Returns:
            The outputs, in order, owned by the caller.

        Raises:
            EngineError: CUDA failed.
        """
        results = [np.empty((len(pixels), *self._inner[name]), np.float32) for name in outputs]
        for start, stop, bucket in pieces(len(pixels), self.sizes):
            slot = self._slots.get(bucket) or self._prepare(bucket)
            self._execute(slot, pixels[start:stop], bucket, outputs)
            for name, result in zip(outputs, results, strict=True):
                result[start:stop] = slot.buffers[name].array[: stop - start]
        return results

    def device_seconds(self, batch: int, runs: int) -> float:
        """Seconds per run on the card, for the bucket that executes a batch of that size."""
        bucket = next((size for size in self.sizes if size >= batch), self.sizes[-1])
        slot = self._slots.get(bucket) or self._prepare(bucket)

        def work() -> None:
            for _ in range(runs):
                self._session.run_with_iobinding(slot.binding, slot.options)

        return self._cuda.seconds(self._stream, work) / runs

    def _execute(
        self, slot: _Slot, pixels: NDArray[np.float32], bucket: int, outputs: Sequence[str]
    ) -> None:
        count, staging = len(pixels), slot.buffers[INPUT]
        staging.array[:count] = pixels
        # Images do not see each other, so any padding would do; zeros are the same in every run.
        staging.array[count:] = 0
        self._cuda.copy_in(staging.device, staging.host, staging.bytes(bucket), self._stream)
        self._session.run_with_iobinding(slot.binding, slot.options)
        for name in outputs:
            buffer = slot.buffers[name]
            self._cuda.copy_out(buffer.host, buffer.device, buffer.bytes(count), self._stream)
        self._cuda.wait(self._stream)

    def _prepare(self, bucket: int) -> _Slot:
        with ExitStack() as taken:
            buffers = {name: self._buffer(taken, name, bucket) for name in self._inner}
            binding = self._session.io_binding()
            for name, buffer in buffers.items():
                bind = binding.bind_input if name == INPUT else binding.bind_output
                bind(name, "cuda", 0, np.float32, list(buffer.array.shape), buffer.device)
            self._stack.enter_context(taken.pop_all())
        options = self._ort.RunOptions()
        # One graph for each bucket; the first run with a new number records it.
        options.add_run_config_entry("gpu_graph_id", str(bucket) if self.graphs else _SKIP)
        # The copies back are on the same stream; waiting for the session first would cost a round.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        slot = self._slots[bucket] = _Slot(buffers, binding, options)
        return slot

    def _buffer(self, stack: ExitStack, name: str, bucket: int) -> Buffer:
        shape = (bucket, *self._inner[name])
        device = self._cuda.allocate(4 * int(np.prod(shape)))
        stack.callback(self._cuda.release, "cudaFree", device)
        host, array = self._cuda.pinned(shape)
        stack.callback(self._cuda.release, "cudaFreeHost", host)
        return Buffer(device, host, array)

    def close(self) -> None:
        """Frees everything; the runner cannot be used afterwards. Closing twice is allowed."""
        self._slots.clear()
        self._session = None  # before the stream it runs on
        self._stack.close()
