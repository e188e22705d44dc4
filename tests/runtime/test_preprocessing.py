"""Preprocessing: geometry, values, JSON and what is refused.

That it equals timm and transformers is tested where those may be imported: tests/export/sources.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regraft.cropping import CropOffset
from regraft.preprocessing import Interpolation, Preprocessing, ResizeRule

PLAIN = Preprocessing(
    image_size=(16, 24),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    resize="shortest-edge",
    resize_size=(32, 32),
)

sizes = st.tuples(st.integers(1, 60), st.integers(1, 60))
channels = st.floats(-2, 2, allow_nan=False)
preprocessings = st.builds(
    Preprocessing,
    image_size=sizes,
    mean=st.tuples(channels, channels, channels),
    std=st.tuples(*[st.floats(0.01, 3)] * 3),
    resize=st.sampled_from(get_args(ResizeRule)),
    resize_size=sizes,
    interpolation=st.sampled_from(get_args(Interpolation)),
    crop_offset=st.sampled_from(get_args(CropOffset)),
    fill=st.tuples(*[st.integers(0, 255)] * 3),
    rescale=st.sampled_from([1 / 255, 1.0, 1 / 127.5]),
)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@settings(deadline=None)
@given(preprocessings)
def test_json_round_trip(preprocessing: Preprocessing) -> None:
    text = json.dumps(preprocessing.to_json())
    assert Preprocessing.from_json(json.loads(text)) == preprocessing


@settings(deadline=None)
@given(preprocessings, sizes)
def test_any_picture_comes_out_in_the_right_shape(
    preprocessing: Preprocessing, size: tuple[int, int]
) -> None:
    picture = noise(*size)
    pixels = preprocessing(picture)
    view = preprocessing.view(picture)
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, *preprocessing.image_size)
    assert (view.mode, view.size) == ("RGB", preprocessing.image_size[::-1])
    levels = np.asarray(view).transpose(2, 0, 1) * preprocessing.rescale
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (preprocessing.mean, preprocessing.std))
    np.testing.assert_allclose(pixels, (levels - mean) / std, rtol=1e-5, atol=1e-4)


@settings(deadline=None)
@given(preprocessings, sizes)
def test_the_crop_is_the_centre(preprocessing: Preprocessing, size: tuple[int, int]) -> None:
    """Without resampling, the view is a window of the picture whose margins differ by one."""
    preprocessing = replace(preprocessing, resize="none")
    height, width = size
    # Every pixel says where it was; 0 is left for the fill.
    rows, cols = np.mgrid[1 : height + 1, 1 : width + 1]
    places = np.stack([rows, cols, np.full_like(rows, 255)], axis=-1).astype(np.uint8)
    preprocessing = replace(preprocessing, fill=(0, 0, 0))
    view = np.asarray(preprocessing.view(Image.fromarray(places)))
    for axis, (have, want) in enumerate(zip(size, preprocessing.image_size, strict=True)):
        seen = view[..., axis].max(axis=1 - axis)
        inside = seen[seen > 0]
        assert inside.tolist() == list(range(inside[0], inside[-1] + 1))
        assert len(inside) == min(have, want)
        if have >= want:
            before, after = inside[0] - 1, have - inside[-1]
        else:
            first = int(np.flatnonzero(seen)[0])
            before, after = first, want - have - first
        assert abs(int(before) - int(after)) <= 1


@pytest.mark.parametrize(
    ("offset", "have", "want", "expected"),
    [
        # Margins of 1, 3 and 5 pixels: halves are rounded to even, or down.
        ("round", 11, 10, 0),
        ("round", 13, 10, 2),
        ("round", 15, 10, 2),
        ("floor", 11, 10, 0),
        ("floor", 13, 10, 1),
        ("floor", 15, 10, 2),
    ],
)
def test_odd_margins(offset: CropOffset, have: int, want: int, expected: int) -> None:
    preprocessing = replace(
        PLAIN, image_size=(1, want), resize="none", crop_offset=offset, rescale=1.0
    )
    columns = np.tile(np.arange(have, dtype=np.uint8)[None, :, None], (1, 1, 3))
    assert preprocessing.view(Image.fromarray(columns)).getpixel((0, 0))[0] == expected


@pytest.mark.parametrize(("offset", "expected"), [("round", 1), ("floor", 2)])
def test_odd_padding(offset: CropOffset, expected: int) -> None:
    """A picture 3 wide in 6: one or two columns of fill come first."""
    preprocessing = replace(
        PLAIN, image_size=(1, 6), resize="none", crop_offset=offset, fill=(7, 8, 9)
    )
    view = np.asarray(preprocessing.view(Image.new("RGB", (3, 1), (200, 200, 200))))[0]
    filled = (view == (7, 8, 9)).all(axis=1)
    assert filled.tolist() == [*[True] * expected, False, False, False, *[True] * (3 - expected)]


@pytest.mark.parametrize(
    ("rule", "size", "expected"),
    [
        ("shortest-edge", (100, 299), (32, 95)),  # 95.68, rounded down
        ("shortest-edge", (299, 100), (95, 32)),
        ("shortest-edge", (50, 50), (32, 32)),
        ("cover", (100, 299), (32, 96)),
        ("fit", (100, 299), (11, 32)),
        ("fit", (1, 1000), (1, 32)),  # never empty
        ("exact", (100, 299), (32, 32)),
        ("none", (100, 299), (100, 299)),
    ],
)
def test_resize_rules(rule: ResizeRule, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert replace(PLAIN, resize=rule).resized_size(size) == expected


def test_cover_and_fit_with_unequal_sides() -> None:
    assert replace(PLAIN, resize="cover", resize_size=(20, 50)).resized_size((100, 100)) == (50, 50)
    assert replace(PLAIN, resize="fit", resize_size=(20, 50)).resized_size((100, 100)) == (20, 20)


@pytest.mark.parametrize("size", [(1, 12_000), (12_000, 1)])
def test_extremely_long_pictures_are_resized_in_a_window(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resized whole it would be 96 x 1152000 pixels; the window equals what the crop would take."""
    preprocessing = replace(PLAIN, image_size=(64, 80), resize_size=(96, 96))
    assert np.prod(preprocessing.resized_size(size)) > 1 << 26
    picture = noise(*size)
    window = np.asarray(preprocessing.view(picture)).astype(int)
    monkeypatch.setattr("regraft.preprocessing._MAX_RESIZED_PIXELS", 1 << 62)
    whole = np.asarray(preprocessing.view(picture)).astype(int)
    assert np.abs(window - whole).max() <= 1
    assert whole.std() > 10


def test_the_window_is_padded_like_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocessing = replace(
        PLAIN, image_size=(40, 64), resize="shortest-edge", resize_size=(32, 32), fill=(9, 8, 7)
    )
    # Smooth, because Pillow may swap its two passes for a window, and noise shows the rounding.
    picture = noise(5, 13).resize((130, 50), Image.Resampling.BICUBIC)
    whole = np.asarray(preprocessing.view(picture)).astype(int)
    monkeypatch.setattr("regraft.preprocessing._MAX_RESIZED_PIXELS", 0)
    window = np.asarray(preprocessing.view(picture)).astype(int)
    assert np.abs(window - whole).max() <= 1
    assert (whole[0] == (9, 8, 7)).all()


def test_writes_into_a_row_of_a_batch() -> None:
    batch = np.full((2, 3, *PLAIN.image_size), np.nan, np.float32)
    picture = noise(40, 50)
    assert PLAIN(picture, out=batch[1]).base is batch
    np.testing.assert_array_equal(batch[1], PLAIN(picture))
    assert np.isnan(batch[0]).all()


def test_other_modes_are_converted() -> None:
    grey = noise(40, 50).convert("L")
    np.testing.assert_array_equal(PLAIN(grey), PLAIN(grey.convert("RGB")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (0, 4)}, r"image_size is \(0, 4\); expected \(H, W\), integers from 1"),
        ({"image_size": (4.0, 4)}, r"image_size is \(4\.0, 4\)"),
        ({"resize_size": (4, 99_999)}, r"resize_size is \(4, 99999\); .* to 16384"),
        ({"resize": "crop"}, "resize is 'crop'; expected one of shortest-edge, cover, fit, exact"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; expected one of nearest, bilinear"),
        ({"crop_offset": "up"}, "crop_offset is 'up'; expected one of round, floor"),
        ({"mean": (0.5, 0.5)}, r"mean is \(0\.5, 0\.5\); expected three finite numbers"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean is .*nan.*; expected three finite numbers"),
        ({"std": (0.5, 0.5, "x")}, "std is .*'x'"),
        ({"std": (0.5, 0.0, 0.5)}, r"std is \(0\.5, 0\.0, 0\.5\); expected numbers above 0"),
        ({"rescale": 0.0}, r"rescale is 0\.0; expected a finite number above 0"),
        ({"rescale": True}, "rescale is True"),
        ({"fill": (0, 0, 256)}, r"fill is \(0, 0, 256\); expected three integers from 0 to 255"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **changes)


def _drop(*keys: str) -> Callable[[dict[str, Any]], Any]:
    def change(data: dict[str, Any]) -> Any:
        inner = data
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return data

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: [d], ValueError, "preprocessing is .*; expected an object"),
        (lambda d: {**d, "resize": 3}, ValueError, "resize is 3; expected an object"),
        (lambda d: {**d, "crop": None}, ValueError, "crop is None; expected an object"),
        (lambda d: {**d, "mean": 0.5}, ValueError, r"mean is 0\.5; expected a list"),
        (lambda d: {**d, "std": ["1", 1, 1]}, ValueError, "std is .*; expected three finite"),
        (lambda d: {**d, "image_size": [7]}, ValueError, r"image_size is \(7,\)"),
        (lambda d: {**d, "rescale": "1"}, ValueError, "rescale is '1'"),
        (_drop("image_size"), KeyError, "image_size"),
        (_drop("resize"), KeyError, "resize"),
        (_drop("resize", "interpolation"), KeyError, "interpolation"),
        (_drop("crop", "fill"), KeyError, "fill"),
        (_drop("rescale"), KeyError, "rescale"),
    ],
)
def test_malformed_json_is_refused(
    change: Callable[[dict[str, Any]], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Preprocessing.from_json(change(PLAIN.to_json()))
