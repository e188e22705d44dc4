"""From the body of an HTTP inference request to an :class:`InferRequest`.

A body is a JSON object, with the binary tensor extension followed by the bytes of those inputs
that say ``binary_data_size``, in their order. How long the JSON is stands in the header
``Inference-Header-Content-Length``; 0 means that the whole body is one tensor's bytes.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from regraft.serve import checks, datatypes
from regraft.serve.checks import clip, show
from regraft.serve.datatypes import BYTES, NUMBERS
from regraft.serve.messages import InferRequest, InputTensor, OutputRequest, Parameter
from regraft.serve.refusals import Kind, Refusal, invalid


def parse(body: bytes, header_length: str | None, max_json: int = 16 << 20) -> InferRequest:
    """Parses a request.

    Args:
        body: the whole body, decompressed.
        header_length: the header ``Inference-Header-Content-Length``; None without.
        max_json: bytes of JSON, which takes twenty times as much memory once parsed.

    Raises:
        Refusal: it is malformed; the message says where.
    """
    end = _json_length(body, header_length)
    if header_length is not None and end == 0:
        return InferRequest(raw=body)
    if end > max_json:
        raise Refusal(
            Kind.TOO_LARGE, f"the JSON is larger than {max_json} bytes; send tensors as binary"
        )
    document = _expect(_load(body[:end]), dict, "the request")
    binary = _Binary(memoryview(body)[end:])
    if "inputs" not in document:
        raise invalid("the request has no 'inputs'")
    inputs = tuple(
        _input(_expect(entry, dict, f"inputs[{i}]"), i, binary)
        for i, entry in enumerate(_expect(document["inputs"], list, "'inputs'"))
    )
    binary.expect_end()
    outputs = tuple(
        _output(_expect(entry, dict, f"outputs[{i}]"), i)
        for i, entry in enumerate(_expect(document.get("outputs", []), list, "'outputs'"))
    )
    identity = document.get("id")
    if identity is not None:
        _expect(identity, str, "'id'")
    return InferRequest(inputs, outputs, identity, _parameters(document, "the request"))


def parse_object(body: bytes) -> Mapping[str, Any]:
    """A JSON object, as the repository's requests carry it; an empty body is an empty one."""
    return _expect(_load(body), dict, "the request") if body.strip() else {}


class _Binary:
    """The bytes after the JSON, handed out in order."""

    def __init__(self, rest: memoryview) -> None:
        self._rest = rest

    def take(self, name: str, size: int) -> memoryview:
        if size > len(self._rest):
            raise invalid(
                f"input '{name}': binary_data_size is {size}, but only {len(self._rest)} bytes "
                f"follow; expecting {size - len(self._rest)} additional bytes"
            )
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def expect_end(self) -> None:
        if self._rest:
            raise invalid(f"unexpected additional input data: {len(self._rest)} bytes are left")


def _json_length(body: bytes, header: str | None) -> int:
    if header is None:
        return len(body)
    if not (header.isascii() and header.isdecimal()) or len(header) > 18:
        raise invalid(
            f"Inference-Header-Content-Length is {show(header)}; expected a number of bytes"
        )
    if int(header) > len(body):
        raise invalid(
            f"Inference-Header-Content-Length is {int(header)}, but the body has only {len(body)} "
            "bytes"
        )
    return int(header)


def _load(text: bytes) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except Refusal:
        raise
    except (ValueError, RecursionError) as error:
        # Of an UnicodeDecodeError the text would hold the bytes.
        reason = error if isinstance(error, json.JSONDecodeError) else type(error).__name__
        if isinstance(error, UnicodeDecodeError):
            reason = (
                "it is not text; an image or a tensor that is the whole body needs the header "
                "Inference-Header-Content-Length: 0"
            )
        raise invalid(f"failed to parse the request JSON: {reason}") from None


def _refuse_constant(constant: str) -> NoReturn:
    raise invalid(f"failed to parse the request JSON: {constant} is not JSON, and no pixel")


def _input(entry: Mapping[str, Any], index: int, binary: _Binary) -> InputTensor:
    name = _field(entry, "name", str, f"inputs[{index}]")
    where = f"input '{clip(name)}'"
    datatype = _field(entry, "datatype", str, where)
    checks.expect_datatype(datatype, where)
    shape = checks.checked_shape(_field(entry, "shape", list, where), where)
    parameters = _parameters(entry, where)
    size = parameters.get("binary_data_size")
    checks.expect_no_shared_memory(parameters, where)
    if size is not None:
        if type(size) is not int or size < 0:
            raise invalid(f"{where}: binary_data_size is {show(size)}; expected an integer from 0")
        if "data" in entry:
            raise invalid(f"{where}: has 'data' and binary_data_size; expected one of them")
        raw = binary.take(clip(name), size)
        array = checks.from_binary(clip(name), datatype, shape, raw)
        return InputTensor(name, datatype, shape, array)
    data = _field(entry, "data", list, where)
    if datatype == BYTES:
        strings = _strings(data, datatypes.count(shape), where, parameters.get("base64") is True)
        return InputTensor(name, datatype, shape, strings)
    return InputTensor(name, datatype, shape, _numbers(data, datatype, shape, where))


def _numbers(data: list[Any], datatype: str, shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """An array from flat or nested lists, whose numbers must be the datatype's own."""
    if datatype in ("FP16", "BF16"):
        raise invalid(f"{where}: receiving {datatype} data via JSON is not supported; use binary")
    try:
        array = np.array(data)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise invalid(f"{where}: 'data' is not a list of numbers, or ragged") from None
    dtype = NUMBERS[datatype]
    expected = {"f": "iuf", "b": "b"}.get(dtype.kind, "iu")
    if array.size and array.dtype.kind not in expected:
        raise invalid(f"{where}: 'data' holds something else than {datatype} numbers")
    if array.size != datatypes.count(shape) or (array.ndim > 1 and array.shape != shape):
        raise invalid(
            f"{where}: 'data' of shape {list(array.shape)} does not fit shape {list(shape)}"
        )
    return checks.converted(array, datatype, shape, where)


def _strings(data: list[Any], elements: int, where: str, encoded: bool) -> list[bytes]:
    flat: list[Any] = data
    while flat and all(isinstance(item, list) for item in flat):
        flat = [item for inner in flat for item in inner]
    if not all(isinstance(item, str) for item in flat):
        raise invalid(f"{where}: 'data' holds something else than strings")
    if len(flat) != elements:
        raise invalid(f"{where}: 'data' has {len(flat)} strings, but its shape says {elements}")
    try:
        if encoded:
            return [base64.b64decode(item, validate=True) for item in flat]
        return [item.encode() for item in flat]
    except (binascii.Error, ValueError):
        form = "base64" if encoded else "Unicode text"
        raise invalid(f"{where}: 'data' holds a string that is not {form}") from None


def _output(entry: Mapping[str, Any], index: int) -> OutputRequest:
    name = _field(entry, "name", str, f"outputs[{index}]")
    parameters = _parameters(entry, f"output '{clip(name)}'")
    return OutputRequest(name, checks.output_options(name, parameters))


def _parameters(entry: Mapping[str, Any], where: str) -> dict[str, Parameter]:
    parameters = _expect(entry.get("parameters", {}), dict, f"{where}: 'parameters'")
    for name, value in parameters.items():
        if not isinstance(value, bool | int | float | str):
            raise invalid(
                f"{where}: parameter {show(name)} is {show(value)}; expected a number, a string "
                "or a truth value"
            )
    return dict(parameters)


def _field(entry: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in entry:
        raise invalid(f"{where}: has no '{name}'")
    return _expect(entry[name], kind, f"{where}: '{name}'")


def _expect(value: Any, kind: type, where: str) -> Any:
    if type(value) is not kind:
        names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
        raise invalid(f"{where} is {show(value)}; expected {names[kind]}")
    return value
