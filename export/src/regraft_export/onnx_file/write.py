"""Writes a model; large tensors are copied from where they lie, never all of them in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto

from regraft.files import whole_file
from regraft_export.onnx_file import wire
from regraft_export.onnx_file.stored import Stored

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
INLINE_BYTES = 1024  # in a model with external data, smaller tensors stay inside
ALIGNMENT = 4096  # a page, so that engines can map weights instead of copying them
LIMIT = (2 << 30) - (1 << 20)  # a protobuf message must stay under 2 GB


def data_path(out: Path) -> Path:
    """Where the external data of a model goes."""
    return out.with_name(f"{out.name}.data")


def size_inside(model: onnx.ModelProto, stored: Mapping[str, Stored]) -> int:
    """Bytes of the file if every tensor is inside."""
    return int(model.ByteSize()) + sum(
        stored[t.name].length for t in model.graph.initializer if t.name in stored
    )


def write_file(
    model: onnx.ModelProto,
    stored: Mapping[str, Stored],
    out: Path,
    *,
    external: bool,
    force: bool = False,
) -> list[Path]:
    """Writes a model, and its external data as ``OUT.data`` if there is any; whole or not at all.

    Args:
        model: tensors named in ``stored`` have no values here. It is changed.
        stored: where their values are.
        out: the file.
        external: whether tensors go to a file beside it. They do in any case where one file would
            pass protobuf's limit of 2 GB.
        force: whether existing files may be replaced.

    Returns:
        The files.

    Raises:
        OutputExistsError: one is there already, and not ``force``.
        InputError: one cannot be written.
    """
    if not external and size_inside(model, stored) < LIMIT:
        with whole_file(out, force) as hidden, hidden.open("wb") as stream:
            _write_inside(model, stored, stream)
        return [out]
    data = data_path(out)
    with whole_file(out, force) as hidden, whole_file(data, force) as hidden_data:
        with hidden_data.open("wb") as stream:
            _move_out(model, stored, stream, data.name)
        with hidden.open("wb") as stream:
            stream.write(model.SerializeToString())
            stream.flush()
            # The data gets its name first: what can still fail must fail before that.
            os.fsync(stream.fileno())
    return [out, data]


def _write_inside(model: onnx.ModelProto, stored: Mapping[str, Stored], stream: BinaryIO) -> None:
    heads: list[tuple[bytes, Stored]] = []
    kept: list[TensorProto] = []
    for tensor in model.graph.initializer:
        if tensor.name in stored:
            heads.append((_head(tensor), stored[tensor.name]))
        else:
            kept.append(TensorProto.FromString(tensor.SerializeToString()))
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    rest = graph.SerializeToString()
    prefixes = []
    for head, place in heads:
        raw = wire.header(_RAW_DATA, place.length)
        length = len(head) + len(raw) + place.length
        prefixes.append(wire.header(_INITIALIZER, length) + head + raw)
    total = len(rest) + sum(map(len, prefixes)) + sum(place.length for _, place in heads)
    model.ClearField("graph")
    stream.write(model.SerializeToString() + wire.header(_GRAPH, total) + rest)
    for prefix, (_, place) in zip(prefixes, heads, strict=True):
        stream.write(prefix)
        for chunk in place.chunks():
            stream.write(chunk)


def _head(tensor: TensorProto) -> bytes:
    head = TensorProto.FromString(tensor.SerializeToString())
    head.ClearField("data_location")
    del head.external_data[:]
    return bytes(head.SerializeToString())


def _move_out(
    model: onnx.ModelProto, stored: Mapping[str, Stored], stream: BinaryIO, name: str
) -> None:
    placed: dict[Stored, int] = {}
    for tensor in model.graph.initializer:
        place = stored.get(tensor.name)
        if place is None and len(tensor.raw_data) < INLINE_BYTES:
            continue
        if place is not None and place in placed:  # tensors may share their bytes
            _point(tensor, name, placed[place], place.length)
            continue
        stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
        offset = stream.tell()
        if place is None:
            length = stream.write(tensor.raw_data)
            tensor.ClearField("raw_data")
        else:
            for chunk in place.chunks():
                stream.write(chunk)
            placed[place], length = offset, place.length
        _point(tensor, name, offset, length)


def _point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
