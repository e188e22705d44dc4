"""A plain gRPC client with the messages of the server's own private descriptors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np

from regraft.serve.grpc.messages import SERVICE, message, methods

PATIENCE = 60.0
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Client:
    """A channel; a context manager."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=_UNLIMITED)
        self._metadata = () if key is None else (("authorization", f"Bearer {key}"),)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def raw(self, method: str, body: bytes, timeout: float = PATIENCE, **more: Any) -> bytes:
        """A call with any bytes as its message."""
        call = self._channel.unary_unary(f"/{SERVICE}/{method}")
        return call(body, timeout=timeout, metadata=self._metadata, **more)

    def ask(self, method: str, **fields: Any) -> Any:
        """A call; ``fields`` are those of its request."""
        asked, answered = methods()[method]
        return answered.FromString(self.raw(method, asked(**fields).SerializeToString()))

    def infer(self, request: Any, **more: Any) -> dict[str, np.ndarray]:
        """An inference call; the arrays of its answer."""
        body = request if isinstance(request, bytes) else request.SerializeToString()
        return arrays(
            message("ModelInferResponse").FromString(self.raw("ModelInfer", body, **more))
        )

    def refused(self, request: Any, **more: Any) -> tuple[str, str]:
        """Status and message of an inference call that must not succeed."""
        try:
            self.infer(request, **more)
        except grpc.RpcError as error:
            return error.code().name, error.details()
        raise AssertionError("the call succeeded")


def arrays(answer: Any) -> dict[str, np.ndarray]:
    """Outputs of a ``ModelInferResponse``."""
    types = {"FP32": "<f4", "FP16": "<f2"}
    return {
        output.name: np.frombuffer(raw, types[output.datatype]).reshape(tuple(output.shape))
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


def infer_request(
    model: str,
    name: str,
    datatype: str,
    shape: tuple[int, ...],
    raw: bytes | None = None,
    contents: Mapping[str, Any] | None = None,
    **more: Any,
) -> Any:
    """A ``ModelInferRequest`` of one input; ``more`` are further fields of it."""
    tensor = {"name": name, "datatype": datatype, "shape": shape}
    if contents is not None:
        tensor["contents"] = contents
    request = message("ModelInferRequest")(model_name=model, inputs=[tensor], **more)
    if raw is not None:
        request.raw_input_contents.append(raw)
    return request


def pixels_request(model: str, pixels: np.ndarray, **more: Any) -> Any:
    """A request with preprocessed pixels as raw bytes."""
    return infer_request(model, "pixel_values", "FP32", pixels.shape, pixels.tobytes(), **more)
