"""Ctrl-C, SIGTERM (`docker stop`) and SIGHUP (a lost terminal) unwind the stack, so that outputs
are whole or none.

Not in the middle of an import: compiled modules of torch and onnx call Python while they are
loaded, from places where an exception ends the process (SIGABRT or SIGSEGV). There a signal waits
until the import is done.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_LONGEST = 10.0  # seconds that an import, such as a module of the user's, can put a signal off
_AGAIN = 0.05  # seconds until it is looked whether the import is done


class Signals:
    """The signals that came.

    Attributes:
        interrupt: whether Ctrl-C came: code that it interrupts may answer with an error of its own.
    """

    interrupt = False
    _waiting: int | None = None
    _alarm: Any = None  # the handler that was there before
    _armed = False
    _since = 0.0

    def settle(self) -> None:
        """Raises what still waits for an import.

        Raises:
            KeyboardInterrupt: Ctrl-C came.
            SystemExit: another signal came.
        """
        number, self._waiting = self._waiting, None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number is not None:
            raise SystemExit(128 + number)

    def disarm(self) -> None:
        """Gives the alarm back, if it was taken."""
        if self._armed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            _restore(signal.SIGALRM, self._alarm)
            self._armed = False

    def _came(self, number: int, frame: FrameType | None) -> None:
        self.interrupt |= number == signal.SIGINT
        if self._waiting is None:
            self._since = time.monotonic()
        self._waiting = number
        self._look(number, frame)

    def _look(self, number: int, frame: FrameType | None) -> None:
        early = time.monotonic() - self._since < _LONGEST
        if early and hasattr(signal, "setitimer") and _importing(frame):  # Windows has none
            # A thread that waits would need locks, which the interrupted code may hold. The alarm
            # is taken only now, when the program is about to end: it may be the caller's.
            if not self._armed:
                self._alarm, self._armed = signal.signal(signal.SIGALRM, self._look), True
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        else:
            self.settle()


@contextmanager
def unwinding() -> Iterator[Signals]:
    """Within it these signals raise KeyboardInterrupt (Ctrl-C) or SystemExit (128 + number)."""
    seen = Signals()
    wanted = [signal.SIGINT, signal.SIGTERM]
    wanted += [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # not on Windows
    before = {}
    try:
        for number in wanted:
            # Ctrl-C that somebody switched off (nohup, a shell's background job) stays off.
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, seen._came)
    except ValueError:  # not the main thread: whoever owns the process decides
        yield seen
        return
    try:
        yield seen
    finally:
        seen.disarm()
        for number, old in before.items():
            _restore(number, old)


def _restore(number: int, handler: Any) -> None:
    if handler is not None:  # None: it was not set from Python, and cannot be
        signal.signal(number, handler)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
