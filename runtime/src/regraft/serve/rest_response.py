"""From what the service answers to JSON, and to JSON with binary tensors behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.serve.messages import InferRequest, InferResponse
from regraft.serve.refusals import invalid

HEADER_LENGTH = "inference-header-content-length"


def to_json(value: object) -> bytes:
    """Compact JSON; NaN and Inf never get here."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


class Binary:
    """Which outputs of a request are to travel as bytes.

    Raises:
        Refusal: ``binary_data_output`` is no truth value, or FP16 is wanted as JSON.
    """

    def __init__(self, request: InferRequest) -> None:
        default = request.parameters.get("binary_data_output", request.raw is not None)
        if not isinstance(default, bool):
            raise invalid(f"parameter 'binary_data_output' is {default!r}; expected true or false")
        self._default = default
        self._own = {o.name: o.binary for o in request.outputs if o.binary is not None}
        named = [o.name in self for o in request.outputs] or [default]
        if request.half and not all(named):
            raise invalid(
                "sending FP16 data via JSON is not supported; ask for binary_data, or for FP32"
            )

    def __contains__(self, name: str) -> bool:
        return self._own.get(name, self._default)


def encode(response: InferResponse, binary: Binary) -> tuple[bytes, int | None]:
    """The body of an answer.

    Args:
        response: what to send.
        binary: outputs that travel as bytes.

    Returns:
        The body, and the length of its JSON where bytes follow it.
    """
    tails: list[bytes] = []
    outputs: list[dict[str, Any]] = []
    for name, array in response.outputs.items():
        entry: dict[str, Any] = {
            "name": name,
            "datatype": "FP16" if array.dtype == np.float16 else "FP32",
            "shape": list(array.shape),
        }
        if name in binary:
            tails.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            entry["parameters"] = {"binary_data_size": len(tails[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        outputs.append(entry)
    document: Mapping[str, Any] = {
        "model_name": response.model,
        "model_version": response.version,
        **({} if response.id is None else {"id": response.id}),
        "outputs": outputs,
    }
    head = to_json(document)
    if not tails:
        return head, None
    return b"".join((head, *tails)), len(head)
