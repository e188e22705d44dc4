"""An HTTP request on its way through the application, and the reply that it gets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from regraft.serve.http_body import Receive
from regraft.serve.refusals import Kind, Refusal
from regraft.serve.rest_response import to_json
from regraft.serve.service import Call

JSON = ("content-type", "application/json")


@dataclass(frozen=True)
class Reply:
    """An HTTP response."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def json(cls, value: object, status: int = 200) -> Reply:
        """One with a JSON body."""
        return cls(status, to_json(value), (JSON,))

    @classmethod
    def refused(cls, refusal: Refusal) -> Reply:
        """What a refused request gets: its status and the error, and what clients do about it."""
        headers: tuple[tuple[str, str], ...] = (JSON,)
        if refusal.kind is Kind.UNAVAILABLE:
            headers += (("retry-after", "1"),)
        elif refusal.kind is Kind.UNAUTHENTICATED:
            headers += (("www-authenticate", "Bearer"),)
        return cls(refusal.kind.http, to_json({"error": str(refusal)}), headers)


@dataclass
class Request:
    """An HTTP request on its way through the application.

    Attributes:
        headers: names in lower case.
        receive: of the ASGI application; gives the body.
        parts: what the pattern of its route found in the path.
        call: collects for the log.
        received: bytes of the body.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    receive: Receive
    parts: Mapping[str, str] = field(default_factory=dict)
    call: Call = field(default_factory=Call)
    received: int = 0

    @property
    def model(self) -> tuple[str, str]:
        """Name and version in the path; an empty version if it names none."""
        return self.parts["model"], self.parts.get("version") or ""


Handler = Callable[[Request], Awaitable[Reply]]
