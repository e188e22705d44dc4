"""What an engine is: one graph, opened once, run many times.

:meth:`Engine.run` checks what goes in and names every failure. A new engine implements
``unavailable``, ``_open`` and ``_run``, and gets its row in :mod:`regraft.engines`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from regraft.errors import EngineError, InputError

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class EngineOptions:
    """How an engine may use the machine.

    Attributes:
        threads: threads inside one run; None takes the cores this process may use.
        spinning: whether threads wait busily between operators. It shortens a run that has the
            machine for itself and starves whatever shares the cores, such as image decoding.
        optimize: whether the engine may rewrite the graph; False is for finding out which of two
            optimisers is wrong.
    """

    threads: int | None = None
    spinning: bool = False
    optimize: bool = True

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}; expected at least 1")


class Engine(ABC):
    """One graph, ready to run. A context manager; closing it frees its memory.

    Threads may share an engine: runs are serialised by a lock.

    Attributes:
        name: as the command line names it, such as ``ort-cpu``.
        graph: the ONNX file it executes.
        precision: fp32, fp16 or bf16: of its weights and arithmetic.
        size: (H, W) of ``pixel_values``.
        outputs: output name -> shape, a string for a free axis.
    """

    name: ClassVar[str]
    graph: Path
    precision: str
    size: tuple[int, int]
    outputs: Mapping[str, Shape]

    def __init__(self, graph: Path, precision: str, options: EngineOptions) -> None:
        """Opens a graph.

        Args:
            graph: the ONNX file.
            precision: fp32, fp16 or bf16, as the manifest says.
            options: how it may use the machine.

        Raises:
            EngineError: it is not installed, cannot run this precision, or refuses the graph.
        """
        self.graph = graph
        self.precision = precision
        self._lock = threading.Lock()
        self._closed = False
        if reason := self.unavailable(precision):
            raise EngineError(f"{self.name}: {reason}")
        with self._failures(f"cannot open {graph.name}"):
            self.size, self.outputs = self._open(graph, options)

    @classmethod
    @abstractmethod
    def unavailable(cls, precision: str) -> str | None:
        """Why this engine cannot run here, and how to mend it; None if it can."""

    @abstractmethod
    def _open(
        self, graph: Path, options: EngineOptions
    ) -> tuple[tuple[int, int], dict[str, Shape]]:
        """Opens the graph; returns (H, W) of its input and its outputs' shapes."""

    @abstractmethod
    def _run(
        self, pixels: NDArray[np.float32], outputs: Sequence[str]
    ) -> Sequence[NDArray[np.float32]]:
        """Runs it on (B, 3, H, W) and returns the named outputs, in order, owned by the caller."""

    def _close(self) -> None:  # noqa: B027 - most engines have only Python objects to drop
        """Frees what the engine holds."""

    def details(self) -> dict[str, str]:
        """What a measurement must be read with: versions, threads, device."""
        return {}

    def _foreign_errors(self) -> tuple[type[Exception], ...]:
        """The exceptions by which the library behind this engine reports failure."""
        return (RuntimeError,)

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
        self._check_pixels(pixels)
        names = list(self.outputs) if outputs is None else list(outputs)
        if unknown := [name for name in names if name not in self.outputs]:
            raise EngineError(
                f"{self.name}: {self.graph.name} has no output {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(self.outputs)}"
            )
        with self._lock, self._failures(f"failed on {self.graph.name}, batch {len(pixels)}"):
            if self._closed:
                raise EngineError(f"{self.name}: is closed; open it again")
            arrays = self._run(np.ascontiguousarray(pixels), names)
        return dict(zip(names, arrays, strict=True))

    def close(self) -> None:
        """Waits for the run in progress, then frees the engine. Closing twice is allowed."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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

    @contextmanager
    def _failures(self, action: str) -> Iterator[None]:
        """The one place where a library's exceptions become an EngineError."""
        try:
            yield
        except self._foreign_errors() as error:
            reason = str(error).strip().splitlines()
            raise EngineError(
                f"{self.name}: {action} ({reason[0] if reason else type(error).__name__})"
            ) from error
