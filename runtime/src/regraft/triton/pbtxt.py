"""Writes protobuf's text format, as ``config.pbtxt`` of a Triton model needs it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias, Union

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Word(str):
    """A name of an enumeration, which the text format does not quote."""


Scalar: TypeAlias = str | Word | bool | int | float
Value: TypeAlias = Union[Scalar, "Message", Sequence[Scalar], Sequence["Message"]]
Message: TypeAlias = Mapping[str, Value]


def text(message: Message) -> str:
    """A message as text.

    Args:
        message: field name -> scalar, message, or a sequence of either for a repeated field. A map
            field is a sequence of messages with ``key`` and ``value``.

    Raises:
        TypeError: a value is none of these.
        ValueError: a number is not finite.
    """
    return "".join(f"{line}\n" for line in _lines(message, ""))


def _lines(message: Message, indent: str) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield from _block(name, value, indent)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            items = list(value)
            if any(isinstance(item, Mapping) for item in items):
                for item in items:
                    if not isinstance(item, Mapping):
                        raise TypeError(f"{name}: messages and scalars are mixed")
                    yield from _block(name, item, indent)
            elif items:
                yield f"{indent}{name}: [{', '.join(_scalar(name, item) for item in items)}]"
        else:
            yield f"{indent}{name}: {_scalar(name, value)}"


def _block(name: str, message: Message, indent: str) -> Iterator[str]:
    yield f"{indent}{name} {{"
    yield from _lines(message, f"{indent}  ")
    yield f"{indent}}}"


def _scalar(name: str, value: object) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, str):
        return '"' + "".join(_escaped(sign) for sign in value) + '"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; expected a finite number")
        return repr(value)
    raise TypeError(f"{name} is {type(value).__name__}; expected text, a number or a truth value")


def _escaped(sign: str) -> str:
    if sign in _ESCAPES:
        return _ESCAPES[sign]
    if " " <= sign < "\x7f":
        return sign
    return "".join(f"\\{byte:03o}" for byte in sign.encode())
