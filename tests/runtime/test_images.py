"""Decoding: every kind of picture a folder may hold, and every kind of damage."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regraft.errors import ImageError, InputError
from regraft.image_files import list_images
from regraft.images import decode, name_of, private
from regraft.preprocessing import Preprocessing

HALF = (0.5, 0.5, 0.5)


def texture(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(
        0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8
    )
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb_png(width: int, height: int) -> bytes:
    """A PNG that promises many pixels in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "bytearray", "pillow", "array"])
def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path, kind: str) -> None:
    picture = texture(37, 53)
    path = tmp_path / "a.png"
    picture.save(path)
    source = {
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "pillow": Image.open(path),
        "array": np.asarray(picture),
    }[kind]
    decoded = decode(source)
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(picture))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "PNG"),
        ("L", "JPEG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "TIFF"),
        ("LAB", "TIFF"),
    ],
)
def test_other_modes_are_what_plain_conversion_gives(tmp_path: Path, mode: str, kind: str) -> None:
    picture = texture(24, 31)
    picture = Image.merge("LAB", picture.split()) if mode == "LAB" else picture.convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    path = tmp_path / f"a.{kind.lower()}"
    picture.save(path, kind)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(path)), expected)
    assert expected.std() > 5, "a flat reference would prove nothing"


def test_palette_with_transparency_drops_it() -> None:
    picture = texture(16, 16).quantize(8)
    data = encoded(picture, "PNG", transparency=0)
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(data)), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_greyscale_is_scaled_not_clipped(kind: str) -> None:
    deep = np.linspace(0, 0xFFFF, 64 * 64).reshape(64, 64).astype(np.uint16)
    decoded = np.asarray(decode(encoded(Image.fromarray(deep), kind)))
    np.testing.assert_array_equal(decoded[..., 0], np.round(deep / 257.0))
    assert (decoded[..., 0] == decoded[..., 2]).all()
    assert (decoded[0, 0, 0], decoded[-1, -1, 0]) == (0, 255)


def test_big_endian_sixteen_bit(tmp_path: Path) -> None:
    path = tmp_path / "deep.pgm"
    path.write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 0x8000, 0xFFFF))
    assert np.asarray(decode(path))[0, :, 0].tolist() == [128, 255]


@pytest.mark.parametrize(
    "pixels",
    [
        np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4),
        np.full((4, 4), 70000, np.int32),
        np.full((4, 4), -1, np.int32),
        np.arange(16, dtype=np.int32).reshape(4, 4),
    ],
    ids=["float", "above 16 bit", "negative", "as if 8 bit"],
)
def test_pixels_without_a_white_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "deep.tiff"
    Image.fromarray(pixels).save(path)
    with pytest.raises(ImageError, match="without a defined white; expected 8 or 16 bit") as caught:
        decode(path)
    assert str(path) in str(caught.value)
    for picture in (Image.open(path), Image.fromarray(pixels)):
        with pytest.raises(ImageError, match="without a defined white"):
            decode(picture)


def test_sixteen_bit_files_that_pillow_opens_as_32_bit() -> None:
    deep = np.array([[0, 200, 0x8000, 0xFFFF]], np.uint16)
    data = encoded(Image.fromarray(deep), "PPM")
    assert Image.open(io.BytesIO(data)).mode == "I"
    png = Image.open(io.BytesIO(data))
    png.format = "PNG"  # as Pillow 10 opens it
    for source in (data, png, private(png)):
        assert np.asarray(decode(source))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    # Red top left, green top right, blue bottom left: where they are says how it lies.
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :32, 0], upright[:16, 32:, 1], upright[16:, :32, 2] = 255, 255, 255
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo(upright)))
    decoded = np.asarray(decode(encoded(stored, kind, exif=exif)))
    assert decoded.shape == upright.shape
    corners = decoded[[8, 8, 24], [16, 48, 16]].astype(int)
    assert corners.argmax(axis=1).tolist() == [0, 1, 2]
    assert corners.max(axis=1).min() > 150


def test_damaged_exif_does_not_matter() -> None:
    picture = texture(16, 24)
    data = encoded(picture, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert decode(data).size == (24, 16)


def test_first_frame_of_animations() -> None:
    first, second = texture(20, 20, 1), texture(20, 20, 2)
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"save_all": True, "append_images": [second], "duration": 50}
        if kind == "WEBP":
            options["lossless"] = True
        data = encoded(first, kind, **options)
        with Image.open(io.BytesIO(data)) as image:
            assert image.n_frames == 2
        got = np.asarray(decode(data)).astype(int)
        to_first, to_second = (np.abs(got - np.asarray(p)).mean() for p in (first, second))
        assert to_first < to_second / 4, kind


def test_one_pixel() -> None:
    assert decode(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_files_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"cut.{kind.lower()}"
    data = encoded(texture(200, 200), kind)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError) as caught:
        decode(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "is empty (0 bytes)"), (b"only text\n", "is not an image file that Pillow reads")],
)
def test_empty_and_foreign_files(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        decode(path)
    assert str(caught.value) == f"{path}: {expected}"
    with pytest.raises(ImageError) as caught:
        decode(content)
    assert str(caught.value) == f"a picture given as bytes: {expected}"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        decode(tmp_path / "none.jpg")
    assert str(caught.value) == f"{tmp_path / 'none.jpg'}: no such file"


@pytest.mark.timeout(60)
def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)  # nobody writes: whoever opened it would wait for ever
    for path in (pipe, str(pipe), tmp_path, "/dev/null"):
        with pytest.raises(ImageError) as caught:
            decode(path)
        message = f"{path}: is a folder, a pipe or a device; expected an image file"
        assert str(caught.value) == message
    picture, link = tmp_path / "a.png", tmp_path / "b.png"
    texture(8, 9).save(picture)
    link.symlink_to(picture)
    assert decode(link).size == (9, 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(30_000, 30_000), (10_000, 9_000)])
def test_decompression_bombs_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb_png(*size))
    with pytest.raises(ImageError, match=r"bomb\.png: refused, .* pixels"):
        decode(path)


def test_the_limit_on_pixels_is_an_argument() -> None:
    data = encoded(texture(20, 30), "PNG")
    assert decode(data, max_pixels=600).size == (30, 20)
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(ImageError, match="refused, 30 x 20 pixels; expected at most 599"):
            decode(source, max_pixels=599)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=str,
)
def test_other_arrays_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ImageError) as caught:
        decode(pixels)
    assert str(caught.value) == (
        f"an array of shape {pixels.shape} and type {pixels.dtype} is not a picture; expected "
        "(H, W, 3), uint8, RGB"
    )


def test_other_objects_are_refused() -> None:
    with pytest.raises(
        ImageError, match="a picture given as int cannot be decoded; expected a path"
    ):
        decode(3)  # type: ignore[arg-type]


def test_names() -> None:
    assert name_of(Path("a/b.png")) == str(Path("a/b.png"))
    assert name_of("x.jpg") == "x.jpg"
    assert name_of(Image.new("RGB", (1, 1))) == "a picture given as Image"


def test_names_are_one_line(tmp_path: Path) -> None:
    assert name_of("a\nb\x1b[31m\x85\u2028.jpg") == r"a\nb\x1b[31m\x85\u2028.jpg"
    assert name_of(r"C:\é 'ü'.jpg") == r"C:\é 'ü'.jpg"
    for ask in (decode, list_images):
        with pytest.raises(InputError) as caught:
            ask(tmp_path / "a\nb.jpg")
        assert str(caught.value).startswith(rf"{tmp_path}/a\nb.jpg: no such file")


def damaged_exif() -> bytes:
    block = b"MM\0*\0\0\0\x08\0\x02" + struct.pack(">HHII", 0x010F, 2, 999, 9999)
    return encoded(texture(16, 24), "JPEG", exif=b"Exif\0\0" + block)


def transparent_palette() -> bytes:
    return encoded(texture(16, 24).quantize(8), "PNG", transparency=bytes(range(8)))


def test_the_command_line_keeps_pillows_warnings_to_itself(
    tmp_path: Path, pristine_bundle: Path
) -> None:
    for name, data, warning in (
        ("exif.jpg", damaged_exif(), "Corrupt EXIF data"),
        ("palette.png", transparent_palette(), "Palette images with Transparency"),
    ):
        with pytest.warns(UserWarning, match=warning):
            decode(data)
        (tmp_path / name).write_bytes(data)
    words = ["extract", pristine_bundle, tmp_path, "--out", tmp_path / "features.npz"]
    command = [sys.executable, "-m", "regraft", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert all(line.startswith("regraft") for line in done.stderr.splitlines()), done.stderr


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_threads_share_a_lazy_picture(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(texture(1500, 1500), kind, exif=exif)
    expected = np.asarray(decode(data))
    for _ in range(3):
        shared = Image.open(io.BytesIO(data))
        with ThreadPoolExecutor(4) as executor:
            for decoded in executor.map(decode, [shared] * 4):
                np.testing.assert_array_equal(np.asarray(decoded), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_private_pictures_are_upright_and_independent(mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = texture(16, 24)
    if mode != "RGB":
        deep = np.asarray(picture)[..., 0].astype(np.uint16) * 257
        picture = Image.fromarray(deep) if mode == "I;16" else picture.convert(mode)
    source = Image.open(io.BytesIO(encoded(picture, "PNG", exif=exif)))
    expected = np.asarray(decode(source))
    own = private(source)
    source.paste(0, (0, 0, *source.size))
    assert expected.shape == (24, 16, 3)
    np.testing.assert_array_equal(np.asarray(decode(own)), expected)


def test_private_buffers_are_copies() -> None:
    pixels, buffer = np.zeros((2, 2, 3), np.uint8), bytearray(b"abc")
    own, own_view = private(pixels), private(memoryview(buffer))
    own_buffer = private(buffer)
    pixels[:], buffer[:] = 1, b"xyz"
    assert (own.max(), own_buffer, own_view) == (0, b"abc", b"abc")
    assert private("a.jpg") == "a.jpg"


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1600, 1200), (400, 300)), ((500, 400), (500, 400)), ((4000, 520), (2000, 260))],
)
def test_draft_never_goes_below_what_preprocessing_resizes_to(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    preprocessing = Preprocessing((224, 224), HALF, HALF, "shortest-edge", (256, 256))
    data = encoded(texture(size[1], size[0]), "JPEG", quality=90)
    drafted = decode(data, draft_for=preprocessing)
    assert drafted.size == expected
    plain, fast = preprocessing(decode(data)), preprocessing(drafted)
    assert np.abs(plain - fast).mean() < 0.05


def test_draft_of_a_turned_photo() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Preprocessing((100, 400), HALF, HALF, "exact", (100, 400))
    # Upright it is 400 wide and 800 high: nothing can be spared of the width.
    data = encoded(texture(400, 800), "JPEG", exif=exif)
    assert decode(data, draft_for=wide).size == (400, 800)
    tall = Preprocessing((400, 100), HALF, HALF, "exact", (400, 100))
    assert decode(data, draft_for=tall).size == (200, 400)


def test_draft_leaves_other_formats_alone() -> None:
    small = Preprocessing((10, 10), HALF, HALF, "exact", (10, 10))
    assert decode(encoded(texture(80, 80), "PNG"), draft_for=small).size == (80, 80)


def test_folders_are_searched_sorted_and_by_suffix(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/z.png", "a/b.webp", "notes.txt", ".hidden.jpg", ".git/x.png", "c"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    expected = [tmp_path / "a/b.webp", tmp_path / "a/z.png", tmp_path / "b.JPG"]
    assert list_images(tmp_path) == expected
    assert list_images([tmp_path / "notes.txt", str(tmp_path / "a")]) == [
        tmp_path / "notes.txt",
        *expected[:2],
    ]
    assert list_images(tmp_path, suffixes=[".txt"]) == [tmp_path / "notes.txt"]


def test_missing_paths_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        list_images([tmp_path / "none"])
    assert str(caught.value) == f"{tmp_path / 'none'}: no such file or folder; expected images"
    (tmp_path / "readme.txt").touch()
    with pytest.raises(
        InputError, match=r"the folder holds no images; expected files with .*\.png"
    ):
        list_images(tmp_path)
    with pytest.raises(InputError, match="no images named"):
        list_images([])
