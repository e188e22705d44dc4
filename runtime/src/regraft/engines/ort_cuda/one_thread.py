"""Work that has to stay on one thread.

ONNX Runtime's CUDA provider keeps its handles and its CUDA graphs per thread: a session that is run
from forty threads of a server would record every graph forty times.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class OneThread:
    """Runs work where it was created, until another thread asks; from then on on its own thread.

    So a process with one thread pays nothing for it, and there are never more than two.
    """

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._pool: ThreadPoolExecutor | None = None

    def call(self, work: Callable[[], Result]) -> Result:
        """Does the work and returns its result; calls must not overlap."""
        if self._pool is None and threading.get_ident() == self._owner:
            return work()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="regraft-ort-cuda")
        return self._pool.submit(work).result()

    def close(self) -> None:
        """Ends the thread, if there is one."""
        if self._pool is not None:
            self._pool.shutdown()
