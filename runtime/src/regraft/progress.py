"""A progress bar on stderr, drawn only where a person watches: when stderr is a terminal."""

from __future__ import annotations

import sys
import threading
import time
from typing import Self, TextIO

_WIDTH = 24  # characters of the bar
_INTERVAL = 0.1  # seconds between two drawings


class Progress:
    """Counts towards a total. A context manager; leaving it ends the line.

    ::

        with Progress(len(paths), "images", "scoring") as progress:
            for path in paths:
                progress.advance()
                progress.note(f"{path}: cannot be read")  # a line of its own, above the bar
    """

    def __init__(
        self, total: int | None, unit: str, label: str = "", stream: TextIO | None = None
    ) -> None:
        """Starts the clock.

        Args:
            total: how many there are; None if nobody knows.
            unit: what is counted, in the plural.
            label: what is being done.
            stream: where to draw; None for stderr.
        """
        self._total, self._unit, self._label = total, unit, label
        self._stream = sys.stderr if stream is None else stream
        self._watched = self._stream.isatty()
        self._done, self._skipped, self._started, self._drawn = 0, 0, time.monotonic(), 0.0

    def skip(self, count: int) -> None:
        """Counts ``count`` as done before the clock started."""
        self._done += count
        self._skipped += count

    def advance(self, count: int = 1) -> None:
        """Counts ``count`` more as done."""
        self._done += count
        if self._watched and time.monotonic() - self._drawn >= _INTERVAL:
            self._draw()

    def note(self, line: str) -> None:
        """Writes a line to stderr, watched or not, without disturbing the bar."""
        clear = "\r\x1b[K" if self._watched else ""
        self._stream.write(f"{clear}{line}\n")
        if self._watched:
            self._draw()

    def leave_out(self, reason: object) -> None:
        """Counts one as done that could not be read, and says why."""
        self.note(f"regraft: {reason}")
        self.advance()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._watched:
            self._draw()
            self._stream.write("\n")

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._stream.write(f"\r\x1b[K{self._text(self._drawn - self._started)}")
        self._stream.flush()

    def _text(self, seconds: float) -> str:
        rate = (self._done - self._skipped) / seconds if seconds > 0 else 0.0
        parts = [self._label] if self._label else []
        if self._total:
            filled = round(_WIDTH * min(1.0, self._done / self._total))
            parts.append(f"[{'#' * filled}{'.' * (_WIDTH - filled)}]")
            parts.append(f"{self._done}/{self._total} {self._unit}")
        else:
            parts.append(f"{self._done} {self._unit}")
        parts.append(f"{rate:.1f}/s")
        if self._total and rate and self._done < self._total:
            parts.append(f"{_clock((self._total - self._done) / rate)} left")
        return " ".join(parts)


class BuildBar:
    """A bar for each phase of an engine's build, one after the other. A context manager.

    Calling it is telling it: what is being done, steps done, steps in all (None if nobody knows).
    Threads may.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._bar: Progress | None = None
        self._phase, self._done = "", 0

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Draws, if a person watches."""
        with self._lock:
            if self._bar is None or phase != self._phase:
                self._end()
                self._bar, self._phase = Progress(total, "steps", phase, self._stream), phase
            self._bar.advance(done - self._done)
            self._done = done

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar, self._done = None, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._end()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
