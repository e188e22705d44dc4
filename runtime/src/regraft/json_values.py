"""Single values of JSON as read: of the kind expected, or an error that names the field."""

from __future__ import annotations

import sys


def integer(name: str, value: object, least: int = 0) -> int:
    """A JSON integer as read, of which ``True`` and ``3.0`` are none.

    Raises:
        ValueError: it is no integer or less than ``least``; the message says so of ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer from {least} on")
    return value


def positive(name: str, value: object) -> float:
    """A number above 0 that float64 holds.

    Raises:
        ValueError: it is none; the message says so of ``name``.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value <= sys.float_info.max
    ):
        raise ValueError(f"{name} is {value!r}; expected a finite number above 0")
    return float(value)


def truth(name: str, value: object) -> bool:
    """``true`` or ``false``.

    Raises:
        ValueError: it is neither; the message says so of ``name``.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected true or false")
    return value


def shape(name: str, value: object) -> tuple[int | str, ...]:
    """The shape of a tensor, "batch" for the free axis.

    Raises:
        ValueError: it is none; the message says so of ``name``.
    """
    if isinstance(value, list | tuple) and all(
        size == "batch" or (type(size) is int and size > 0) for size in value
    ):
        return tuple(value)
    raise ValueError(f'{name} is {value!r}; expected a list of positive integers and "batch"')
