"""The gRPC server: reads a call's message, has it answered, and says how it went.

Every call is taken as a stream of one message. On the wire that is the same; but so the key is
checked before anything is read, how many messages are read at a time is limited, and so is the
time that a client takes for one.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Self

import grpc
from google.protobuf.json_format import ParseDict

from regraft.serve.grpc import wire
from regraft.serve.grpc.messages import HEALTH, SERVICE, methods
from regraft.serve.grpc.methods import METHODS
from regraft.serve.grpc.request import parse
from regraft.serve.grpc.response import encode
from regraft.serve.refusals import INTERNAL_TEXT, Kind, Refusal, invalid
from regraft.serve.request_log import RequestLog
from regraft.serve.service import Call, Service

Context = Any  # grpc.aio.ServicerContext
Answer = Callable[[bytes, Context, Call], Awaitable[bytes]]
_READ_AT_A_TIME = 64  # messages; how large one is shows only once it is whole
_QUIET = 0.1  # seconds without a new call, while answers are held back
_LONGEST_HOLD = 1.0
_log = logging.getLogger("regraft.serve")


class GrpcServer:
    """A listening server.

    Attributes:
        port: that it listens on.
    """

    def __init__(self, server: Any, handlers: _Handlers, port: int) -> None:
        self._server = server
        self._handlers = handlers
        self.port = port

    @classmethod
    async def start(
        cls, service: Service, address: str, log: RequestLog | None = None
    ) -> Self | None:
        """Listens, in the running event loop.

        Args:
            service: what answers.
            address: ``host:port``; port 0 takes a free one.
            log: gets one line a call; None for none.

        Returns:
            None if the address cannot be listened on.
        """
        options = [
            ("grpc.max_receive_message_length", service.settings.limits.body),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # else two servers share a port, and neither says so
        ]
        server = grpc.aio.server(options=options)
        handlers = _Handlers(service, log)
        server.add_generic_rpc_handlers((handlers,))
        try:
            port = server.add_insecure_port(address)
        except RuntimeError:
            return None
        await server.start()
        return cls(server, handlers, port)

    async def stop(self, seconds: float) -> None:
        """Takes no more calls, and returns once the accepted ones are answered.

        gRPC drops calls that have arrived and were not handed to us at the moment it is stopped.
        So answers are held back for a moment: clients that wait for one begin nothing new, and
        learn together with it that they must go elsewhere.

        Args:
            seconds: after which calls that are not answered are cancelled.
        """
        self._handlers.hold_answers()
        await self._handlers.quiet()
        stopped = asyncio.create_task(self._server.stop(seconds))
        await asyncio.sleep(_QUIET)
        self._handlers.release_answers()
        await stopped

    async def abort(self) -> None:
        """Ends at once."""
        self._handlers.release_answers()
        await self._server.stop(0)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, service: Service, log: RequestLog | None) -> None:
        self._service = service
        self._log = log
        self._reading = asyncio.Semaphore(_READ_AT_A_TIME)
        self._may_answer = asyncio.Event()
        self._may_answer.set()
        self._last_call = 0.0
        key = service.settings.key
        self._key = None if key is None else f"Bearer {key}".encode()
        self._handlers = {
            f"/{path}/{name}": grpc.stream_unary_rpc_method_handler(partial(self._call, name))
            for path in (SERVICE, HEALTH)
            for name in methods(path)
        }
        self._answers: dict[str, Answer] = {
            name: partial(self._simple, name, *classes)
            for name, classes in {**methods(), **methods(HEALTH)}.items()
        }
        self._answers["ModelInfer"] = self._infer

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call, as gRPC asks for it; None where there is none of its name."""
        return self._handlers.get(handler_call_details.method)

    def hold_answers(self) -> None:
        """Calls are worked on, and their answers wait."""
        self._may_answer.clear()

    def release_answers(self) -> None:
        """Answers go out again."""
        self._may_answer.set()

    async def quiet(self) -> None:
        """Returns once no call has come for a moment."""
        until = time.perf_counter() + _LONGEST_HOLD
        await asyncio.sleep(_QUIET)
        while self._last_call + _QUIET > time.perf_counter() < until:
            await asyncio.sleep(_QUIET / 4)

    async def _call(self, name: str, _messages: object, context: Context) -> bytes:
        begun = self._last_call = time.perf_counter()
        call, received, reply = Call(), 0, b""
        refusal: Refusal | None = None
        status = "CANCELLED"
        try:
            if name == "ModelInfer" or not METHODS[name][1]:
                self._expect_key(context)
            async with self._message(context) as body:
                received = len(body)
                reply = await self._answers[name](body, context, call)
            status = "OK"
        except Refusal as refused:
            refusal, status = refused, refused.kind.grpc
        except Exception:
            _log.exception("%s failed", name)
            refusal = Refusal(Kind.INTERNAL, INTERNAL_TEXT)
            status = refusal.kind.grpc
        finally:
            if self._log is not None:
                seconds = time.perf_counter() - begun
                about = {"method": name, "status": status, "ms": round(seconds * 1e3, 3)}
                sizes = {"bytes_in": received, "bytes_out": len(reply)}
                peer = {"protocol": "grpc", "client": context.peer()}
                self._log.add({**peer, **about, **sizes, **call.to_json(), **_error(refusal)})
        await self._may_answer.wait()
        if refusal is not None:
            await context.abort(grpc.StatusCode[status], str(refusal))
        return reply

    def _expect_key(self, context: Context) -> None:
        if self._key is None:
            return
        given = dict(context.invocation_metadata()).get("authorization", "")
        given = given.encode() if isinstance(given, str) else given
        if not hmac.compare_digest(given, self._key):
            raise Refusal(
                Kind.UNAUTHENTICATED,
                "a key is needed; expected the metadata authorization: Bearer KEY",
            )

    @asynccontextmanager
    async def _message(self, context: Context) -> AsyncIterator[bytes]:
        """A call's one message; its memory counts until the block ends."""
        seconds = self._service.settings.limits.body_seconds
        try:
            async with self._reading, asyncio.timeout(seconds):
                body = await context.read()
        except TimeoutError:
            raise Refusal(
                Kind.SLOW_BODY, f"the request did not arrive within {seconds:g} seconds"
            ) from None
        if body is grpc.aio.EOF:  # also of one too large, which gRPC has refused by then
            raise invalid("the call has no message, or one that is too large")
        with self._service.bodies.hold(len(body)):
            yield body

    async def _simple(
        self, name: str, asked: Any, answered: Any, body: bytes, context: Context, call: Call
    ) -> bytes:
        limit = self._service.settings.limits.json
        if len(body) > limit:
            raise Refusal(Kind.TOO_LARGE, f"the request is larger than {limit} bytes")
        fields = await METHODS[name][0](self._service, wire.decode(asked, body))
        reply: bytes = ParseDict(dict(fields), answered()).SerializeToString()
        return reply

    async def _infer(self, body: bytes, context: Context, call: Call) -> bytes:
        limit = self._service.settings.limits.json
        given = await self._service.in_thread(lambda: wire.read(body, limit))
        name, version = given.message.model_name, given.message.model_version
        # The client's deadline needs nothing here: gRPC cancels the call when it has passed.
        return await self._service.infer(name, version, lambda: parse(given), encode, call)


def _error(refusal: Refusal | None) -> dict[str, str]:
    return {} if refusal is None else {"error": str(refusal)}
