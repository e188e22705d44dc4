"""Checks of a request's parts that every transport makes, in the same words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.serve import datatypes
from regraft.serve.datatypes import BYTES, NUMBERS
from regraft.serve.messages import Parameter
from regraft.serve.refusals import invalid

_MAX_DIMS = 16
_MAX_SIZE = (1 << 63) - 1
_SHOWN = 80  # characters of a client's value that a message repeats


def expect_datatype(datatype: str, where: str) -> None:
    """Refuses a name that is none of the protocol's datatypes."""
    if datatype not in datatypes.NAMES:
        raise invalid(
            f"{where}: unknown datatype {show(datatype)}; expected one of "
            f"{', '.join(datatypes.NAMES)}"
        )


def checked_shape(sizes: Sequence[Any], where: str) -> tuple[int, ...]:
    """A shape whose sizes are integers from 0 and whose product is one, too."""
    wrong = len(sizes) > _MAX_DIMS or not all(type(n) is int and n >= 0 for n in sizes)
    if wrong or datatypes.count(sizes) > _MAX_SIZE:
        raise invalid(
            f"{where}: shape is {show(sizes)}; expected at most {_MAX_DIMS} sizes, 0 or more each"
        )
    return tuple(sizes)


def expect_no_shared_memory(parameters: Mapping[str, Parameter], where: str) -> None:
    """Refuses an input whose bytes are elsewhere."""
    if "shared_memory_region" in parameters:
        raise invalid(f"{where}: shared memory is not supported")


def from_binary(
    name: str, datatype: str, shape: tuple[int, ...], raw: memoryview
) -> NDArray[Any] | list[bytes]:
    """The data of an input that came as bytes.

    Raises:
        Refusal: they do not fit datatype and shape.
    """
    if datatype == BYTES:
        return datatypes.split_bytes(name, raw, datatypes.count(shape))
    if datatype in NUMBERS:
        return datatypes.from_wire(name, datatype, shape, raw)
    raise invalid(f"input '{name}': datatype {datatype} is not supported")


def converted(
    array: NDArray[Any], datatype: str, shape: tuple[int, ...], where: str
) -> NDArray[Any]:
    """Numbers of a wider type in the datatype's own.

    Args:
        array: as many elements as ``shape`` says.
        datatype: one of :data:`regraft.serve.datatypes.NUMBERS`.
        shape: to give it.
        where: which input, for messages.

    Raises:
        Refusal: a number is beyond the datatype, NaN or Inf.
    """
    dtype = NUMBERS[datatype]
    with np.errstate(over="ignore"):
        result: NDArray[Any] = array.astype(dtype).reshape(shape)
    whole = dtype.kind not in "iu" or np.array_equal(result.ravel(), array.ravel())
    if not whole or (dtype.kind == "f" and not np.isfinite(result).all()):
        raise invalid(f"{where}: 'data' holds numbers beyond {datatype}")
    return result


def output_options(name: str, parameters: Mapping[str, Parameter]) -> bool | None:
    """What an output's parameters ask for: binary or not, None where they leave it open.

    Raises:
        Refusal: they ask for something that is not implemented.
    """
    where = f"output '{clip(name)}'"
    for unsupported in ("classification", "shared_memory_region"):
        if parameters.get(unsupported):
            raise invalid(f"{where}: {unsupported} is not supported")
    binary = parameters.get("binary_data")
    if binary is not None and not isinstance(binary, bool):
        raise invalid(f"{where}: binary_data is {show(binary)}; expected true or false")
    return binary


def show(value: Any) -> str:
    """A client's value, shortened, for a message."""
    if isinstance(value, list | dict) and len(value) > _SHOWN:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        return clip(json.dumps(value))
    except (ValueError, RecursionError):
        return type(value).__name__


def clip(text: str) -> str:
    """A client's text, shortened and without control characters, for a message."""
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return shown if shown.isprintable() else ascii(shown)[1:-1]
