"""Fields of a protobuf message, found in its bytes without parsing what is in them.

The wire format is documented at https://protobuf.dev/programming-guides/encoding/: a message is a
row of fields, each a tag (number and kind) followed by a number, 4 or 8 bytes, or a length and as
many bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


class Malformed(ValueError):  # noqa: N818 - said of the bytes
    """The bytes are no protobuf message, or end in the middle of one."""


@dataclass(frozen=True)
class Field:
    """One field of a message.

    Attributes:
        number: as in the schema.
        start: where its tag begins.
        body: where its content begins; for bytes, behind the length.
        end: where it ends.
        is_bytes: whether it is of the kind that has a length: a string, bytes, a message.
    """

    number: int
    start: int
    body: int
    end: int
    is_bytes: bool


def fields(data: mmap | bytes, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in ``data[start:end]``.

    Raises:
        Malformed: it is none, or is cut off.
    """
    position = start
    while position < end:
        tag, body = _varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise Malformed(f"byte {position} begins no field")
        if kind == _BYTES:
            length, body = _varint(data, body, end)
            stop = body + length
        elif kind == _VARINT:
            stop = _varint(data, body, end)[1]
        elif kind in (_EIGHT, _FOUR):
            stop = body + (8 if kind == _EIGHT else 4)
        else:
            raise Malformed(f"byte {position} begins a field of unknown kind {kind}")
        if stop > end:
            raise Malformed(f"the field at byte {position} ends {stop - end} bytes behind the end")
        yield Field(number, position, body, stop, kind == _BYTES)
        position = stop


def header(number: int, length: int) -> bytes:
    """Tag and length of a bytes field."""
    return _encoded(number << 3 | _BYTES) + _encoded(length)


def _encoded(value: int) -> bytes:
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


def _varint(data: mmap | bytes, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= end:
            raise Malformed("the message ends inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise Malformed(f"the number before byte {position} has more than ten bytes")
