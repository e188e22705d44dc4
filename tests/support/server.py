"""`regraft serve` in a process of its own, and requests to it with the standard library alone."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.oip import http_arrays, http_document
from benchmarks.served import LISTENS, command

PATIENCE = 60.0


@dataclass
class Reply:
    """An HTTP answer; ``arrays`` are its outputs, JSON or binary."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return http_document(self.headers, self.body)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return http_arrays(self.headers, self.body)


class Server:
    """A running server; ``grpc_port`` is 0 where there is none."""

    def __init__(self, process: subprocess.Popen[str], port: int, grpc_port: int) -> None:
        self.process = process
        self.port = port
        self.grpc_port = grpc_port
        self.lines: list[str] = []
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own; a dict or list is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            data = json.dumps(body) if isinstance(body, dict | list) else body
            connection.request(method, path, data, dict(headers or {}))
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, named, answer.read())
        finally:
            connection.close()

    def infer(self, model: str, body: Any, **headers: str) -> Reply:
        """An inference request."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", f"/v2/models/{model}/infer", body, names)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends it; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@contextmanager
def serving(
    *words: object, python: str | Path = sys.executable, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A server on a free port, ready; with ``--grpc-port 0`` on another one as well."""
    process = subprocess.Popen(
        command(*words, python=python),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=env,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = LISTENS.search(line)
        assert found, line + process.stderr.read()
        yield Server(process, int(found[1]), int(found[2] or 0))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)
        process.stdout.close()  # type: ignore[union-attr]


def tensor(pixels: np.ndarray, name: str = "pixel_values") -> dict[str, Any]:
    """An input as JSON."""
    return {
        "name": name,
        "shape": list(pixels.shape),
        "datatype": "FP32",
        "data": pixels.ravel().tolist(),
    }
