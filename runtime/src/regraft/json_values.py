"""JSON as it is read: files, single values, each of the kind expected or an error that says so."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from regraft.errors import RegraftError


def read_json(path: Path, error: type[RegraftError], *, missing: str, broken: str) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        error: what is raised.
        missing: what to do, or was expected, where it cannot be read.
        broken: the same where it is not JSON.

    Raises:
        RegraftError: of the kind ``error``: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror}); {missing}") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: is not JSON ({reason}); {broken}") from None


def digest(content: Any) -> str:
    """The sha256 (hex) of JSON values, whatever the order of names."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


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
