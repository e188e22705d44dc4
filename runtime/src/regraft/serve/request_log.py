"""One JSON line a request on stdout, written by a thread of its own: a slow reader stops nobody."""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from regraft.serve.http_exchange import Reply, Request

_MOST = 10_000  # lines that wait for a slow reader; more are dropped
_PATIENCE = 5.0  # seconds for a reader to take what waits at the end

_log = logging.getLogger("regraft.serve")


class RequestLog:
    """A context manager; leaving it writes what waits, or warns that nobody reads it."""

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST)
        self._thread = threading.Thread(target=self._run, name="regraft-log", daemon=True)
        self._dropped = 0

    def __enter__(self) -> RequestLog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(queue.Full):
            self._lines.put(None, timeout=_PATIENCE)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            # The end, which waits there, too, counts for the line that cannot be written.
            lost = self._lines.qsize() + self._dropped
            _log.warning("nobody reads stdout: the last %d lines of --log-requests are lost", lost)

    def write(
        self, scope: Mapping[str, Any], request: Request, reply: Reply, seconds: float
    ) -> None:
        """Notes one HTTP request and its answer."""
        client = scope.get("client")
        self.add(
            {
                "protocol": "http",
                "client": client[0] if client else None,
                "method": request.method,
                "path": request.path,
                "status": reply.status,
                "ms": round(seconds * 1e3, 3),
                "bytes_in": request.received,
                "bytes_out": len(reply.body),
                **request.call.to_json(),
                **({"error": _error(reply.body)} if reply.status >= 400 else {}),
            }
        )

    def add(self, fields: Mapping[str, Any]) -> None:
        """Notes anything, with the time before it."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields})
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                if self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    sys.stdout.write(json.dumps({"dropped_lines": dropped}) + "\n")
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
            except OSError:  # the reader went away; the server stays
                pass


def _error(body: bytes) -> str | None:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(error)
