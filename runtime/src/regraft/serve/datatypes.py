"""The protocol's datatypes: their names, their numpy types, and their bytes on the wire.

Numbers travel little-endian, row by row. An element of BYTES is its length (uint32, little-endian)
and then its bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.serve.refusals import invalid

BYTES = "BYTES"
# Name -> numpy type on the wire. BF16 has none.
NUMBERS = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
NAMES = (*NUMBERS, "BF16", BYTES)
_LENGTH = struct.Struct("<I")
_MAX_ELEMENTS = 1 << 16  # far beyond any batch; an empty element takes 4 bytes, and 40 in memory


def count(shape: Sequence[int]) -> int:
    """Number of elements."""
    return math.prod(shape)


def from_wire(name: str, datatype: str, shape: Sequence[int], raw: memoryview) -> NDArray[Any]:
    """The numbers of a tensor that came as bytes.

    Args:
        name: of the tensor, for messages.
        datatype: one of :data:`NUMBERS`.
        shape: no negative sizes.
        raw: exactly its bytes.

    Returns:
        A view of ``raw``, or a copy where that is not aligned.

    Raises:
        Refusal: the shape does not fit the number of bytes.
    """
    dtype = NUMBERS[datatype]
    expected = count(shape) * dtype.itemsize
    if len(raw) != expected:
        raise invalid(
            f"input byte size mismatch for input '{name}'. Expected {expected} bytes for "
            f"{datatype} of shape {_brackets(shape)}, got {len(raw)}"
        )
    array = np.frombuffer(raw, dtype).reshape(shape)
    # Where a tensor begins depends on the length of the JSON before it.
    aligned: NDArray[Any] = np.require(array, dtype.newbyteorder("="), ["C", "A"])
    return aligned


def split_bytes(name: str, raw: memoryview, elements: int) -> list[bytes]:
    """The elements of a BYTES tensor.

    Args:
        name: of the tensor, for messages.
        raw: its bytes.
        elements: how many its shape says.

    Raises:
        Refusal: there are more or fewer, or the last one is cut short.
    """
    if elements > _MAX_ELEMENTS:
        raise invalid(f"input '{name}' has {elements} elements; expected at most {_MAX_ELEMENTS}")
    found: list[bytes] = []
    at = 0
    while at < len(raw):
        if len(found) == elements:
            raise invalid(
                f"unexpected number of string elements for inference input '{name}', expecting "
                f"{elements}: {len(raw) - at} bytes are left over"
            )
        if len(raw) - at < _LENGTH.size:
            raise invalid(
                f"incomplete string length indicator for inference input '{name}', expecting "
                f"{_LENGTH.size} bytes but only {len(raw) - at} bytes available"
            )
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if len(raw) - at < length:
            raise invalid(
                f"incomplete string data for inference input '{name}', expecting string of "
                f"length {length} but only {len(raw) - at} bytes available"
            )
        found.append(bytes(raw[at : at + length]))
        at += length
    if len(found) != elements:
        raise invalid(
            f"expected {elements} string elements for inference input '{name}', got {len(found)}"
        )
    return found


def join_bytes(elements: Iterable[bytes]) -> bytes:
    """A BYTES tensor as it travels."""
    return b"".join(_LENGTH.pack(len(element)) + element for element in elements)


def _brackets(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"
