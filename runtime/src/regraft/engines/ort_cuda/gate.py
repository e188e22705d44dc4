"""Who may call CUDA while a graph is recorded.

ONNX Runtime records in CUDA's global mode: until it is done, another thread that allocates, frees
or waits gets an error, and the recording is lost. At other times these calls disturb nobody.
Engines of one process share one gate.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Many may pass together, or one alone; who waits to be alone goes first. Not to be nested."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passing = self._waiting = 0
        self._alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """For calls that record nothing: runs, and opening and closing, which may take seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._alone or self._waiting))
            self._passing += 1
        try:
            yield
        finally:
            with self._changed:
                self._passing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For what records."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not (self._alone or self._passing))
                self._alone = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


GATE = Gate()
