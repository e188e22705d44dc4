"""One external-data file for all graphs of a bundle.

The four graphs share almost every weight, so each distinct tensor is written once, found by its
content. Small tensors stay inside the graphs: ONNX Runtime wants the targets of Reshape there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto

from regraft.bundle import WEIGHTS

INLINE_BYTES = 1024
ALIGNMENT = 4096  # a page, so that engines can map weights instead of copying them


class WeightsFile:
    """Writes graphs whose large tensors lie in one shared file.

    Args:
        folder: where the graphs and the file go.
        name: of the shared file.
    """

    def __init__(self, folder: Path, name: str = WEIGHTS) -> None:
        self.folder, self.name = folder, name
        self._offsets: dict[str, tuple[int, int]] = {}
        self._stream: BinaryIO = (folder / name).open("wb")

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def save(self, model: onnx.ModelProto, file: str) -> None:
        """Writes one graph; its large initializers move out of the proto, which is changed."""
        for initializer in model.graph.initializer:
            if len(initializer.raw_data) >= INLINE_BYTES:
                self._move_out(initializer)
        onnx.checker.check_model(_without_weights(model))
        (self.folder / file).write_bytes(model.SerializeToString())

    def _move_out(self, initializer: TensorProto) -> None:
        data = initializer.raw_data
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._offsets:
            position = self._stream.tell()
            self._stream.write(b"\0" * (-position % ALIGNMENT))
            self._offsets[digest] = (self._stream.tell(), len(data))
            self._stream.write(data)
        offset, length = self._offsets[digest]
        initializer.ClearField("raw_data")
        initializer.data_location = TensorProto.EXTERNAL
        del initializer.external_data[:]
        for key, value in (("location", self.name), ("offset", offset), ("length", length)):
            entry = initializer.external_data.add()
            entry.key, entry.value = key, str(value)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which external tensors are inputs: the checker cannot open the unfinished file."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    kept = [t for t in bare.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    for t in bare.graph.initializer:
        if t.data_location == TensorProto.EXTERNAL:
            bare.graph.input.append(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
            )
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(kept)
    return bare
