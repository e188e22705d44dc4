"""Copies between arrays in the host's memory, large ones by several threads.

One thread moves some 6 GB/s, and half of that into memory that is new to the process, whose pages
the kernel clears first; 64 images of a ViT are 38 MB in and as much back, which a card computes in
5 ms.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

MOST_THREADS = 4  # more gain little: memory is the limit, and other work wants the cores
SHARE = 2 << 20  # bytes that are worth a thread


class HostCopies:
    """Copies for one caller at a time."""

    def __init__(self, threads: int) -> None:
        """Starts no thread yet.

        Args:
            threads: how many may be used.
        """
        self._threads = min(threads, MOST_THREADS)
        self._pool: ThreadPoolExecutor | None = None

    def copy(self, target: Array, source: Array) -> None:
        """Copies ``source`` into ``target``, of the same shape, cut along the first axis."""
        parts = min(self._threads, source.nbytes // SHARE, len(source))
        if parts < 2:
            np.copyto(target, source)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="regraft-copy")
        bounds = [len(source) * i // parts for i in range(parts + 1)]
        (first, last), *others = pairwise(bounds)
        started: list[Future[None]] = []
        try:
            for a, b in others:
                started.append(self._pool.submit(np.copyto, target[a:b], source[a:b]))
            np.copyto(target[first:last], source[first:last])
        finally:  # an interrupted copy must not write to memory that is used again
            wait(started)
        for one in started:
            one.result()

    def copied(self, source: Array) -> Array:
        """A new array that holds the same."""
        target = np.empty_like(source)
        self.copy(target, source)
        return target

    def close(self) -> None:
        """Ends the threads; closing twice is allowed."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
