"""What the server itself fails at: one fixed text for the client, the details in the log."""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from tests.support.grpc_client import Client

from regraft.serve.grpc.server import GrpcServer
from regraft.serve.http_app import Application
from regraft.serve.repository import Repository
from regraft.serve.service import Service
from regraft.serve.settings import Settings

TOLD = "internal error; the server's log has the details"


def broken() -> Service:
    """A service that cannot say what it is; to be made in an event loop."""

    def fails() -> Any:
        raise RuntimeError("a secret path")

    service = Service(Repository([], Settings(), ThreadPoolExecutor(1)), Settings())
    service.metadata = fails  # type: ignore[method-assign]
    return service


def expect_logged(caplog: pytest.LogCaptureFixture, message: str) -> None:
    (record,) = (r for r in caplog.records if r.name == "regraft.serve")
    assert (record.levelno, record.getMessage()) == (logging.ERROR, message)
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "a secret path"


def test_over_http(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask() -> None:
        scope = {"type": "http", "method": "GET", "path": "/v2", "headers": []}
        await Application(broken())(scope, receive, send)

    asyncio.run(ask())
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"]) == {"error": TOLD}
    expect_logged(caplog, "GET /v2 failed")


def test_over_grpc(caplog: pytest.LogCaptureFixture) -> None:
    def call(port: int) -> grpc.RpcError:
        with Client(port) as client, pytest.raises(grpc.RpcError) as caught:
            client.ask("ServerMetadata")
        return caught.value

    async def ask() -> grpc.RpcError:
        server = await GrpcServer.start(broken(), "127.0.0.1:0")
        assert server is not None
        try:
            return await asyncio.to_thread(call, server.port)
        finally:
            await server.stop(5)

    error = asyncio.run(ask())
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, TOLD)
    expect_logged(caplog, "ServerMetadata failed")
