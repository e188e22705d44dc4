"""What the server answers when it does not do what was asked, the same for every transport."""

from __future__ import annotations

from enum import Enum

INTERNAL_TEXT = "internal error; the server's log has the details"


class Kind(Enum):
    """Why a request is refused: HTTP status, name of the gRPC status code, label in metrics."""

    INVALID = (400, "INVALID_ARGUMENT", "OTHER")
    UNAUTHENTICATED = (401, "UNAUTHENTICATED", "REJECTED")
    NOT_FOUND = (404, "NOT_FOUND", "OTHER")
    WRONG_METHOD = (405, "UNIMPLEMENTED", "OTHER")
    SLOW_BODY = (408, "DEADLINE_EXCEEDED", "REJECTED")
    TOO_LARGE = (413, "RESOURCE_EXHAUSTED", "REJECTED")
    UNKNOWN_ENCODING = (415, "INVALID_ARGUMENT", "OTHER")
    INTERNAL = (500, "INTERNAL", "BACKEND")
    UNSUPPORTED = (501, "UNIMPLEMENTED", "OTHER")
    UNAVAILABLE = (503, "UNAVAILABLE", "REJECTED")

    def __init__(self, http: int, grpc: str, reason: str) -> None:
        self.http = http
        self.grpc = grpc
        self.reason = reason


class Refusal(Exception):  # noqa: N818 - an answer, not an error of the server's
    """Ends a request with an answer; the message is one line for the client."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def invalid(message: str) -> Refusal:
    """The request itself is wrong; repeating it will not help."""
    return Refusal(Kind.INVALID, message)


def unavailable(message: str) -> Refusal:
    """Not now; the same request may succeed later or elsewhere."""
    return Refusal(Kind.UNAVAILABLE, message)
