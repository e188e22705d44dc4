"""What an engine is: one graph, opened once, run many times.

:meth:`Engine.run` checks what goes in and names every failure. A new engine implements
``unavailable``, ``_open`` and ``_run``, and gets its row in :mod:`regraft.engines`. One that is
compiled ahead of time sets ``is_built`` and implements ``environment`` and ``build`` besides. What
belongs to its class rather than to an opened graph is in :mod:`regraft.engines.kind`.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from regraft.engines.kind import EngineKind
from regraft.engines.options import EngineOptions, Shape
from regraft.errors import EngineError, InputError


class Engine(EngineKind):
    """One graph, ready to run. A context manager; closing it frees its memory.

    Threads may share an engine: runs are serialised by a lock.

    Attributes:
        graph: the ONNX file it executes.
        precision: fp32, fp16 or bf16: of its weights and arithmetic.
        size: (H, W) of ``pixel_values``.
        outputs: output name -> shape, a string for a free axis.
        built: folder of files that :meth:`build` wrote; None for engines that are not built.
    """

    graph: Path
    precision: str
    size: tuple[int, int]
    outputs: Mapping[str, Shape]
    built: Path | None

    def __init__(
        self, graph: Path, precision: str, options: EngineOptions, built: Path | None = None
    ) -> None:
        """Opens a graph.

        Args:
            graph: the ONNX file.
            precision: fp32, fp16 or bf16, as :meth:`arithmetic` says.
            options: how it may use the machine.
            built: what :meth:`build` wrote for this graph and precision; needed where
                :meth:`must_be_built`. :func:`regraft.engines.open_engine` takes it from the cache.

        Raises:
            EngineError: it is not installed, cannot run this precision, or refuses the graph.
        """
        self.graph = graph
        self.precision = precision
        self.built = built
        self._lock = threading.Lock()
        self._closed = False
        if reason := self.unavailable(precision):
            raise EngineError(f"{self.name}: {reason}")
        with self._failures(f"cannot open {graph.name}"):
            self.size, self.outputs = self._open(graph, options)

    @abstractmethod
    def _open(
        self, graph: Path, options: EngineOptions
    ) -> tuple[tuple[int, int], dict[str, Shape]]:
        """Opens the graph, or ``self.built``; returns (H, W) of its input and outputs' shapes."""

    @abstractmethod
    def _run(
        self, pixels: NDArray[np.float32], outputs: Sequence[str]
    ) -> Sequence[NDArray[np.float32]]:
        """Runs it on (B, 3, H, W) and returns the named outputs, in order, owned by the caller."""

    def _close(self) -> None:
        """Frees what the engine holds; most have only Python objects to drop."""

    def details(self) -> dict[str, str]:
        """What a measurement must be read with: versions, threads, device."""
        return {}

    def run(
        self, pixels: NDArray[np.float32], outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Runs the graph on one batch.

        Args:
            pixels: preprocessed images of shape (B, 3, H, W), float32, B at least 1.
            outputs: names of the outputs wanted; None for all.

        Returns:
            Output name -> float32 array, owned by the caller.

        Raises:
            InputError: the pixels have another dtype or shape.
            EngineError: an output does not exist, the engine is closed, or the run failed.
        """
        names = self._names(pixels, outputs)
        with self._lock, self._failures(f"failed on {self.graph.name}, batch {len(pixels)}"):
            self._check_open()
            arrays = self._run(np.ascontiguousarray(pixels), names)
        return dict(zip(names, arrays, strict=True))

    def start(
        self, pixels: NDArray[np.float32], outputs: Sequence[str] | None = None
    ) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begins a run, and returns what waits for it.

        An engine with a device of its own copies a batch to it and another back while it computes;
        two batches may be on their way, a third waits for the first. Other engines are done when
        this returns. Arguments, errors and result are those of :meth:`run`; ``pixels`` may be
        changed afterwards.
        """
        names = self._names(pixels, outputs)
        what = f"failed on {self.graph.name}, batch {len(pixels)}"
        with self._lock, self._failures(what):
            self._check_open()
            wait = self._start(np.ascontiguousarray(pixels), names)

        def finish() -> dict[str, NDArray[np.float32]]:
            with self._lock, self._failures(what):
                self._check_open()
                return dict(zip(names, wait(), strict=True))

        return finish

    def _start(
        self, pixels: NDArray[np.float32], outputs: Sequence[str]
    ) -> Callable[[], Sequence[NDArray[np.float32]]]:
        """As :meth:`_run`, but returns what waits for the outputs."""
        arrays = self._run(pixels, outputs)
        return lambda: arrays

    def _names(self, pixels: Any, outputs: Sequence[str] | None) -> list[str]:
        """The names of the outputs, once they and the pixels have been checked."""
        self._check_pixels(pixels)
        names = list(self.outputs) if outputs is None else list(outputs)
        if unknown := [name for name in names if name not in self.outputs]:
            raise EngineError(
                f"{self.name}: {self.graph.name} has no output {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(self.outputs)}"
            )
        return names

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"{self.name}: is closed; open it again")

    def device_seconds(self, batch: int, runs: int = 1) -> float:
        """How long the device computes, by its own clock; nothing is copied to it or from it.

        It computes what its buffers hold: run a batch of that size first, and a few times, so that
        nothing is prepared within the time.

        Args:
            batch: images in a run; where the engine pads or cuts it, what it then computes counts.
            runs: runs in a row, so that the time it takes to start one is hidden.

        Returns:
            Seconds per run.

        Raises:
            EngineError: not :attr:`has_clock`, the engine is closed, or the run failed.
        """
        with self._lock, self._failures(f"failed on {self.graph.name}, batch {batch}"):
            self._check_open()
            return self._device_seconds(batch, runs)

    def _device_seconds(self, batch: int, runs: int) -> float:
        raise EngineError(f"{self.name}: has no device with a clock of its own; time run() instead")

    def close(self) -> None:
        """Waits for the run in progress, then frees the engine. Closing twice is allowed."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_pixels(self, pixels: Any) -> None:
        expected = f"float32 of shape (B, 3, {self.size[0]}, {self.size[1]}), B at least 1"
        if not isinstance(pixels, np.ndarray):
            raise InputError(f"pixel_values: got {type(pixels).__name__}; expected {expected}")
        wrong = pixels.ndim != 4 or pixels.shape[1:] != (3, *self.size) or len(pixels) == 0
        if wrong or pixels.dtype != np.float32:
            raise InputError(
                f"pixel_values: got {pixels.dtype} of shape {pixels.shape}; expected {expected}"
            )
