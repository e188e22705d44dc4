"""`regraft serve` in a process of its own, as benchmarks watch it."""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
PATIENCE = 120.0
# Where it listens, as it says itself: the ports of HTTP and, if there is one, of gRPC.
LISTENS = re.compile(r"on http://\S*:(\d+)(?: and grpc://\S*:(\d+))?\n")


class Served:
    """A running server.

    Attributes:
        port: of HTTP.
        grpc_port: of gRPC.
        start_seconds: from the command to its readiness.
    """

    def __init__(
        self, process: subprocess.Popen[str], port: int, grpc_port: int, start_seconds: float
    ) -> None:
        self.port, self.grpc_port, self.start_seconds = port, grpc_port, start_seconds
        self._process = process
        self._folder = Path("/proc") / str(process.pid)

    def memory_mb(self) -> float:
        """Resident memory, shared pages by share (PSS), in MB of 10^6 bytes."""
        text = (self._folder / "smaps_rollup").read_text()
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        assert found
        return int(found[1]) * 1024 / 1e6

    def open_files(self) -> int:
        """File descriptors."""
        return len(list((self._folder / "fd").iterdir()))

    def threads(self) -> int:
        """Threads."""
        return len(list((self._folder / "task").iterdir()))

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def get(self, path: str) -> bytes:
        """A GET; the body of its answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def stop(self) -> int:
        """Ends it by SIGTERM; the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(PATIENCE)


def command(*words: object, python: str | Path = sys.executable) -> list[str]:
    """The command that serves on a free port."""
    return [str(python), "-m", "regraft", "serve", *map(str, words), "--port", "0"]


@contextmanager
def serving(arguments: Sequence[str], log: Path) -> Iterator[Served]:
    """A server on free ports of 127.0.0.1, ready; what it says goes to ``log``."""
    words = command(*arguments, "--grpc-port", "0")
    begun = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(words, stderr=out, stdout=out, text=True)
    try:
        while not (found := LISTENS.search(log.read_text())):
            if process.poll() is not None or time.perf_counter() - begun > PATIENCE:
                raise SystemExit(f"the server did not start: {log.read_text()}")
            time.sleep(0.005)
        seconds = time.perf_counter() - begun
        yield Served(process, int(found[1]), int(found[2]), seconds)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)
