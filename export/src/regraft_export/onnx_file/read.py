"""Reads a model without its large tensors.

The protobuf library would hold a file of 2 GB twice, as bytes and as objects. Here the file is
mapped, its initializers are found by their place in the message, and only what is left is parsed:
nodes, names and small tensors.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from regraft.errors import ModelError
from regraft_export.onnx_file import wire
from regraft_export.onnx_file.stored import Stored, bytes_of
from regraft_export.onnx_file.wire import Malformed

# Field numbers of onnx.proto, which never change.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
LARGE = 4096  # bytes; smaller tensors are parsed


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file.

    Attributes:
        path: as given.
        skeleton: the model; large initializers have dtype and shape but no values.
        stored: where the values of these lie, by name.
        external: whether the file keeps tensors in files beside it.
    """

    path: Path
    skeleton: onnx.ModelProto
    stored: Mapping[str, Stored]
    external: bool

    @property
    def opset(self) -> int:
        """Of the default domain; 0 if the file has none."""
        versions = [o.version for o in self.skeleton.opset_import if o.domain in ("", "ai.onnx")]
        return max(versions, default=0)

    @property
    def data_files(self) -> frozenset[Path]:
        """The files beside it."""
        return frozenset(s.path for s in self.stored.values() if s.path != self.path)


def read_file(path: str | Path) -> OnnxFile:
    """Reads an ONNX file.

    Raises:
        ModelError: it is missing, no ONNX file, truncated, or its external data is.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ModelError(f"{path}: is a folder; expected an .onnx file")
        skeleton, stored = _parsed(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (Malformed, DecodeError) as error:
        raise ModelError(
            f"{path}: is truncated or no ONNX file ({error}); expected a model as an ONNX exporter "
            "writes it: copy or export it again"
        ) from None
    if not skeleton.graph.node or not skeleton.ir_version:
        raise ModelError(
            f"{path}: is no ONNX file: it has {len(skeleton.graph.node)} nodes and IR version "
            f"{skeleton.ir_version}; expected a model with nodes"
        )
    beside = _external(path, skeleton, frozenset(stored))
    return OnnxFile(path, skeleton, {**stored, **beside}, external=bool(beside))


def _parsed(path: Path) -> tuple[onnx.ModelProto, dict[str, Stored]]:
    size = path.stat().st_size
    if size == 0:
        raise Malformed("it is empty")
    kept = bytearray()
    stored: dict[str, Stored] = {}
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for field in wire.fields(data, 0, size):
            if field.number == _GRAPH and field.is_bytes:
                graph = _graph(path, data, field, stored)
                kept += wire.header(_GRAPH, len(graph)) + graph
            else:
                kept += data[field.start : field.end]
    skeleton = onnx.ModelProto()
    skeleton.ParseFromString(bytes(kept))
    return skeleton, stored


def _graph(path: Path, data: mmap.mmap, graph: wire.Field, stored: dict[str, Stored]) -> bytearray:
    """The graph's bytes without the values of large initializers, which go to ``stored``."""
    kept = bytearray()
    for field in wire.fields(data, graph.body, graph.end):
        if field.number != _INITIALIZER or field.end - field.body < LARGE:
            kept += data[field.start : field.end]
            continue
        parts = list(wire.fields(data, field.body, field.end))
        raw = [p for p in parts if p.number == _RAW_DATA and p.is_bytes]
        if len(raw) != 1:  # values as numbers, not as bytes: rare, and parsed as they are
            kept += data[field.start : field.end]
            continue
        head = b"".join(data[p.start : p.end] for p in parts if p.number != _RAW_DATA)
        tensor = TensorProto.FromString(head)
        place = Stored(path, raw[0].body, raw[0].end - raw[0].body)
        expected = bytes_of(tensor)
        if expected not in (None, place.length):
            raise Malformed(f"the tensor {tensor.name!r} has {place.length} of {expected} bytes")
        stored[tensor.name] = place
        kept += wire.header(_INITIALIZER, len(head)) + head
    return kept


def _external(path: Path, model: onnx.ModelProto, inside: frozenset[str]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL or tensor.name in inside:
            continue
        found[tensor.name] = _place(path, tensor)
    return found


def _place(path: Path, tensor: TensorProto) -> Stored:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    where = f"{path}: the tensor {tensor.name!r} lies in the external data file {location!r}"
    relative = PurePosixPath(location)
    if not location or relative.is_absolute() or ".." in relative.parts:
        raise ModelError(f"{where}; expected a file in the folder of the model, or below it")
    file = path.parent / relative
    try:
        size = file.stat().st_size
    except OSError as error:
        raise ModelError(
            f"{where}, which cannot be read ({error.strerror}): keep it beside the model, under "
            "the name it was exported with"
        ) from None
    offset = int(entries.get("offset", 0))
    length = int(entries["length"]) if "length" in entries else bytes_of(tensor)
    expected = bytes_of(tensor)
    if length is None or expected not in (None, length):
        raise ModelError(f"{where} with {length} bytes; its shape needs {expected}")
    if offset + length > size:
        raise ModelError(
            f"{where} up to byte {offset + length}; that file has {size} bytes: it is truncated or "
            "belongs to another model"
        )
    return Stored(file, offset, length)
