"""The whole server in this process without sockets, for fuzzing: any bytes in, a decent answer out.

Everything is real (routes, parsers, checks, decoding, batcher) but the engine, which gives zeros.
Needs numpy, Pillow, uvicorn, grpcio and protobuf alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np

from regraft.bundle import Bundle
from regraft.manifest import Manifest
from regraft.preprocessing import Preprocessing
from regraft.redirect import RedirectOptions
from regraft.rewrite_counts import Sites
from regraft.serve.grpc.server import _Handlers
from regraft.serve.http_app import Application
from regraft.serve.model import Model
from regraft.serve.repository import Repository
from regraft.serve.service import Service
from regraft.serve.settings import Limits, Settings
from regraft.tokens import TokenLayout

SIZE = 2
HTTP_STATUSES = {200, 400, 401, 404, 405, 408, 413, 415, 503}
GRPC_STATUSES = {
    *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAVAILABLE"),
    *("UNIMPLEMENTED", "DEADLINE_EXCEEDED"),
}
_SHAPES: dict[str, tuple[int | str, ...]] = {"a": ("batch", 2, 3), "pooler_output": ("batch", 3)}
_MANIFEST = Manifest(
    model={"source": "python:small.py:small", "architecture": "Small", "weights_sha256": "0"},
    preprocessing=Preprocessing(
        image_size=(SIZE, SIZE),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        resize="exact",
        resize_size=(SIZE, SIZE),
    ),
    tokens=TokenLayout(True, 1, (1, 1), 3, depth=1, heads=1),
    redirect=RedirectOptions(),
    layers=(0,),
    detection_layer=0,
    threshold=1.0,
    outputs=_SHAPES,
    precision="fp32",
    opset=17,
    sites=Sites(token=1, redirect=1, output=1),
    graphs={"model": "model.onnx"},
)


class Insane(Exception):  # noqa: N818 - what fuzzing looks for
    """The server answered what it never should."""


class Target:
    """A server with one model, ``m`` (and ``m_images``)."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._raising = _Raising()
        logging.getLogger("regraft.serve").addHandler(self._raising)
        self._loop.run_until_complete(self._start())

    async def _start(self) -> None:
        limits = Limits(body=1 << 20, json=1 << 18, pixels=1 << 16)
        settings = Settings(limits=limits, workers=1)
        pool = ThreadPoolExecutor(1)
        repository = self._repository = Repository(["m=."], settings, pool)
        engine: Any = SimpleNamespace(
            name="zeros",
            precision="fp32",
            preferred_batch=None,
            run=_zeros,
            close=lambda: None,
        )
        model = Model("m", "1", Bundle(Path(), _MANIFEST), engine, settings, pool)
        repository._replace(repository._entries["m"], {"1": model}, "")
        service = Service(repository, settings)
        self._app = Application(service)
        self._handlers = _Handlers(service, None)

    def close(self) -> None:
        """Ends it."""
        self._loop.run_until_complete(self._repository.close())
        self._loop.close()
        logging.getLogger("regraft.serve").removeHandler(self._raising)

    def http(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> int:
        """Status of a request.

        Raises:
            Insane: it is none that a client's bytes may cause, or the answer is not as promised.
        """
        status, answer = self._loop.run_until_complete(self._http(method, path, headers, body))
        if status not in HTTP_STATUSES:
            raise Insane(f"HTTP {status}: {answer[:500]!r}")
        if status >= 400 and not _is_error(answer):
            raise Insane(f"HTTP {status}, but no error object: {answer[:500]!r}")
        return status

    def grpc(self, method: str, body: bytes) -> str:
        """Status of a call.

        Raises:
            Insane: it is none that a client's bytes may cause, or comes without a message.
        """
        context = _Context(body)
        try:
            self._loop.run_until_complete(self._handlers._call(method, None, context))
            return "OK"
        except _Aborted as aborted:
            status, details = aborted.args
        if status not in GRPC_STATUSES or not details or not details.isprintable():
            raise Insane(f"gRPC {status}: {details[:500]}")
        return str(status)

    async def _http(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, bytes]:
        sent: list[Mapping[str, Any]] = []
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        async with asyncio.timeout(20):
            await self._app(scope, receive, send)
        return sent[0]["status"], sent[1]["body"]


class _Aborted(Exception):  # noqa: N818 - as gRPC's own
    pass


class _Context:
    def __init__(self, body: bytes) -> None:
        self._body = body

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def read(self) -> bytes:
        return self._body

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise _Aborted(code.name, details)


class _Raising(logging.Handler):
    """What the server logs as failed is what is looked for."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            raise Insane(record.getMessage()) from record.exc_info[1]


def _zeros(pixels: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    assert pixels.dtype == np.float32
    assert pixels.shape[1:] == (3, SIZE, SIZE)
    assert np.isfinite(pixels).all()
    return {n: np.zeros((len(pixels), *_SHAPES[n][1:]), np.float32) for n in outputs}


def _is_error(body: bytes) -> bool:
    document = json.loads(body)
    return list(document) == ["error"] and bool(document["error"])
