"""Executes an opened TensorRT engine: buffers, padded batches, one CUDA graph per bucket.

Never run on a card where this was written; tested against a fake CUDA runtime and a fake engine,
which check the calls and the bookkeeping, not TensorRT.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.engines.buckets import buckets, pieces
from regraft.engines.cuda_runtime import Buffer, Cuda
from regraft.engines.host_copies import HostCopies
from regraft.errors import EngineError
from regraft.manifest import INPUT

_log = logging.getLogger("regraft.tensorrt")


@dataclass(frozen=True)
class _Slot:
    """A bucket, ready: its context, and its CUDA graph; None where it could not be recorded."""

    context: Any
    graph: Any


class Runner:
    """Runs an engine on one stream; not for several threads at once.

    Attributes:
        inner: tensor name -> shape without the batch.
        sizes: the batches that are executed.
        graphs: whether CUDA graphs are used; False after the first that could not be recorded.
    """

    def __init__(
        self, engine: Any, trt: Any, cuda: Cuda, graphs: bool = True, threads: int = 1
    ) -> None:
        """Allocates everything for the largest batch.

        Args:
            engine: a ``tensorrt.ICudaEngine`` of one profile.
            trt: the module ``tensorrt``.
            cuda: the calls into the CUDA runtime.
            graphs: whether to record CUDA graphs.
            threads: that may copy within the host's memory.

        Raises:
            EngineError: a tensor is not what was built here, or the card's memory is too small.
        """
        self._engine, self._trt, self._cuda = engine, trt, cuda
        self.graphs = graphs
        self._copies = HostCopies(threads)
        self._slots: dict[int, _Slot] = {}
        self.inner = _inner_shapes(engine, trt)
        shapes = engine.get_tensor_profile_shape(INPUT, 0)  # min, opt, max
        smallest, largest = int(shapes[0][0]), int(shapes[2][0])
        self.sizes = buckets(smallest, largest)
        with ExitStack() as stack:
            self._stream = cuda.stream()
            stack.callback(cuda.release, "cudaStreamDestroy", self._stream)
            # One scratch area for all contexts: they never run at the same time.
            self._scratch_size = int(engine.device_memory_size_v2)
            self._scratch = self._allocate(stack, self._scratch_size) if self._scratch_size else 0
            self._buffers = {name: self._buffer(stack, name, largest) for name in self.inner}
            self._stack = stack.pop_all()

    def _allocate(self, stack: ExitStack, size: int) -> int:
        address = self._cuda.allocate(size)
        stack.callback(self._cuda.release, "cudaFree", address)
        return address

    def _buffer(self, stack: ExitStack, name: str, batch: int) -> Buffer:
        shape = (batch, *self.inner[name])
        device = self._allocate(stack, 4 * int(np.prod(shape)))
        host, array = self._cuda.pinned(shape)
        stack.callback(self._cuda.release, "cudaFreeHost", host)
        return Buffer(device, host, array)

    def run(self, pixels: NDArray[np.float32], outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        """Runs a batch of any size.

        Args:
            pixels: float32 (B, 3, H, W).
            outputs: which to copy back; the others stay on the card.

        Returns:
            The outputs, in order, owned by the caller.

        Raises:
            EngineError: TensorRT or CUDA failed.
        """
        results = [np.empty((len(pixels), *self.inner[name]), np.float32) for name in outputs]
        for start, stop, bucket in pieces(len(pixels), self.sizes):
            self._execute(pixels[start:stop], bucket, outputs)
            for name, result in zip(outputs, results, strict=True):
                self._copies.copy(result[start:stop], self._buffers[name].array[: stop - start])
        return results

    def _execute(self, pixels: NDArray[np.float32], bucket: int, outputs: Sequence[str]) -> None:
        count, staging = len(pixels), self._buffers[INPUT]
        self._copies.copy(staging.array[:count], pixels)
        # Images do not see each other, so any padding would do; zeros are the same in every run.
        staging.array[count:bucket] = 0
        size = staging.bytes(bucket)
        self._cuda.copy_in(staging.device, staging.host, size, self._stream)
        self._compute(bucket)
        for name in outputs:
            buffer = self._buffers[name]
            self._cuda.copy_out(buffer.host, buffer.device, buffer.bytes(count), self._stream)
        self._cuda.wait(self._stream)

    def device_seconds(self, batch: int, runs: int) -> float:
        """Seconds per run on the card, of the buckets that execute a batch of that size."""
        needed = [bucket for _, _, bucket in pieces(batch, self.sizes)]

        def work() -> None:
            for _ in range(runs):
                for bucket in needed:
                    self._compute(bucket)

        return self._cuda.seconds(self._stream, work) / runs

    def _compute(self, bucket: int) -> None:
        slot = self._slots.get(bucket) or self._prepare(bucket)
        if slot.graph is None:
            self._enqueue(slot.context, bucket)
        else:
            self._cuda.call("cudaGraphLaunch", slot.graph, self._stream)

    def _prepare(self, bucket: int) -> _Slot:
        context = self._context(bucket)
        graph = self._record(context, bucket) if self.graphs else None
        self._slots[bucket] = _Slot(context, graph)
        return self._slots[bucket]

    def _context(self, bucket: int) -> Any:
        # One per bucket: a CUDA graph keeps the shapes and state of the context it came from.
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(
                "tensorrt: no execution context could be created; free memory on the card"
            )
        # The engine was built with details for its inspector; at run time they cost time.
        context.nvtx_verbosity = self._trt.ProfilingVerbosity.NONE
        if self._scratch_size:
            context.set_device_memory(self._scratch, self._scratch_size)
        accepted = context.set_input_shape(INPUT, (bucket, *self.inner[INPUT]))
        for name, buffer in self._buffers.items():
            accepted = context.set_tensor_address(name, buffer.device) and accepted
        if not accepted or context.infer_shapes():
            raise EngineError(f"tensorrt: the plan refuses a batch of {bucket}; build it again")
        return context

    def _enqueue(self, context: Any, bucket: int) -> None:
        if not context.execute_async_v3(int(self._stream)):
            raise EngineError(f"tensorrt: a batch of {bucket} could not be started")

    def _record(self, context: Any, bucket: int) -> Any:
        # Once without recording: what TensorRT puts off until the first run cannot be recorded.
        self._enqueue(context, bucket)
        self._cuda.wait(self._stream)
        graph = None
        try:
            self._cuda.begin_capture(self._stream)
            try:
                self._enqueue(context, bucket)
            finally:  # also after a failure: a stream that still records can do nothing else
                graph = self._cuda.end_capture(self._stream)
        except EngineError as error:
            if graph is not None:
                self._cuda.release("cudaGraphExecDestroy", graph)
            self.graphs = False
            _log.warning("%s: works without CUDA graphs, more slowly", error)
            return None
        return graph

    def close(self) -> None:
        """Frees everything; the runner cannot be used afterwards. Closing twice is allowed."""
        self._copies.close()  # before the memory that an interrupted copy still writes to
        for slot in self._slots.values():
            if slot.graph is not None:
                self._cuda.release("cudaGraphExecDestroy", slot.graph)
        # Contexts before the memory they point into.
        self._slots.clear()
        self._stack.close()


def _inner_shapes(engine: Any, trt: Any) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape without the batch, the input first."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    shapes = {name: tuple(int(n) for n in engine.get_tensor_shape(name)) for name in names}
    wrong = [n for n in names if engine.get_tensor_dtype(n) != trt.float32 or len(shapes[n]) < 2]
    wrong += [n for n in names if shapes[n][0] != -1 or min(shapes[n][1:], default=0) < 1]
    if inputs != [INPUT] or wrong:
        raise EngineError(
            f"tensorrt: the plan has {shapes}; expected {INPUT} and outputs, all FLOAT with a free "
            "batch; build it again"
        )
    return {name: shapes[name][1:] for name in [INPUT, *(n for n in names if n != INPUT)]}
