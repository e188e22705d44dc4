"""Who may call CUDA while a graph is recorded.

ONNX Runtime records in CUDA's global mode: until it is done, another thread that allocates, frees
or waits gets an error, and the recording is lost. At other times these calls disturb nobody.
Engines of one process share one gate.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


class Gate:
    """Runs pass together, and beside them who opens or closes an engine; who records is alone.

    Who waits to be alone goes before runs that come later. Not to be nested.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passing = {"runs": 0, "openings": 0}
        self._waiting = 0
        self._alone = False

    def together(self) -> AbstractContextManager[None]:
        """For a run, which records nothing."""
        return self._pass("runs")

    def opening(self) -> AbstractContextManager[None]:
        """For opening and closing an engine, which may take seconds."""
        return self._pass("openings")

    @contextmanager
    def _pass(self, kind: str) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not (self._alone or self._waiting))
            self._passing[kind] += 1
        try:
            yield
        finally:
            with self._changed:
                self._passing[kind] -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """For what records: true, and nobody else passes; or false where an engine is opened.

        Waiting for that would hold up all runs for as long.
        """
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(
                    lambda: (
                        not self._alone
                        and (self._passing["openings"] > 0 or self._passing["runs"] == 0)
                    )
                )
                got = self._alone = self._passing["openings"] == 0
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield got
        finally:
            if got:
                with self._changed:
                    self._alone = False
                    self._changed.notify_all()


GATE = Gate()
