"""The HTTP side of the protocol, as a plain ASGI application."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from regraft.serve.compression import inflate
from regraft.serve.http_body import ClientGone, Receive, unless_gone
from regraft.serve.http_exchange import JSON, Handler, Reply, Request
from regraft.serve.messages import InferRequest, InferResponse
from regraft.serve.refusals import INTERNAL_TEXT, Kind, Refusal, unavailable
from regraft.serve.request_log import RequestLog
from regraft.serve.rest_request import parse, parse_object
from regraft.serve.rest_response import HEADER_LENGTH, Binary, encode, to_json
from regraft.serve.service import Service

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_log = logging.getLogger("regraft.serve")
_MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"


class Application:
    """Routes requests to the service and turns what it says into HTTP.

    Args:
        service: what answers.
        log: gets one line a request; None for none.
    """

    def __init__(self, service: Service, log: RequestLog | None = None) -> None:
        self._service = service
        self._log = log
        key = service.settings.key
        self._key = None if key is None else f"Bearer {key}".encode()
        # Path -> method -> handler; those of health are open to everybody.
        self._routes: list[tuple[re.Pattern[str], str, Handler, bool]] = []
        self.add(
            (
                ("/v2", "GET", self._metadata, False),
                ("/v2/health/live", "GET", self._live, True),
                ("/v2/health/ready", "GET", self._ready, True),
                ("/v2/models/stats", "GET", self._all_statistics, False),
                (_MODEL, "GET", self._model_metadata, False),
                (_MODEL + "/ready", "GET", self._model_ready, True),
                (_MODEL + "/config", "GET", self._model_config, False),
                (_MODEL + "/stats", "GET", self._model_statistics, False),
                (_MODEL + "/infer", "POST", self._infer, False),
                ("/v2/repository/index", "POST", self._index, False),
                ("/v2/repository/models/(?P<model>[^/]+)/load", "POST", self._load, False),
                ("/v2/repository/models/(?P<model>[^/]+)/unload", "POST", self._unload, False),
                ("/metrics", "GET", self._metrics, False),
            )
        )

    def add(self, routes: Iterable[tuple[str, str, Handler, bool]]) -> None:
        """Adds routes: pattern of the path, method, handler, whether it needs no key."""
        self._routes += [
            (re.compile(path), method, handler, is_open)
            for path, method, handler, is_open in routes
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        begun = time.perf_counter()
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        request = Request(scope["method"], scope["path"], headers, receive)
        reply = Reply(499)  # what logs call a client that did not wait
        try:
            reply = await self._answer(request)
            await self._send(reply, request, send)
        except ClientGone:
            pass
        finally:
            if self._log is not None:
                self._log.write(scope, request, reply, time.perf_counter() - begun)

    async def _answer(self, request: Request) -> Reply:
        try:
            return await self._route(request)(request)
        except Refusal as refusal:
            return Reply.refused(refusal)
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return Reply.json({"error": INTERNAL_TEXT}, 500)

    def _route(self, request: Request) -> Handler:
        method = "GET" if request.method == "HEAD" else request.method
        allowed = []
        for path, verb, handler, is_open in self._routes:
            if match := path.fullmatch(request.path):
                if verb == method:
                    request.parts = {k: v for k, v in match.groupdict().items() if v}
                    if not is_open:
                        self._expect_key(request)
                    return handler
                allowed.append(verb)
        if allowed:
            return _fixed(
                Reply(
                    405,
                    to_json({"error": f"{request.method[:20]} is not allowed here"}),
                    (JSON, ("allow", ", ".join(sorted(set(allowed))))),
                )
            )
        raise Refusal(Kind.NOT_FOUND, "there is nothing at this path; see GET /v2")

    def _expect_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self._key is not None and not hmac.compare_digest(given, self._key):
            raise Refusal(
                Kind.UNAUTHENTICATED,
                "a key is needed; expected the header Authorization: Bearer KEY",
            )

    async def _send(self, reply: Reply, request: Request, send: Send) -> None:
        headers = [*reply.headers, ("content-length", str(len(reply.body)))]
        if self._service.draining:
            headers.append(("connection", "close"))
        raw = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers]
        await send({"type": "http.response.start", "status": reply.status, "headers": raw})
        await send({"type": "http.response.body", "body": reply.body})

    async def _metadata(self, request: Request) -> Reply:
        return Reply.json(self._service.metadata())

    async def _live(self, request: Request) -> Reply:
        return Reply()

    async def _ready(self, request: Request) -> Reply:
        if not self._service.ready:
            raise unavailable("the server is not ready")
        return Reply()

    async def _model_metadata(self, request: Request) -> Reply:
        return Reply.json(self._service.model_metadata(*request.model))

    async def _model_ready(self, request: Request) -> Reply:
        self._service.model_ready(*request.model)
        return Reply()

    async def _model_config(self, request: Request) -> Reply:
        return Reply.json(self._service.model_config(*request.model))

    async def _model_statistics(self, request: Request) -> Reply:
        return Reply.json(self._service.model_statistics(*request.model))

    async def _all_statistics(self, request: Request) -> Reply:
        return Reply.json(self._service.model_statistics())

    async def _metrics(self, request: Request) -> Reply:
        text = self._service.metrics().encode()
        return Reply(200, text, (("content-type", "text/plain; version=0.0.4; charset=utf-8"),))

    async def _index(self, request: Request) -> Reply:
        only_ready = (await self._object(request)).get("ready", False)
        return Reply.json(self._service.repository.index(only_ready is True))

    async def _load(self, request: Request) -> Reply:
        parameters = (await self._object(request)).get("parameters", {})
        await self._service.load(request.model[0], parameters)
        return Reply()

    async def _unload(self, request: Request) -> Reply:
        await self._object(request)
        await self._service.unload(request.model[0])
        return Reply()

    async def _object(self, request: Request) -> Mapping[str, Any]:
        async with self._service.bodies.read(request.receive, request.headers) as body:
            return parse_object(body)

    async def _infer(self, request: Request) -> Reply:
        self._service.repository.find(*request.model)  # before megabytes are read for nothing
        headers = request.headers
        async with self._service.bodies.read(request.receive, headers) as body:
            request.received = len(body)
            limits = self._service.settings.limits

            def decode() -> InferRequest:
                whole = inflate(body, headers.get("content-encoding", ""), limits.body)
                parsed = parse(whole, headers.get(HEADER_LENGTH), limits.json)
                Binary(parsed)  # what cannot be answered is not begun
                return parsed

            work = asyncio.ensure_future(
                self._service.infer(*request.model, decode, _to_reply, request.call)
            )
            return await unless_gone(work, request.receive)


def _to_reply(request: InferRequest, response: InferResponse) -> Reply:
    body, head = encode(response, Binary(request))
    if head is None:
        return Reply(200, body, (JSON,))
    kind = ("content-type", "application/octet-stream")
    return Reply(200, body, (kind, (HEADER_LENGTH, str(head))))


def _fixed(reply: Reply) -> Handler:
    async def handler(request: Request) -> Reply:
        return reply

    return handler
