"""From what the service answers to a ``ModelInferResponse``; outputs travel as raw bytes."""

from __future__ import annotations

import numpy as np

from regraft.serve.grpc.messages import message
from regraft.serve.messages import InferRequest, InferResponse

_RESPONSE = message("ModelInferResponse")


def encode(request: InferRequest, response: InferResponse) -> bytes:
    """The bytes of an answer; ``request`` is not needed, all outputs being binary here."""
    answer = _RESPONSE(
        model_name=response.model, model_version=response.version, id=response.id or ""
    )
    for name, array in response.outputs.items():
        datatype = "FP16" if array.dtype == np.float16 else "FP32"
        answer.outputs.add(name=name, datatype=datatype, shape=array.shape)
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        answer.raw_output_contents.append(little.tobytes())
    encoded: bytes = answer.SerializeToString()
    return encoded
