"""From a ``ModelInferRequest`` to an :class:`InferRequest`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.serve import checks, datatypes
from regraft.serve.checks import clip, show
from regraft.serve.datatypes import BYTES, NUMBERS
from regraft.serve.grpc.wire import InferMessage
from regraft.serve.messages import InferRequest, InputTensor, OutputRequest, Parameter
from regraft.serve.refusals import invalid

# Datatype -> where its elements stand, and their type there. The halves have no place.
_CONTENTS = {
    "BOOL": ("bool_contents", "?"),
    **dict.fromkeys(("INT8", "INT16", "INT32"), ("int_contents", "i4")),
    "INT64": ("int64_contents", "i8"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), ("uint_contents", "u4")),
    "UINT64": ("uint64_contents", "u8"),
    "FP32": ("fp32_contents", "f4"),
    "FP64": ("fp64_contents", "f8"),
    BYTES: ("bytes_contents", ""),
}


def parse(given: InferMessage) -> InferRequest:
    """Parses a request.

    Raises:
        Refusal: something in it is wrong; the message says where.
    """
    message, raw = given.message, given.raw
    if raw and len(raw) != len(message.inputs):
        raise invalid(
            f"raw_input_contents has {len(raw)} elements for {len(message.inputs)} inputs; "
            "expected one for each"
        )
    inputs = tuple(
        _input(tensor, i, raw[i] if raw else None) for i, tensor in enumerate(message.inputs)
    )
    outputs = tuple(
        OutputRequest(
            output.name,
            checks.output_options(
                output.name, _parameters(output.parameters, f"output '{clip(output.name)}'")
            ),
        )
        for output in message.outputs
    )
    parameters = _parameters(message.parameters, "the request")
    return InferRequest(inputs, outputs, message.id or None, parameters)


def _input(tensor: Any, index: int, raw: memoryview | None) -> InputTensor:
    name, datatype = tensor.name, tensor.datatype
    where = f"input '{clip(name)}'" if name else f"inputs[{index}]"
    checks.expect_datatype(datatype, where)
    shape = checks.checked_shape(list(tensor.shape), where)
    checks.expect_no_shared_memory(_parameters(tensor.parameters, where), where)
    if raw is None:
        return InputTensor(name, datatype, shape, _typed(tensor.contents, datatype, shape, where))
    if tensor.HasField("contents"):
        raise invalid(f"{where}: has contents and raw_input_contents; expected one of them")
    return InputTensor(name, datatype, shape, checks.from_binary(clip(name), datatype, shape, raw))


def _typed(
    contents: Any, datatype: str, shape: tuple[int, ...], where: str
) -> NDArray[Any] | list[bytes]:
    """The data of an input whose elements are a field of the message."""
    if datatype not in _CONTENTS:
        raise invalid(f"{where}: {datatype} has no contents field; send it as raw_input_contents")
    field, kind = _CONTENTS[datatype]
    for other, _ in contents.ListFields():
        if other.name != field:
            raise invalid(f"{where}: has {other.name}; {datatype} elements belong in {field}")
    elements = getattr(contents, field)
    if len(elements) != datatypes.count(shape):
        raise invalid(
            f"{where}: {field} has {len(elements)} elements, but shape {show(list(shape))} has "
            f"{datatypes.count(shape)}"
        )
    if datatype == BYTES:
        return list(elements)
    array: NDArray[Any] = np.fromiter(elements, kind, len(elements))
    if array.dtype != NUMBERS[datatype].newbyteorder("="):
        return checks.converted(array, datatype, shape, where)
    return array.reshape(shape)


def _parameters(given: Mapping[str, Any], where: str) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    for name, value in given.items():
        choice = value.WhichOneof("parameter_choice")
        if choice is None:
            raise invalid(f"{where}: parameter {show(name)} has no value")
        parameters[name] = getattr(value, choice)
    return parameters
