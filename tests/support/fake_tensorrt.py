"""A CUDA runtime and a TensorRT engine that live in ordinary memory and keep books.

They check what real ones punish: addresses outside an allocation, copies from memory that is not
pinned, work on a stream that is gone, a graph of a context that never ran, leaks. They say nothing
about TensorRT itself.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from collections import Counter, deque
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPES = {
    "last_hidden_state": (5, 4),
    "pooler_output": (4,),
    "pixel_values": (3, 8, 8),
}


class Status(enum.IntEnum):
    cudaSuccess = 0  # noqa: N815 - CUDA's names
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInsufficientDriver = 35  # noqa: N815
    cudaErrorLaunchFailure = 719  # noqa: N815
    cudaErrorStreamCaptureUnsupported = 900  # noqa: N815


# What CUDA forbids to every other thread while one records in global mode.
UNSAFE = (
    "cudaMalloc",
    "cudaFree",
    "cudaHostAlloc",
    "cudaFreeHost",
    "cudaStreamCreateWithFlags",
    "cudaStreamDestroy",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
)


class Cudart:
    """``cuda.bindings.runtime``, as far as the runner uses it.

    Attributes:
        memory: bytes that may be allocated on the card.
        cards: how many there are.
        fails: function name -> the status its next call returns.
        calls: how often each function was called.
        clock: milliseconds; every piece of work takes one.
        recorder: the thread that records in global mode, as ONNX Runtime does; None if none does.
        forbidden: what other threads called meanwhile.
    """

    cudaStreamNonBlocking = 1  # noqa: N815
    cudaHostAllocDefault = 0  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self) -> None:
        self.memory, self.cards = 1 << 30, 1
        self.fails: dict[str, Status] = {}
        self.calls: Counter[str] = Counter()
        self.copied: list[tuple[str, int]] = []
        self._device: dict[int, Any] = {}
        self._host: dict[int, Any] = {}
        # Work waits on its stream until somebody waits for it, as late as it may on a card.
        self._streams: dict[int, deque[Callable[[], None]]] = {}
        self._events: dict[int, tuple[int, float | None]] = {}
        self.clock = 0.0
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._ready: dict[int, list[Callable[[], None]]] = {}
        self._recording: list[Callable[[], None]] | None = None
        self._next = 1000
        self.recorder: int | None = None
        self.forbidden: list[str] = []

    @property
    def live(self) -> int:
        """What was taken and not given back."""
        held = (
            self._device,
            self._host,
            self._streams,
            self._graphs,
            self._ready,
            self._events,
        )
        return sum(len(kind) for kind in held)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(value):
            return value
        self.calls[name] += 1
        status = self.fails.pop(name, Status.cudaSuccess)
        if name in UNSAFE and self.recorder not in (None, threading.get_ident()):
            self.forbidden.append(name)
            status = Status.cudaErrorStreamCaptureUnsupported
        if status:
            return lambda *_: (status, None)

        def call(*arguments: Any) -> tuple[Any, ...]:
            result = value(*arguments)
            if isinstance(result, Status):
                return (result, None)
            return (Status.cudaSuccess,) if result is None else (Status.cudaSuccess, result)

        return call

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def cudaGetErrorString(self, status: Status) -> bytes:  # noqa: N802
        return f"the text of {status.name}".encode()

    def cudaGetDeviceCount(self) -> Any:  # noqa: N802
        return self.cards

    def cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802
        assert device == 0
        return SimpleNamespace(name=b"Fake Card\0", major=9, minor=0)

    def cudaDriverGetVersion(self) -> int:  # noqa: N802
        return 13050

    def cudaStreamCreateWithFlags(self, flags: int) -> int:  # noqa: N802
        assert flags == self.cudaStreamNonBlocking
        self._streams[stream := self._handle()] = deque()
        return stream

    def cudaStreamDestroy(self, stream: int) -> None:  # noqa: N802
        del self._streams[stream]

    def cudaStreamSynchronize(self, stream: int) -> None:  # noqa: N802
        assert stream in self._streams
        assert self._recording is None, "a recording stream cannot be waited for"
        while self._streams[stream]:
            self._streams[stream].popleft()()

    def cudaMalloc(self, size: int) -> Any:  # noqa: N802
        assert self._recording is None
        if sum(len(block) for block in self._device.values()) + size > self.memory:
            return Status.cudaErrorMemoryAllocation
        return self._keep(self._device, size)

    def cudaHostAlloc(self, size: int, flags: int) -> int:  # noqa: N802
        assert flags == self.cudaHostAllocDefault
        return self._keep(self._host, size)

    def _keep(self, where: dict[int, Any], size: int) -> int:
        assert size > 0
        block = (ctypes.c_char * size)(*(b"\xff" * 0))
        ctypes.memset(block, 0x7F, size)  # floats of 3.4e38: memory is never clean
        where[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def cudaFree(self, address: int) -> None:  # noqa: N802
        del self._device[address]

    def cudaFreeHost(self, address: int) -> None:  # noqa: N802
        del self._host[address]

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, size: int, kind: int, stream: int
    ) -> None:
        assert stream in self._streams
        assert self._recording is None
        into, out_of = (self._device, self._host) if kind == 1 else (self._host, self._device)
        assert size <= len(into[target])
        assert size <= len(out_of[source])
        self.copied.append(("in" if kind == 1 else "out", size))
        self._streams[stream].append(lambda: ctypes.memmove(target, source, size))

    def cudaMemcpy2DAsync(  # noqa: N802
        self,
        target: int,
        pitch: int,
        source: int,
        stride: int,
        row: int,
        rows: int,
        kind: int,
        stream: int,
    ) -> None:
        assert kind == 2
        assert row <= min(pitch, stride)
        assert rows * pitch <= len(self._host[target])
        block = next(b for b in self._device if b <= source < b + len(self._device[b]))
        assert source + (rows - 1) * stride + row <= block + len(self._device[block])
        self.copied.append(("out", row * rows))

        def copy() -> None:
            for i in range(rows):
                ctypes.memmove(target + i * pitch, source + i * stride, row)

        self._streams[stream].append(copy)

    def floats(self, address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array on the card."""
        block = self._device[address]
        count = int(np.prod(shape))
        assert 4 * count <= len(block)
        return np.frombuffer(block, np.float32, count).reshape(shape)

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Work on a stream: put off, or recorded."""
        assert stream in self._streams
        if self._recording is None:
            self._streams[stream].append(lambda: self._timed(work))
        else:
            self._recording.append(work)

    def _timed(self, work: Callable[[], None]) -> None:
        self.clock += 1
        work()

    @property
    def recording(self) -> bool:
        return self._recording is not None

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> None:  # noqa: N802
        assert stream in self._streams
        assert mode == 1
        assert self._recording is None
        self._recording = []

    def cudaStreamEndCapture(self, stream: int) -> int:  # noqa: N802
        assert self._recording is not None
        self._graphs[graph := self._handle()] = self._recording
        self._recording = None
        return graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        self._ready[ready := self._handle()] = self._graphs[graph]
        return ready

    def cudaGraphDestroy(self, graph: int) -> None:  # noqa: N802
        del self._graphs[graph]

    def cudaGraphExecDestroy(self, ready: int) -> None:  # noqa: N802
        del self._ready[ready]

    def cudaGraphLaunch(self, ready: int, stream: int) -> None:  # noqa: N802
        assert stream in self._streams
        for work in self._ready[ready]:
            self.submit(stream, work)

    def cudaEventCreate(self) -> int:  # noqa: N802
        self._events[event := self._handle()] = (0, None)
        return event

    def cudaEventDestroy(self, event: int) -> None:  # noqa: N802
        del self._events[event]

    def cudaEventRecord(self, event: int, stream: int) -> None:  # noqa: N802
        self._events[event] = (stream, None)

        def reached() -> None:
            self._events[event] = (stream, self.clock)

        self._streams[stream].append(reached)

    def cudaEventSynchronize(self, event: int) -> None:  # noqa: N802
        self._reach(event)

    def _reach(self, event: int) -> None:
        stream = self._events[event][0]
        assert stream, "an event that was never recorded"
        while self._events[event][1] is None:
            self._streams[stream].popleft()()

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:  # noqa: N802
        assert flags == 0
        self._streams[stream].append(lambda: self._reach(event))

    def cudaEventElapsedTime(self, start: int, stop: int) -> float:  # noqa: N802
        (_, first), (_, last) = self._events[start], self._events[stop]
        assert first is not None
        assert last is not None
        return last - first


def right(pixels: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """What the fake engine computes: every image by itself."""
    sums = pixels.astype(np.float64).sum(axis=(1, 2, 3))
    steps = np.arange(np.prod(SHAPES[name])).reshape(SHAPES[name])
    scale = sums.reshape(-1, *(1 for _ in SHAPES[name]))
    result: NDArray[np.float32] = (scale + steps).astype(np.float32)
    return result


class Context:
    """An ``IExecutionContext``."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._addresses, self._ran = engine, dict[str, int](), False
        self._batch = 0
        self.memory = (0, 0)
        self.nvtx_verbosity = "DETAILED"

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.batches
        self._batch = shape[0]
        return name == "pixel_values" and shape[1:] == (3, 8, 8) and least <= shape[0] <= most

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in SHAPES

    def infer_shapes(self) -> list[str]:
        return [name for name in SHAPES if name not in self._addresses]

    def execute_async_v3(self, stream: int) -> bool:
        engine, cudart = self._engine, self._engine.cudart
        assert self.memory[1] >= engine.device_memory_size_v2
        assert self.nvtx_verbosity == "NONE"
        if engine.refuses_capture and cudart.recording:
            return False
        assert self._ran or not cudart.recording, "what is put off cannot be recorded"
        self._ran = True
        engine.executed.append((self._batch, cudart.recording))
        batch, addresses = self._batch, dict(self._addresses)

        def work() -> None:
            pixels = cudart.floats(addresses["pixel_values"], (batch, 3, 8, 8))
            engine.padding.append(float(np.abs(pixels).sum(axis=(1, 2, 3))[-1]))
            for name in ("last_hidden_state", "pooler_output"):
                cudart.floats(addresses[name], (batch, *SHAPES[name]))[:] = right(pixels, name)

        cudart.submit(stream, work)
        return True


class Engine:
    """An ``ICudaEngine``.

    Attributes:
        batches: min, opt, max.
        dtypes: tensor name -> type, where it is not float32.
        refuses_capture: whether execution fails while a stream records.
        executed: (batch, whether recorded) of every call.
        padding: of every execution, the sum of the last image.
    """

    device_memory_size_v2 = 4096

    def __init__(self, cudart: Cudart, batches: tuple[int, int, int] = (1, 4, 6)) -> None:
        self.cudart, self.batches = cudart, batches
        self.dtypes: dict[str, str] = {}
        self.refuses_capture = self.refuses_context = False
        self.executed: list[tuple[int, bool]] = []
        self.padding: list[float] = []
        self.num_io_tensors = len(SHAPES)

    def get_tensor_name(self, index: int) -> str:
        return list(SHAPES)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name == "pixel_values" else "OUTPUT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *SHAPES[name])

    def get_tensor_dtype(self, name: str) -> str:
        return self.dtypes.get(name, "FLOAT")

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert (name, profile) == ("pixel_values", 0)
        return [(batch, 3, 8, 8) for batch in self.batches]

    def create_execution_context(self, strategy: str) -> Context | None:
        assert strategy == "USER_MANAGED"
        return None if self.refuses_context else Context(self)

    def create_engine_inspector(self) -> Any:
        text = '{"Layers": [{"Name": "_gemm_mha_v2", "Outputs": [{"Format/Datatype": "Half"}]}]}'
        return SimpleNamespace(get_engine_information=lambda kind: text)


def module(engines: dict[bytes, Engine]) -> Any:
    """The module ``tensorrt``: opens the plans in ``engines``."""
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = "11.4.0.0"
    trt.float32 = "FLOAT"
    trt.TensorIOMode = SimpleNamespace(INPUT="INPUT")
    trt.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
    trt.ProfilingVerbosity = SimpleNamespace(NONE="NONE")
    trt.LayerInformationFormat = SimpleNamespace(JSON="JSON")

    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        pass

    ILogger.Severity = Severity  # type: ignore[attr-defined]

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            if plan not in engines:
                self._logger.log(Severity.ERROR, "magic tag does not match")
            return engines.get(plan)

    trt.ILogger, trt.Runtime = ILogger, Runtime
    return trt
