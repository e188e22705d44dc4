"""timm's evaluation transforms, and overrides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regraft.errors import ModelError
from regraft.preprocessing import Preprocessing
from regraft_export.sources.data_config import (
    CROP_MODES,
    PreprocessingOverrides,
    check_patches,
    from_data_config,
    override,
)

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CONFIG = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}
HALF = (0.5, 0.5, 0.5)


def by_timm(config: dict[str, Any], image: Image.Image) -> np.ndarray:
    transform = timm.data.create_transform(**config, is_training=False)
    return np.asarray(transform(image))


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_equals_timm(photos: list[Image.Image], crop_mode: str, interpolation: str) -> None:
    for size, crop_pct in (((224, 224), 0.875), ((98, 140), 0.9), ((97, 97), 1.0)):
        config = {
            **CONFIG,
            "input_size": (3, *size),
            "interpolation": interpolation,
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
        }
        preprocessing = from_data_config(config, "test")
        for photo in photos:
            np.testing.assert_array_equal(preprocessing(photo), by_timm(config, photo))


@settings(deadline=None, max_examples=150)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    target=st.tuples(st.integers(1, 48), st.integers(1, 48)),
    crop_pct=st.floats(0.3, 1),
    crop_mode=st.sampled_from(CROP_MODES),
    interpolation=st.sampled_from(INTERPOLATIONS),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.05, 1)] * 3),
)
def test_equals_timm_at_any_size(
    size: tuple[int, int], target: tuple[int, int], crop_mode: str, **rest: Any
) -> None:
    config = {**CONFIG, "input_size": (3, *target), "crop_mode": crop_mode, **rest}
    preprocessing = from_data_config(config, "test")
    if crop_mode == "border" and 0 in _timm_border_size(size, preprocessing):
        return  # timm itself fails: the picture would be empty
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(preprocessing(image), by_timm(config, image))


def _timm_border_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, ...]:
    ratio = max(a / b for a, b in zip(size, preprocessing.resize_size, strict=True))
    return tuple(round(edge / ratio) for edge in size)


def test_a_strip_that_timm_cannot_take_still_comes_out() -> None:
    strip = Image.fromarray(np.full((1, 1000, 3), 200, np.uint8))
    preprocessing = from_data_config({**CONFIG, "crop_mode": "border"}, "test")
    assert preprocessing(strip).shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mean": None, "crop_pct": None},
            "test: the preprocessing lacks mean, crop_pct; give --mean --crop-pct",
        ),
        ({"input_size": None}, "test: the preprocessing lacks input_size; give --image-size"),
        (
            {"croppct": 1},
            "test: the preprocessing has unknown names croppct; expected input_size, mean, std, "
            "interpolation, crop_pct, crop_mode",
        ),
        ({"input_size": (1, 8, 8)}, "test: input_size is (1, 8, 8); expected (3, H, W)"),
        (
            {"crop_mode": "centre"},
            "test: preprocessing: crop_mode is 'centre'; expected one of center, squash, border",
        ),
        (
            {"crop_pct": 1.5},
            "test: preprocessing: crop_pct is 1.5; expected a number above 0, at most 1",
        ),
        (
            {"crop_pct": 0},
            "test: preprocessing: crop_pct is 0; expected a number above 0, at most 1",
        ),
        (
            {"std": (0.5, 0.5, 0)},
            "test: preprocessing: std is (0.5, 0.5, 0); expected numbers above 0",
        ),
    ],
)
def test_bad_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        from_data_config({**CONFIG, **change}, "test")
    assert str(caught.value) == message


@pytest.mark.parametrize("change", [{"mean": 0.5}, {"interpolation": "random"}, {"mean": (1, 2)}])
def test_malformed_values_name_the_field(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"^test: preprocessing: "):
        from_data_config({**CONFIG, **change}, "test")


def test_overrides_go_over_a_config() -> None:
    overrides = PreprocessingOverrides(image_size=(32, 48), std=HALF, crop_pct=1.0)
    assert overrides.over(CONFIG) == {
        **CONFIG,
        "input_size": (3, 32, 48),
        "std": HALF,
        "crop_pct": 1.0,
    }
    assert PreprocessingOverrides().over(CONFIG) == CONFIG


CLIP = Preprocessing((224, 224), HALF, HALF, "shortest-edge", (256, 256), crop_offset="floor")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, {}),
        ({"mean": (0, 0, 0)}, {"mean": (0, 0, 0)}),
        ({"interpolation": "box"}, {"interpolation": "box"}),
        ({"image_size": (112, 112)}, {"image_size": (112, 112), "resize_size": (128, 128)}),
        (
            {"image_size": (112, 224)},
            {"image_size": (112, 224), "resize_size": (128, 256), "resize": "cover"},
        ),
        ({"crop_pct": 1.0}, {"resize_size": (224, 224)}),
        (
            {"crop_mode": "squash", "crop_pct": 0.5},
            {"resize_size": (448, 448), "resize": "exact", "crop_offset": "round"},
        ),
        (
            {"crop_mode": "border"},
            {"resize": "fit", "crop_offset": "round", "fill": (128, 128, 128)},
        ),
    ],
)
def test_overrides_of_other_preprocessing(
    overrides: dict[str, Any], expected: dict[str, Any]
) -> None:
    got = override(CLIP, PreprocessingOverrides(**overrides), "test")
    before = {name: getattr(CLIP, name) for name in CLIP.__dataclass_fields__}
    assert {name: getattr(got, name) for name in before} == {**before, **expected}


def test_bad_overrides_are_named() -> None:
    with pytest.raises(ModelError, match=r"^test: preprocessing: interpolation is 'cubic'"):
        override(CLIP, PreprocessingOverrides(interpolation="cubic"), "test")


def test_patches_must_fill_the_image() -> None:
    check_patches("test", (28, 42), (14, 14))
    with pytest.raises(ModelError) as caught:
        check_patches("test", (28, 43), (14, 14))
    assert str(caught.value) == (
        "test: the image size (28, 43) is no multiple of the patch size (14, 14); give another "
        "--image-size"
    )
