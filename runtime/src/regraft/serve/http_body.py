"""Reading request bodies: never more than the limits, never longer than patience lasts.

And once one was read, noticing that its client went away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

from regraft.serve.refusals import Kind, Refusal, invalid, unavailable
from regraft.serve.settings import Limits

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Result = TypeVar("_Result")


class ClientGone(Exception):  # noqa: N818 - nobody is left to be told of an error
    """The client closed the connection before it had its answer."""


class Bodies:
    """All request bodies that are in memory, and how much of it they take."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def read(self, receive: Receive, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The body of one request; its memory counts until the block ends.

        Args:
            receive: of the ASGI application.
            headers: of the request, lower case.

        Raises:
            Refusal: it is too large, came too slowly, or the server holds too many.
            ClientGone: the connection ended before it.
        """
        self._refuse_announced(headers)
        parts: list[bytes] = []
        # A compressed body counts from the start as what it may become.
        encoded = headers.get("content-encoding", "identity") != "identity"
        size, reserved = 0, self._limits.body if encoded else 0
        self._held += reserved
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for part in _parts(receive):
                    self._held += len(part)
                    size += len(part)
                    parts.append(part)
                    self._refuse_size(size)
            body = b"".join(parts)
            parts.clear()
            yield body
        except TimeoutError:
            raise Refusal(
                Kind.SLOW_BODY,
                f"the body did not arrive within {self._limits.body_seconds:g} seconds",
            ) from None
        finally:
            self._held -= size + reserved

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Counts the memory of a body that something else read, until the block ends.

        Raises:
            Refusal: the server holds too many.
        """
        self._held += size
        try:
            if self._held > self._limits.bodies:
                raise _full()
            yield
        finally:
            self._held -= size

    def _refuse_announced(self, headers: Mapping[str, str]) -> None:
        text = headers.get("content-length", "0")
        if not text.isdecimal():
            raise invalid(f"Content-Length is {text[:40]!r}; expected a number")
        announced = int(text[:20])
        self._refuse_size(announced)
        if self._held + announced > self._limits.bodies:
            raise _full()

    def _refuse_size(self, size: int) -> None:
        if size > self._limits.body:
            raise Refusal(
                Kind.TOO_LARGE,
                f"the body is larger than {self._limits.body} bytes; send fewer images at a time",
            )
        if self._held > self._limits.bodies:
            raise _full()


def _full() -> Refusal:
    return unavailable("too many requests are being read; try again later")


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        if part := message.get("body", b""):
            yield part
        if not message.get("more_body", False):
            return


async def unless_gone(work: asyncio.Future[_Result], receive: Receive) -> _Result:
    """The result of ``work``, which is cancelled when the client goes away.

    Args:
        work: what the answer is made by; begun once the body was read.
        receive: of the ASGI application.

    Raises:
        ClientGone: it went away.
    """
    gone = asyncio.ensure_future(_until_gone(receive))
    both: set[asyncio.Future[Any]] = {work, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return work.result()
    finally:
        for task in both:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _until_gone(receive: Receive) -> None:
    """Returns when the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
