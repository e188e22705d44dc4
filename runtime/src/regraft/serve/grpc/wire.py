"""An inference request's bytes: tensors in ``raw_input_contents`` apart from everything else.

Only everything else is left to protobuf. What a message may become in memory is many times its
bytes (an empty input takes two bytes, and about a hundred once parsed), so that part has a limit of
its own, as JSON has; the tensors are views of the bytes as they came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from regraft.serve.grpc.messages import message
from regraft.serve.refusals import Kind, Refusal, invalid

_REQUEST = message("ModelInferRequest")
_RAW: int = _REQUEST.DESCRIPTOR.fields_by_name["raw_input_contents"].number
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_FIELDS = 4096  # inputs, outputs and parameters together; far beyond any model's


@dataclass(frozen=True)
class InferMessage:
    """A ``ModelInferRequest``; ``raw`` is its ``raw_input_contents``, which ``message`` lacks."""

    message: Any
    raw: list[memoryview]


def read(body: bytes, max_rest: int) -> InferMessage:
    """Parses a request's bytes.

    Args:
        body: a serialized ``ModelInferRequest``.
        max_rest: bytes that everything but ``raw_input_contents`` may have.

    Raises:
        Refusal: it is no such message, or too large.
    """
    rest, raw = _split(memoryview(body))
    if len(rest) > max_rest:
        raise Refusal(
            Kind.TOO_LARGE,
            f"the request without raw_input_contents is larger than {max_rest} bytes; send "
            "tensors as raw_input_contents",
        )
    return InferMessage(decode(_REQUEST, rest), raw)


def decode(kind: Any, body: bytes) -> Any:
    """A message of any kind.

    Raises:
        Refusal: the bytes are no such message.
    """
    try:
        return kind.FromString(body)
    except (DecodeError, RecursionError):
        raise _malformed(kind.DESCRIPTOR.name) from None


def _split(body: memoryview) -> tuple[bytes, list[memoryview]]:
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    at = fields = 0
    while at < len(body):
        fields += 1
        if fields > _MAX_FIELDS:
            raise invalid(f"the request has more than {_MAX_FIELDS} fields; expected fewer")
        start = at
        tag, at = _varint(body, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, at = _varint(body, at)
        elif kind == _BYTES:
            size, at = _varint(body, at)
            begin, at = at, at + size
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:  # groups, which the protocol does not have
            raise _malformed()
        if at > len(body):
            raise _malformed()
        if number == _RAW and kind == _BYTES:
            raw.append(body[begin:at])
        else:
            rest.append(body[start:at])
    return b"".join(rest), raw


def _varint(body: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(body):
            break
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _malformed()


def _malformed(name: str = "ModelInferRequest") -> Refusal:
    return invalid(f"the request is not a {name} message")
