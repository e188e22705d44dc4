"""The engine ``ort-cuda``: every node on the card, or an error that says which is not."""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.engines.base import Engine
from regraft.engines.cores import usable_cores
from regraft.engines.cuda_runtime import Cuda
from regraft.engines.options import BuildOptions, BuildProgress, EngineOptions, Shape
from regraft.engines.ort_cpu import ort_errors
from regraft.engines.ort_cuda.gate import GATE
from regraft.engines.ort_cuda.one_thread import OneThread
from regraft.engines.ort_cuda.operators import (
    LEAST_CAPABILITY,
    LIBRARY,
    compile_library,
    cublas_packages,
    needs_operators,
    source_sha256,
    timed_products,
)
from regraft.engines.ort_cuda.remedies import LIBRARIES, remedy, what_is_missing
from regraft.engines.ort_cuda.runner import SIZES, Runner, is_full
from regraft.engines.ort_cuda.session import PROVIDER, open_session, ports
from regraft.engines.parts import parts_of, shapes_of
from regraft.errors import EngineError
from regraft.manifest import INPUT

_log = logging.getLogger("regraft")


class OrtCudaEngine(Engine):
    """Runs a graph with onnxruntime's CUDAExecutionProvider and no other."""

    name = "ort-cuda"
    is_built = True  # `regraft build` leaves a verdict; there is nothing to compile
    variant = "cuda"
    has_device = True
    has_clock = True
    _runner: Runner | None = None
    _thread: OneThread

    @classmethod
    def unavailable(cls, precision: str) -> str | None:
        """Why it cannot run here: a package, the driver or the card is missing."""
        return what_is_missing(cls.name)

    @classmethod
    def must_be_built(cls, precision: str, graph: Path) -> bool:
        """A bf16 graph was verified nowhere: no CPU runs it; and operators must be compiled."""
        return precision == "bf16" or needs_operators(graph)

    @classmethod
    def toolchain(cls, graph: Path) -> str:
        """The operators' sources and cuBLAS as installed by pip, where the graph needs them."""
        if not needs_operators(graph):
            return ""
        parts = (f"operators {source_sha256()[:16]}", cublas_packages())
        return "".join(f", {part}" for part in parts if part)

    @classmethod
    def environment(cls) -> tuple[str, str]:
        """Version of onnxruntime; name, compute capability and driver of the card."""
        ort = importlib.import_module("onnxruntime")
        return str(ort.__version__), str(Cuda(engine=cls.name).card())

    @classmethod
    def build(
        cls,
        graph: Path,
        precision: str,
        options: BuildOptions,
        folder: Path,
        progress: BuildProgress,
    ) -> dict[str, Any]:
        """Warms the graph up; the verdict of the parity gate is what the cache keeps."""
        operators: dict[str, Any] = {}
        if needs_operators(graph):
            card = Cuda(engine=cls.name).card()
            if int(card.capability) < LEAST_CAPABILITY:
                raise EngineError(
                    f"{cls.name}: regraft's CUDA operators need a card of compute capability "
                    f"{LEAST_CAPABILITY} (Ampere) or later, this one has {card.capability}; export "
                    "without --cuda-operators"
                )
            progress("compiling CUDA operators", 0, 1)
            operators = {"operators": compile_library(folder)}
            progress("compiling CUDA operators", 1, 1)
            cls._time_products(graph, precision, folder, str(card), progress)
        progress(f"warming {graph.name}", 0, 1)
        with cls(graph, precision, EngineOptions(), folder) as engine:
            pixels = np.zeros((1, 3, *engine.size), np.float32)
            for _ in range(2):  # the second run replays the CUDA graph of the first
                engine.run(pixels)
        progress(f"warming {graph.name}", 1, 1)
        version, device = cls.environment()
        return {
            "graph": graph.name,
            "version": version,
            "device": device,
            "precision": precision,
            **operators,
        }

    @classmethod
    def _time_products(
        cls, graph: Path, precision: str, folder: Path, card: str, progress: BuildProgress
    ) -> None:
        """Runs every batch that is executed once, without CUDA graphs, which cannot be timed in."""
        drawn = np.random.default_rng(0)
        with (
            timed_products(folder, card),
            cls(graph, precision, EngineOptions(optimize=False), folder) as engine,
        ):
            for done, size in enumerate(SIZES):
                progress("timing products", done, len(SIZES))
                try:
                    engine.run(drawn.normal(size=(size, 3, *engine.size)).astype(np.float32))
                except EngineError as error:
                    if done == 0 or not is_full(error):
                        raise
                    _log.warning(
                        "ort-cuda: the card has too little free memory for batches of %d; their "
                        "products are not timed",
                        size,
                    )
                    break
        progress("timing products", len(SIZES), len(SIZES))

    def _open(
        self, graph: Path, options: EngineOptions
    ) -> tuple[tuple[int, int], dict[str, Shape]]:
        ort = importlib.import_module("onnxruntime")
        ort.disable_telemetry_events()  # nobody asked for any
        ort.set_default_logger_severity(3)  # it warns that its providers are not plug-ins
        if not graph.name.endswith(".cuda.onnx"):
            _log.warning(
                "ort-cuda: %s was exported without a graph for CUDA (see `regraft inspect`); "
                "runs the portable one, more slowly",
                graph.name,
            )
        said = io.StringIO()
        with redirect_stdout(said):  # it prints what it cannot load; answers go to stdout
            ort.preload_dlls()
        with GATE.opening():
            return self._open_session(ort, graph, options, said.getvalue())

    def _open_session(
        self, ort: Any, graph: Path, options: EngineOptions, said: str
    ) -> tuple[tuple[int, int], dict[str, Shape]]:
        cuda = Cuda(engine=self.name)
        session: Any = None
        stream = cuda.stream()
        try:
            session = open_session(ort, graph, int(stream), options, self._library(graph))
            if PROVIDER not in session.get_providers():
                hints = " ".join(said.split()) or "see the log of onnxruntime"
                raise EngineError(
                    f"{self.name}: the libraries of CUDA or cuDNN cannot be loaded ({hints}); "
                    f"pip install {LIBRARIES}"
                )
            size, outputs = ports(session, graph)
            parts = parts_of(session.get_modelmeta().custom_metadata_map, outputs)
        except BaseException:
            session = None  # before the stream it runs on
            cuda.release("cudaStreamDestroy", stream)
            raise
        inner = {name: tuple(int(n) for n in shape[1:]) for name, shape in outputs.items()}
        self._thread = OneThread()
        self._runner = Runner(
            *(session, ort, cuda, stream, {INPUT: (3, *size), **inner}, parts),
            graphs=options.optimize,
            threads=options.threads or usable_cores(),
        )
        return size, shapes_of(outputs, parts)

    def _library(self, graph: Path) -> Path | None:
        if not needs_operators(graph):
            return None
        if self.built is None:
            raise EngineError(
                f"{self.name}: {graph.name} has CUDA operators of regraft's own, which are not "
                f"compiled; run: regraft build {graph.parent} --engine {self.name} --images DIR"
            )
        return self.built / LIBRARY

    def _run(
        self, pixels: NDArray[np.float32], outputs: Sequence[str]
    ) -> Sequence[NDArray[np.float32]]:
        return self._start(pixels, outputs)()

    def _start(
        self, pixels: NDArray[np.float32], outputs: Sequence[str]
    ) -> Callable[[], Sequence[NDArray[np.float32]]]:
        runner, thread = self._runner, self._thread
        assert runner is not None  # open, as the caller made sure
        started = thread.call(lambda: runner.start(pixels, outputs))
        return lambda: thread.call(lambda: runner.finish(started))

    def _device_seconds(self, batch: int, runs: int) -> float:
        runner = self._runner
        assert runner is not None  # open, as the caller made sure
        return self._thread.call(lambda: runner.device_seconds(batch, runs))

    def details(self) -> dict[str, str]:
        """Version of onnxruntime, card, graph, batches executed, and whether as CUDA graphs."""
        version, card = self.environment()
        runner = self._runner
        return {
            "onnxruntime": version,
            "device": card,
            "graph": self.graph.name,
            "batches": "" if runner is None else ",".join(map(str, SIZES)),
            "cuda graphs": "yes" if runner is not None and runner.graphs else "no",
        }

    def _close(self) -> None:
        if self._runner is not None:
            # Behind what an interrupted caller left running, which still uses its memory.
            self._thread.call(self._runner.close)
            self._thread.close()
        self._runner = None

    @classmethod
    def _foreign_errors(cls) -> tuple[type[Exception], ...]:
        return (*ort_errors(), ValueError)

    @classmethod
    def _reason(cls, error: Exception) -> str:
        reason, advice = super()._reason(error), remedy(str(error))
        return reason if advice is None else f"{reason}; {advice}"
