"""What the clients of the soak send, and the Extractor's answer to it."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.oip import bytes_tensor
from benchmarks.served import Array
from regraft import Extractor

_POOL = 12  # different inputs of each kind
Tensor = tuple[str, str, tuple[int, ...], bytes]
"""An input of a request: name, datatype, shape and raw values."""


class Expected:
    """Inputs, and the right answer to each."""

    def __init__(self, bundle: str) -> None:
        rng = np.random.default_rng(0)
        with Extractor.open(bundle) as extractor:
            size = extractor.bundle.manifest.image_size
            self._pixels = rng.normal(size=(_POOL, 3, *size)).astype(np.float32)
            self._files = [_picture(rng) for _ in range(_POOL)]
            images = [Image.open(io.BytesIO(file)) for file in self._files]
            self._of_pixels = _last(extractor, self._pixels)
            self._of_files = _last(extractor, images)

    def one(self, rng: random.Random) -> tuple[Array, Array]:
        """The pixels of one input (1, 3, H, W), and the answer."""
        i = rng.randrange(_POOL)
        return self._pixels[i : i + 1], self._of_pixels[i : i + 1]

    def pixels(self, rng: random.Random) -> tuple[Tensor, Array]:
        """Pixels of one or a few inputs, and the answer."""
        chosen = _draw(rng)
        array = self._pixels[chosen]
        right = self._of_pixels[chosen]
        return ("pixel_values", "FP32", array.shape, array.tobytes()), right

    def files(self, rng: random.Random) -> tuple[Tensor, Array]:
        """JPEG files of one or a few inputs, and the answer."""
        chosen = _draw(rng)
        files = [self._files[i] for i in chosen]
        right = self._of_files[chosen]
        return ("images", "BYTES", (len(files), 1), bytes_tensor(*files)), right


def _draw(rng: random.Random) -> list[int]:
    return [rng.randrange(_POOL) for _ in range(rng.choice((1, 1, 1, 2, 5)))]


def _last(extractor: Extractor, images: Any) -> Array:
    found = extractor.extract(images).pooled
    assert found is not None
    return found


def _picture(rng: np.random.Generator) -> bytes:
    height, width = rng.integers(40, 200, 2)
    array = np.kron(rng.integers(0, 256, (5, 5, 3)), np.ones((height // 5, width // 5, 1)))
    out = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()
