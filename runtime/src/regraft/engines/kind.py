"""What an engine's class says before a graph is opened: whether it runs here, and how it builds.

Nothing here needs an instance; :class:`regraft.engines.base.Engine` is the opened graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from regraft.engines.options import BuildOption, BuildOptions, BuildProgress
from regraft.errors import EngineError


class EngineKind(ABC):
    """A way to run graphs, such as a library on one kind of device.

    Attributes:
        name: as the command line names it, such as ``ort-cpu``.
        is_built: whether ``regraft build`` leaves something in the cache for it.
        has_device: whether it computes on a device of its own while the host goes on.
        has_clock: whether its device says how long it computes, see
            :meth:`regraft.engines.base.Engine.device_seconds`.
        variant: the form of a graph that it takes where a bundle has it, see
            :meth:`regraft.bundle.Bundle.variants`; None for the portable one.
        preferred_batch: images in a run from which on larger ones gain nothing; None where they do.
        build_options: what ``regraft build --option`` takes for it.
    """

    name: ClassVar[str]
    is_built: ClassVar[bool] = False
    has_device: ClassVar[bool] = False
    has_clock: ClassVar[bool] = False
    variant: ClassVar[str | None] = None
    preferred_batch: ClassVar[int | None] = None
    build_options: ClassVar[tuple[BuildOption, ...]] = ()

    @classmethod
    @abstractmethod
    def unavailable(cls, precision: str) -> str | None:
        """Why this engine cannot run here, and how to mend it; None if it can."""

    @classmethod
    def arithmetic(cls, precision: str, asked: str | None) -> str:
        """The precision in which a bundle is computed; it chooses the limits of the parity gate.

        Args:
            precision: of the bundle.
            asked: what the user wants; None for the bundle's.

        Raises:
            EngineError: this engine computes a bundle in its own precision, and no other.
        """
        if asked not in (None, precision):
            raise EngineError(
                f"{cls.name}: computes a bundle in its own precision, here {precision}; asked for "
                f"{asked}: export with --precision {asked}"
            )
        return precision

    @classmethod
    def must_be_built(cls, precision: str, graph: Path) -> bool:
        """Whether it can only open what :meth:`build` wrote for this graph."""
        return cls.is_built

    @classmethod
    def file_of(cls, graph: Path, variants: Mapping[str, Path]) -> Path:
        """The file that it takes of a graph."""
        return graph if cls.variant is None else variants.get(cls.variant, graph)

    @classmethod
    def environment(cls) -> tuple[str, str]:
        """Version of the library and name of the device, both part of the cache key.

        Only for engines with ``is_built``, and only where ``unavailable`` returns None.
        """
        raise NotImplementedError(f"{cls.name} needs no build")

    @classmethod
    def toolchain(cls, graph: Path) -> str:
        """What else a build of this graph depends on, for the cache key; most: nothing."""
        return ""

    @classmethod  # noqa: B027 - most options exclude nothing
    def check_build(cls, precision: str, options: BuildOptions) -> None:
        """Refuses build options that exclude each other, before anything is built.

        Raises:
            InputError: they do.
        """

    @classmethod
    def build(
        cls,
        graph: Path,
        precision: str,
        options: BuildOptions,
        folder: Path,
        progress: BuildProgress,
    ) -> dict[str, Any]:
        """Compiles a graph for this machine; only for engines with ``is_built``.

        Args:
            graph: the ONNX file, its external data beside it.
            precision: as :meth:`arithmetic` says.
            options: every one of ``build_options``, checked.
            folder: where to write; empty, and thrown away if this raises.
            progress: is told how far it is.

        Returns:
            What was built, as JSON values; kept in the cache entry and printed.

        Raises:
            EngineError: the library refuses the graph or the options.
        """
        raise NotImplementedError(f"{cls.name} needs no build")

    @classmethod
    def _foreign_errors(cls) -> tuple[type[Exception], ...]:
        """The exceptions by which the library behind this engine reports failure."""
        return (RuntimeError,)

    @classmethod
    @contextmanager
    def _failures(cls, action: str) -> Iterator[None]:
        """The one place where a library's exceptions become an EngineError."""
        try:
            yield
        except cls._foreign_errors() as error:
            raise EngineError(f"{cls.name}: {action} ({cls._reason(error)})") from error

    @classmethod
    def _reason(cls, error: Exception) -> str:
        """One line of a library's exception that tells the cause; most put it first."""
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
