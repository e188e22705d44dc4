"""From whatever the user has to a decoded RGB picture.

What is done to unusual pictures follows ``Image.open(path).convert("RGB")``, which users of timm
know, so that features equal theirs: alpha is dropped, palettes are resolved, CMYK is converted
without colour profiles, of an animation the first frame counts. Two things differ because the plain
conversion is broken there: the EXIF orientation is applied, and 16-bit greyscale is scaled to
8 bit (Pillow clips it to white). Greyscale of 32 bit, whole numbers or not, and signed greyscale
are refused: nothing says which number is white.
"""

from __future__ import annotations

import io
import os
import re
import stat
import threading
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from regraft.errors import ImageError
from regraft.preprocessing import Preprocessing

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]

# Pillow's own limit, at which it only warns.
MAX_PIXELS = 89_478_485

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset(_TURNS[key] for key in (5, 6, 7, 8))
# Mode I holds 32-bit numbers; Pillow gives it to the 16-bit files of these formats. 16-bit TIFFs
# have modes of their own, so that I means 32 bit or signed there. A picture without a format was
# made in memory, and its numbers may mean anything.
_SIXTEEN_BIT_AS_I = frozenset({"PNG", "PPM"})
# Pillow's pictures load lazily, and neither that nor the reading of EXIF blocks is thread-safe.
# One lock for all of them: two pictures may share a file.
_LAZY = threading.Lock()
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def decode(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    draft_for: Preprocessing | None = None,
) -> Image.Image:
    """Decodes one picture.

    Threads may share a Pillow image, as long as nothing but this function works on it.

    Args:
        source: a path, the bytes of a file, a Pillow image, or a uint8 array (H, W, 3).
        max_pixels: larger pictures are refused before they are decoded. Above twice Pillow's own
            limit, ``PIL.Image.MAX_IMAGE_PIXELS`` has to be raised as well.
        draft_for: decode JPEG files at a half, a quarter or an eighth of their size where that is
            still at least the size this preprocessing resizes to. Much faster for large photos;
            changes pixels slightly.

    Returns:
        A picture of mode RGB, upright.

    Raises:
        ImageError: missing, not a picture, damaged, too large, or a pixel type without a defined
            white; one line that names the file.
    """
    name = name_of(source)
    try:
        if isinstance(source, np.ndarray):
            return _from_array(source)
        if isinstance(source, Image.Image):
            with _LAZY:
                _refuse_huge(source, name, max_pixels)
                source.load()
                turn = _orientation(source)
            return _upright(_to_rgb(source, name), turn)
        with Image.open(_file(source, name)) as image:
            _refuse_huge(image, name, max_pixels)
            if draft_for is not None and image.format in ("JPEG", "MPO"):
                image.draft("RGB", _draft_size(image, draft_for))
            return _upright(_to_rgb(image, name), _orientation(image))
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: refused, too many pixels ({error})") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: {_unidentified(source)}") from None
    # Pillow's decoders meet arbitrary bytes here, and damaged ones raise OSError, SyntaxError,
    # ValueError, struct.error, IndexError, KeyError, MemoryError and more.
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: cannot be decoded ({text})") from error


def private(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> ImageSource:
    """What :func:`decode` may be given in another thread, whatever happens to the source meanwhile.

    Pillow images are decoded here, arrays and buffers copied; paths and bytes are returned as they
    are.

    Args:
        source: what :func:`decode` takes.
        max_pixels: larger Pillow images are refused.

    Raises:
        ImageError: a Pillow image cannot be decoded.
    """
    if isinstance(source, Image.Image):
        decoded = decode(source, max_pixels=max_pixels)
        own = decoded.copy() if decoded is source else decoded
        own.info.clear()  # above all the EXIF orientation, which is applied already
        return own
    if isinstance(source, np.ndarray):
        return source.copy()
    return bytes(source) if isinstance(source, bytearray | memoryview) else source


def name_of(source: object) -> str:
    """How messages name a picture: its path where it has one, control characters escaped."""
    if isinstance(source, str | os.PathLike):
        return _escaped(os.fspath(source))
    filename = getattr(source, "filename", None)
    if isinstance(filename, str) and filename:
        return _escaped(filename)
    return f"a picture given as {type(source).__name__}"


def _escaped(name: str) -> str:
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], name)


def _file(source: object, name: str) -> Any:
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        if not stat.S_ISREG(Path(source).stat().st_mode):  # to open a pipe may wait for ever
            raise ImageError(f"{name}: is a folder, a pipe or a device; expected an image file")
        return source
    raise ImageError(
        f"{name} cannot be decoded; expected a path, bytes, a Pillow image or a uint8 array "
        "(H, W, 3)"
    )


def _unidentified(source: Any) -> str:
    on_disk = isinstance(source, str | os.PathLike)
    size = Path(source).stat().st_size if on_disk else len(source)
    return "is empty (0 bytes)" if size == 0 else "is not an image file that Pillow reads"


def _from_array(pixels: NDArray[Any]) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ImageError(
            f"an array of shape {pixels.shape} and type {pixels.dtype} is not a picture; expected "
            "(H, W, 3), uint8, RGB"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def _refuse_huge(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{name}: refused, {image.width} x {image.height} pixels; expected at most "
            f"{max_pixels}, which guards against decompression bombs"
        )


def _orientation(image: Image.Image) -> Image.Transpose | None:
    # ImageOps.exif_transpose copies upright pictures whole and rewrites the EXIF block, which
    # fails on blocks that are damaged but irrelevant.
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block, of which Pillow's parser raises anything
        return None


def _upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _draft_size(image: Image.Image, preprocessing: Preprocessing) -> tuple[int, int]:
    """(W, H) in the file's own orientation below which the draft may not go."""
    if _orientation(image) in _SIDEWAYS:
        return preprocessing.resized_size((image.width, image.height))
    height, width = preprocessing.resized_size((image.height, image.width))
    return width, height


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BIT_AS_I):
        raise ImageError(
            f"{name}: its pixels are 32-bit or signed numbers without a defined white; expected 8 "
            "or 16 bit per channel"
        )
    values = np.asarray(image)
    # 0 stays 0, 65535 becomes 255, rounded to nearest.
    grey = ((values.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
