"""The calls into the CUDA runtime that runners need, with their failures as EngineError.

``cuda.bindings`` returns (error, value...) and raises nothing; here a failure cannot be overlooked.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.errors import EngineError

_log = logging.getLogger("regraft.cuda")
_REMEDIES = {
    "cudaErrorMemoryAllocation": "free memory on the card, or build with a smaller max-batch",
    "cudaErrorNoDevice": "use ort-cpu on a machine without a card",
    "cudaErrorInsufficientDriver": "install or upgrade the NVIDIA driver; without a card use "
    "ort-cpu",
}


@dataclass(frozen=True)
class Card:
    """The card that is used: its name, compute capability and driver."""

    name: str
    capability: str
    driver: int

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.capability}, driver {self.driver})"


@dataclass(frozen=True)
class Buffer:
    """A tensor's place on the card and its staging area in pinned memory, for the largest batch.

    Attributes:
        device: address on the card.
        host: address of the staging area.
        array: the staging area, (images, ...).
    """

    device: int
    host: int
    array: NDArray[np.float32]

    def bytes(self, images: int) -> int:
        """How many bytes that many images take."""
        return int(self.array[0].nbytes) * images


class Cuda:
    """A thin layer over ``cuda.bindings.runtime``.

    Args:
        runtime: that module; None imports it.
        engine: name of the engine, for messages.
    """

    def __init__(self, runtime: Any = None, engine: str = "tensorrt") -> None:
        self.engine = engine
        self.runtime = (
            importlib.import_module("cuda.bindings.runtime") if runtime is None else runtime
        )

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a function of the CUDA runtime; returns its value, or a tuple of several.

        Raises:
            EngineError: it failed.
        """
        error, *values = getattr(self.runtime, name)(*arguments)
        if int(error) != 0:
            kind = getattr(error, "name", str(error))
            text = self.runtime.cudaGetErrorString(error)[1]
            text = text.decode() if isinstance(text, bytes) else str(text)
            remedy = _REMEDIES.get(kind, "restart the process; the card may have been lost")
            if self.engine != "tensorrt":  # which alone has a max-batch
                remedy = remedy.replace("build with a smaller max-batch", "run smaller batches")
            raise EngineError(f"{self.engine}: {name} failed ({kind}: {text}); {remedy}")
        return values[0] if len(values) == 1 else tuple(values)

    def release(self, name: str, handle: Any) -> None:
        """Calls a function that frees something; a failure is only logged.

        After a lost card every one fails, and would hide the error that says so.
        """
        try:
            self.call(name, handle)
        except EngineError as error:
            _log.info("%s", error)

    def card(self) -> Card:
        """The first card that is visible to this process.

        Raises:
            EngineError: there is no card, or no driver.
        """
        if self.call("cudaGetDeviceCount") < 1:
            raise EngineError(
                f"{self.engine}: there is no card; use ort-cpu, or check CUDA_VISIBLE_DEVICES"
            )
        found = self.call("cudaGetDeviceProperties", 0)
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        driver = int(self.call("cudaDriverGetVersion"))
        return Card(name.strip("\0"), f"{found.major}{found.minor}", driver)

    def stream(self) -> Any:
        """A stream of its own: the default one makes libraries wait for the whole card."""
        return self.call("cudaStreamCreateWithFlags", self.runtime.cudaStreamNonBlocking)

    def allocate(self, size: int) -> int:
        """The address of ``size`` bytes on the card."""
        return int(self.call("cudaMalloc", size))

    def pinned(self, shape: tuple[int, ...]) -> tuple[int, NDArray[np.float32]]:
        """A float32 array in memory that the card reads and writes directly, and its address."""
        count = int(np.prod(shape))
        address = int(self.call("cudaHostAlloc", 4 * count, self.runtime.cudaHostAllocDefault))
        memory = (ctypes.c_float * count).from_address(address)
        return address, np.ctypeslib.as_array(memory).reshape(shape)

    def copy_in(self, device: int, host: int, size: int, stream: Any) -> None:
        """Starts a copy from pinned memory to the card."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", device, host, size, kind, stream)

    def copy_out(self, host: int, device: int, size: int, stream: Any) -> None:
        """Starts a copy from the card to pinned memory."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", host, device, size, kind, stream)

    def copy_rows_out(
        self, host: int, device: int, row: int, stride: int, rows: int, stream: Any
    ) -> None:
        """Starts a copy to pinned memory of ``row`` bytes out of every ``stride``."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpy2DAsync", host, row, device, stride, row, rows, kind, stream)

    def wait(self, stream: Any) -> None:
        """Waits until everything that was started on a stream is done."""
        self.call("cudaStreamSynchronize", stream)

    def seconds(self, stream: Any, work: Callable[[], None]) -> float:
        """How long the card takes, by its own clock, for what ``work`` starts on a stream."""
        with ExitStack() as events:
            start, stop = (self.event(events) for _ in range(2))
            self.record(start, stream)
            work()
            self.record(stop, stream)
            self.wait_for(stop)
            return float(self.call("cudaEventElapsedTime", start, stop)) / 1e3

    def event(self, stack: ExitStack) -> Any:
        """An event, destroyed with the stack."""
        event = self.call("cudaEventCreate")
        stack.callback(self.release, "cudaEventDestroy", event)
        return event

    def record(self, event: Any, stream: Any) -> None:
        """Marks where a stream has got to."""
        self.call("cudaEventRecord", event, stream)

    def follow(self, stream: Any, event: Any) -> None:
        """What is started on a stream from here on waits for the event."""
        self.call("cudaStreamWaitEvent", stream, event, 0)

    def wait_for(self, event: Any) -> None:
        """Waits until an event has happened."""
        self.call("cudaEventSynchronize", event)

    def begin_capture(self, stream: Any) -> None:
        """From here on a stream's work is recorded, not done."""
        # Of this thread alone: others may allocate meanwhile.
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Any) -> Any:
        """Ends the recording; returns what can be launched."""
        graph = self.call("cudaStreamEndCapture", stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.release("cudaGraphDestroy", graph)
