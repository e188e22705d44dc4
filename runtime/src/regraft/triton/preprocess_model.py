"""Triton's Python backend runs this file: image files in, ``pixel_values`` out.

`regraft triton` copied it from regraft-runtime, which the server's Python has to have installed;
decoding and preprocessing are regraft's own, so that features equal those of `regraft extract`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from regraft.errors import ImageError
from regraft.images import decode
from regraft.preprocessing import Preprocessing


class TritonPythonModel:
    """One instance, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the preprocessing that lies beside this file."""
        import triton_python_backend_utils as backend  # exists inside Triton alone

        self._backend: Any = backend
        version = Path(args["model_repository"], args["model_version"])
        content = json.loads((version / "preprocessing.json").read_text(encoding="utf-8"))
        self._preprocessing = Preprocessing.from_json(content)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request; a bad image fails the request that it is in, and no other."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        backend = self._backend
        images = backend.get_input_tensor_by_name(request, "images").as_numpy().reshape(-1)
        pixels = np.empty((len(images), 3, *self._preprocessing.image_size), np.float32)
        for index, image in enumerate(images):
            try:
                self._preprocessing(decode(bytes(image)), pixels[index])
            except ImageError as error:
                reason = str(error).removeprefix("a picture given as bytes: ")
                told = backend.TritonError(
                    f"image {index}, counted from 0: {reason}", backend.TritonError.INVALID_ARG
                )
                return backend.InferenceResponse(error=told)
        return backend.InferenceResponse([backend.Tensor("pixel_values", pixels)])
