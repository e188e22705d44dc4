"""A client's side of the Open Inference Protocol: requests with one input, and answers as arrays.

The standard library, numpy, and over gRPC the server's own private messages. Benchmarks and tests
speak to `regraft serve` with it; the conformance suite does so with Triton's client.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from regraft.serve.grpc.messages import SERVICE, message

Floats = NDArray[np.floating[Any]]
HEADER_LENGTH = "inference-header-content-length"
_DTYPES = {"FP32": "<f4", "FP16": "<f2"}
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def bytes_tensor(*elements: bytes) -> bytes:
    """A BYTES tensor as it travels."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def http_request(
    name: str, datatype: str, shape: Sequence[int], raw: bytes, **more: Any
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an HTTP request with one binary input, for binary outputs.

    Args:
        name: of the input.
        datatype: its datatype.
        shape: its shape.
        raw: its bytes.
        more: further fields of the request, such as ``outputs``.
    """
    tensor = {
        "name": name,
        "shape": list(shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": len(raw)},
    }
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True}, **more}
    head = json.dumps(document).encode()
    return head + raw, {HEADER_LENGTH: str(len(head))}


def http_document(headers: Mapping[str, str], body: bytes) -> Any:
    """The JSON of an HTTP answer; ``headers`` with names in lower case."""
    head = headers.get(HEADER_LENGTH)
    return json.loads(body if head is None else body[: int(head)])


def http_arrays(headers: Mapping[str, str], body: bytes) -> dict[str, Floats]:
    """The outputs of an HTTP answer, JSON or binary.

    Args:
        headers: names in lower case.
        body: of the answer.

    Raises:
        ValueError: bytes are left over, or an output has not as many numbers as its shape says.
    """
    at = int(headers.get(HEADER_LENGTH, len(body)))
    arrays = {}
    for output in http_document(headers, body)["outputs"]:
        dtype = np.dtype(_DTYPES[output["datatype"]])
        if "data" in output:
            array = np.array(output["data"], dtype)
        else:
            size = output["parameters"]["binary_data_size"]
            array = np.frombuffer(body[at : at + size], dtype)
            at += size
        arrays[output["name"]] = array.reshape(output["shape"])
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes behind the outputs")
    return arrays


def grpc_channel(port: int) -> Any:
    """A connection of its own to a server on this machine, for messages of any size."""
    options = [*_UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
    return grpc.insecure_channel(f"127.0.0.1:{port}", options=options)


def grpc_call(channel: Any, method: str = "ModelInfer") -> Any:
    """A call of the protocol; takes a serialized request and gives a serialized answer."""
    return channel.unary_unary(f"/{SERVICE}/{method}")


def grpc_request(
    model: str,
    name: str,
    datatype: str,
    shape: Sequence[int],
    raw: bytes | None = None,
    contents: Mapping[str, Any] | None = None,
    **more: Any,
) -> Any:
    """A ``ModelInferRequest`` with one input.

    Args:
        model: which one is asked.
        name: of the input.
        datatype: its datatype.
        shape: its shape.
        raw: its bytes, for ``raw_input_contents``.
        contents: its typed contents.
        more: further fields of the request, such as ``outputs``.
    """
    tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    if contents is not None:
        tensor["contents"] = contents
    request = message("ModelInferRequest")(model_name=model, inputs=[tensor], **more)
    if raw is not None:
        request.raw_input_contents.append(raw)
    return request


def grpc_arrays(body: bytes) -> dict[str, Floats]:
    """The outputs of a serialized ``ModelInferResponse``."""
    answer = message("ModelInferResponse").FromString(body)
    return {
        output.name: np.frombuffer(raw, _DTYPES[output.datatype]).reshape(tuple(output.shape))
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }
