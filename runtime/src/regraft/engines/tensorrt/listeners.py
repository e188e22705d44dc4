"""TensorRT's log, routed to ``logging``, and its progress, routed to a callback.

Both classes derive from classes of ``tensorrt``, so they are made on first use.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

from regraft.engines.options import BuildProgress
from regraft.errors import EngineError

_log = logging.getLogger("regraft.tensorrt")
# Every failure of TensorRT repeats those beneath it; more would hide the first.
_SHOWN = 3
# What a build's progress is told at the end.
DONE = ("compiling", 100, 100)


class Logger(Protocol):
    """A ``tensorrt.ILogger`` that can be asked what went wrong."""

    def collecting(self) -> Any:
        """A context manager: the list of errors that are logged inside it, by any thread."""


@functools.cache
def logger() -> Logger:
    """The one logger of this process; TensorRT keeps the first that it is given."""
    import tensorrt as trt

    # Errors are not shown as they come: TensorRT logs some of attempts that it gives up, and those
    # that matter are in the EngineError.
    levels = {
        trt.ILogger.Severity.WARNING: logging.INFO,
        trt.ILogger.Severity.INFO: logging.DEBUG,
        trt.ILogger.Severity.VERBOSE: logging.DEBUG - 5,
    }

    class RoutedLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lock = threading.Lock()
            self._collected: list[list[str]] = []

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity)
            _log.log(logging.INFO if level is None else level, "%s", msg)
            if level is None:
                with self._lock:
                    for errors in self._collected:
                        errors.append(msg)

        @contextmanager
        def collecting(self) -> Iterator[list[str]]:
            errors: list[str] = []
            with self._lock:
                self._collected.append(errors)
            try:
                yield errors
            finally:
                with self._lock:
                    self._collected = [e for e in self._collected if e is not errors]

    return cast(Logger, RoutedLogger())


def failure(what: str, errors: list[str]) -> EngineError:
    """The error for something TensorRT refused, with the log lines that say why."""
    lines = dict.fromkeys(" ".join(error.split()) for error in errors)
    shown = list(lines)[:_SHOWN]
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    reason = f": {'; '.join(shown)}{more}" if shown else "; TensorRT gave no reason"
    return EngineError(f"tensorrt: {what}{reason}")


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Share:
    """How much of the nested phases of a build is done, from 0 to 1; it never goes back.

    Phases are named by TensorRT and differ between versions. One may end before its last step, and
    one of the same name may begin again.
    """

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._largest = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside the current step of its parent."""
        self._phases[name] = _Phase(parent, max(1, steps))

    def step(self, name: str, index: int) -> float:
        """Step ``index``, from 0, of a phase is done; returns the share."""
        phase = self._phases.get(name)
        if phase is None:
            return self._largest
        phase.done = min(index + 1, phase.steps)
        share = phase.done / phase.steps
        while phase.parent is not None and (above := self._phases.get(phase.parent)) is not None:
            share = min(above.done + share, above.steps) / above.steps
            phase = above
        self._largest = max(self._largest, share)
        return self._largest

    def finish(self, name: str) -> None:
        """A phase ends."""
        self._phases.pop(name, None)


class Monitor(Protocol):
    """A ``tensorrt.IProgressMonitor`` that remembers what stopped the build."""

    stopped_by: BaseException | None


def monitor(progress: BuildProgress) -> Monitor:
    """A progress monitor that tells ``progress`` how many hundredths are done.

    Keep a reference to it for as long as the build lasts: TensorRT keeps none.
    """
    import tensorrt as trt

    class RoutedMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped_by: BaseException | None = None
            self._share, self._lock = Share(), threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._share.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            # Anything but True ends the build. An exception cannot cross TensorRT (Ctrl-C arrives
            # here, too): it is kept, and raised by whoever started the build.
            try:
                with self._lock:
                    share = self._share.step(phase_name, step)
                phase, _, steps = DONE
                progress(phase, int(share * steps), steps)
            except BaseException as error:
                self.stopped_by = error
                return False
            return True

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._share.finish(phase_name)

    return cast(Monitor, RoutedMonitor())
