"""A plain gRPC client with the messages of the server's own private descriptors."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
from benchmarks.oip import grpc_arrays, grpc_call, grpc_channel, grpc_request

from regraft.serve.grpc.messages import methods

PATIENCE = 60.0


class Client:
    """A channel; a context manager."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self._channel = grpc_channel(port)
        self._metadata = () if key is None else (("authorization", f"Bearer {key}"),)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def raw(self, method: str, body: bytes, timeout: float = PATIENCE, **more: Any) -> bytes:
        """A call with any bytes as its message."""
        call = grpc_call(self._channel, method)
        return call(body, timeout=timeout, metadata=self._metadata, **more)

    def ask(self, method: str, **fields: Any) -> Any:
        """A call; ``fields`` are those of its request."""
        asked, answered = methods()[method]
        return answered.FromString(self.raw(method, asked(**fields).SerializeToString()))

    def infer(self, request: Any, **more: Any) -> dict[str, np.ndarray]:
        """An inference call; the arrays of its answer."""
        body = request if isinstance(request, bytes) else request.SerializeToString()
        return grpc_arrays(self.raw("ModelInfer", body, **more))

    def refused(self, request: Any, **more: Any) -> tuple[str, str]:
        """Status and message of an inference call that must not succeed."""
        try:
            self.infer(request, **more)
        except grpc.RpcError as error:
            return error.code().name, error.details()
        raise AssertionError("the call succeeded")


def pixels_request(model: str, pixels: np.ndarray, **more: Any) -> Any:
    """A request with preprocessed pixels as raw bytes."""
    return grpc_request(model, "pixel_values", "FP32", pixels.shape, pixels.tobytes(), **more)
