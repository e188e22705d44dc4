"""A tensor's bytes where they lie: in an ONNX file, or in the external data beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

_CHUNK = 16 << 20


@dataclass(frozen=True)
class Stored:
    """Bytes of one tensor in a file.

    Attributes:
        path: the file.
        offset: of its first byte.
        length: in bytes.
    """

    path: Path
    offset: int
    length: int

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a few MB at a time."""
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            left = self.length
            while left:
                chunk = stream.read(min(_CHUNK, left))
                if not chunk:
                    raise OSError(f"{self.path} has become shorter while it was read")
                left -= len(chunk)
                yield chunk

    def array(self, tensor: onnx.TensorProto) -> NDArray[Any]:
        """The tensor as a copy in memory.

        Args:
            tensor: its dtype and shape.
        """
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        raw = np.empty(self.length, np.uint8)
        filled = 0
        for chunk in self.chunks():
            raw[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
            filled += len(chunk)
        return raw.view(dtype).reshape(tuple(tensor.dims))


def bytes_of(tensor: onnx.TensorProto) -> int | None:
    """How many bytes the values of a tensor take when stored raw; None for packed types."""
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError:
        return None
    if dtype.kind == "O" or dtype.name in ("int4", "uint4", "float4_e2m1fn", "int2", "uint2"):
        return None
    count = int(np.prod(list(tensor.dims), dtype=np.int64))
    return count * int(dtype.itemsize)
