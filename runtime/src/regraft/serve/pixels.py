"""From a checked input to the engine's input, in a pool of threads where images are decoded."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regraft.errors import ImageError
from regraft.images import decode
from regraft.preprocessing import Preprocessing
from regraft.serve.datatypes import BYTES
from regraft.serve.messages import InputTensor
from regraft.serve.refusals import invalid

Floats = NDArray[np.float32]
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{16,}=*")
_OBJECT = re.compile(r"<[^<>]* object at 0x[0-9a-f]+>")


class PixelReader:
    """Makes ``pixel_values`` of one bundle's requests.

    Args:
        preprocessing: the bundle's.
        pool: threads that decode; shared by all models, and not owned.
        max_pixels: larger images are refused before they are decoded.
    """

    def __init__(
        self, preprocessing: Preprocessing, pool: ThreadPoolExecutor, max_pixels: int
    ) -> None:
        self._preprocessing = preprocessing
        self._pool = pool
        self._max_pixels = max_pixels

    async def read(self, tensor: InputTensor) -> Floats:
        """The pixels of a request.

        Args:
            tensor: what :meth:`Signature.check_input` let through.

        Returns:
            float32 (N, 3, H, W).

        Raises:
            Refusal: an image cannot be decoded or is too large, or a number is NaN or Inf; the
                message says which image.
        """
        data: Any = tensor.data
        if tensor.datatype == "FP32":
            _expect_finite(tensor.name, data)
            return data  # type: ignore[no-any-return]
        if tensor.datatype != BYTES:
            height, width = tensor.shape[1:3]
            if height * width > self._max_pixels:
                raise invalid(
                    f"input '{tensor.name}': images of {width} x {height} pixels; expected at "
                    f"most {self._max_pixels}"
                )
        pixels = np.empty((len(data), 3, *self._preprocessing.image_size), np.float32)
        make = self._decoded if tensor.datatype == BYTES else self._raw
        await self._all(
            lambda i=i: make(f"input '{tensor.name}', image {i}", data[i], pixels[i])
            for i in range(len(data))
        )
        return pixels

    async def _all(self, jobs: Any) -> None:
        """Runs the jobs in the pool; when one fails, or nobody waits any more, drops the others."""
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(self._pool, job) for job in jobs]
        try:
            await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()

    def _decoded(self, where: str, file: bytes, out: Floats) -> None:
        self._preprocessing(open_image(where, file, self._max_pixels), out)

    def _raw(self, where: str, array: NDArray[np.uint8], out: Floats) -> None:
        self._preprocessing(Image.fromarray(array), out)


def open_image(where: str, file: bytes, max_pixels: int) -> Image.Image:
    """An encoded image, decoded: RGB, upright.

    Args:
        where: how messages name it.
        file: its bytes.
        max_pixels: larger ones are refused.

    Raises:
        Refusal: it cannot be decoded or is too large.
    """
    if not file:
        raise invalid(f"{where}: is empty (0 bytes); expected an encoded image")
    try:
        return decode(file, max_pixels=max_pixels)
    except ImageError as error:
        reason = _OBJECT.sub("the image", str(error).partition(": ")[2])
        if _BASE64.fullmatch(file[:64]):
            reason += '; base64 is decoded where the input has the parameter "base64": true'
        raise invalid(f"{where}: {reason}") from None


def _expect_finite(name: str, pixels: Floats) -> None:
    finite = np.isfinite(pixels)
    if not finite.all():
        which = np.flatnonzero(~finite.reshape(len(pixels), -1).all(1)).tolist()
        raise invalid(
            f"input '{name}': NaN or Inf in image {', '.join(map(str, which))}, counted from 0"
        )
