"""uvicorn's HTTP/1.1 on h11, with what it leaves out.

A request that is not HTTP is answered like every other error; a connection that does not get on
with its next request is closed; and at the end, connections that were made a moment ago may still
send the one request that their client has begun.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from regraft.serve.rest_response import to_json

_GRACE = 0.5  # seconds that a fresh connection has to send its request when the server ends


def protocol(header_seconds: float) -> type[H11Protocol]:
    """The class of connections.

    Args:
        header_seconds: how long one may take to send a request's header.
    """

    class Connection(H11Protocol):
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._patience is None:
                self._wait_for_request()

        def send_400_response(self, msg: str) -> None:
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            body = to_json({"error": msg})
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                for event in (
                    h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def shutdown(self) -> None:
            if self.cycle is None:
                self.loop.call_later(_GRACE, super().shutdown)
            else:
                super().shutdown()

        def _wait_for_request(self) -> None:
            self._patience = self.loop.call_later(header_seconds, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

    return Connection
