"""Scales, colour tables, markup and wording."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.effect import Effect, Norms
from regraft.report.colours import MAGMA, VIRIDIS, ColourScale, table
from regraft.report.markup import Markup, clean, el, fragment
from regraft.report.scales import Scale, log_scale, zero_scale
from regraft.report.wording import headline, percent, short

positive = st.floats(1e-12, 1e12)


@given(st.lists(positive, min_size=1, max_size=20))
def test_a_log_scale_holds_its_numbers(values: list[float]) -> None:
    scale = log_scale(values)
    places = scale.place(values)
    assert ((places >= 0) & (places <= 1)).all()
    assert (np.diff(scale.place(sorted(values))) >= 0).all()
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 10
    assert ticks == sorted(set(ticks))


@given(positive)
def test_a_zero_scale_holds_its_number(largest: float) -> None:
    scale = zero_scale(largest)
    assert scale.lo == 0
    assert largest <= scale.hi * (1 + 1e-9) <= 2 * largest * (1 + 1e-9)
    assert 3 <= len(scale.ticks()) <= 12


def test_ticks_are_round() -> None:
    assert Scale(1.3, 2100, "log").ticks() == [3, 10, 30, 100, 300, 1000]
    assert Scale(0.004, 0.006, "log").ticks() == pytest.approx(
        [0.004, 0.0045, 0.005, 0.0055, 0.006]
    )
    assert Scale(0, 0.2).ticks(0.15) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_degenerate_scales() -> None:
    assert log_scale([0, 0]).place([0.0]) == pytest.approx(0)
    assert log_scale([5, 5, 5]).place(5) == pytest.approx(0.5)
    assert zero_scale(0).hi == 1
    assert log_scale([0, 2, 8]).place([0, 2, 8, 99]).tolist() == [0, 0, 1, 1]
    for lo, hi, kind in ((0, 1, "log"), (2, 2, "linear"), (3, 2, "linear")):
        with pytest.raises(ValueError, match="no "):
            Scale(lo, hi, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("anchors", [VIRIDIS, MAGMA])
def test_colour_tables_are_even_in_lightness(anchors: str) -> None:
    colours = table(anchors)
    assert colours.shape == (256, 3)
    linear = np.where(
        colours / 255 <= 0.04045, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4
    )
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    steps = np.diff(lightness[::8])
    assert (steps > 0).all()
    # Both were made even in CAM02-UCS, which differs from L* in the darkest colours.
    assert steps[2:].max() < 2 * steps[2:].min()
    assert lightness[-1] - lightness[0] > 70


def test_a_map_is_made_of_squares() -> None:
    colours = ColourScale("viridis", VIRIDIS, Scale(0, 1), "label", short)
    image = colours.image(np.array([[0, 1, 0.5], [1, 0, 2]], np.float32), least_edge=30)
    assert image.size == (30, 20)
    pixels = np.asarray(image.convert("RGB"))
    assert pixels[0, 0].tolist() == pixels[9, 9].tolist() == [0x44, 0x01, 0x54]
    assert pixels[0, 10].tolist() == pixels[19, 29].tolist() == [0xFD, 0xE7, 0x25]


@given(st.text(), st.text())
def test_markup_escapes(content: str, value: str) -> None:
    made = el("p", content, title=value)
    assert isinstance(made, Markup)
    inside = made.removeprefix("<p title=").removesuffix("</p>")
    assert made.count("<") == 2
    assert made.count(">") == 2
    assert inside.count('"') == 2
    assert fragment(made) == made


def test_markup() -> None:
    made = el("g", "a", None, (el("br"), ["<", 3]), stroke_width=1.5, class_="x", id=None)
    assert made == '<g stroke-width="1.5" class="x">a<br>&lt;3</g>'
    for name in ("style", "onclick"):
        with pytest.raises(ValueError, match="policy"):
            el("p", **{name: "x"})
    assert clean("a\x00\n\u202e\ud800é") == "a\ufffd\ufffd\ufffd\ufffdé"


def test_numbers() -> None:
    assert [short(v) for v in (0, 1.23456, 12345.6, 999999.7, 1e9, 1e-7, 190.0)] == [
        *("0", "1.235", "12346", "1000000", "1.00e+09", "1.00e-07", "190"),
    ]
    assert [percent(v) for v in (0, 1, 0.5, 0.00012)] == ["0.0%", "100.0%", "50.0%", "0.012%"]


EFFECT = Effect(
    images=3,
    patches=300,
    detection_layer=2,
    threshold=9,
    before=Norms(outliers=10, median=2, largest=13),
    after=Norms(outliers=0, median=2, largest=3),
    register_norm=40,
    register_attention={2: 0.3},
    cosine_of="cls",
    cosine_median=0.98765,
    cosine_smallest=0.9,
)


@pytest.mark.parametrize(
    ("before", "after", "start"),
    [
        (10, 0, "The patch removes all 10 outlier tokens in 3 images; "),
        (1, 0, "The patch removes the only outlier token in 3 images; "),
        (1000, 2, "The patch removes 998 of 1,000 outlier tokens in 3 images and leaves 2; "),
        (4, 4, "The patch removes none of 4 outlier tokens in 3 images; "),
        (0, 0, "There are no outlier tokens in 3 images, neither before nor after the patch; "),
        (0, 2, "The patch makes outlier tokens more: 0 before, 2 after; "),
    ],
)
def test_headline(before: int, after: int, start: str) -> None:
    effect = replace(
        EFFECT,
        before=replace(EFFECT.before, outliers=before),
        after=replace(EFFECT.after, outliers=after),
    )
    assert headline(effect) == start + (
        "the largest patch norm falls from 6.50 to 1.50 times the median, and the CLS token keeps "
        "a median cosine of 0.9877 to the unpatched model."
    )


def test_headline_without_a_fall() -> None:
    assert "norm stays at 6.50 times" in headline(replace(EFFECT, after=EFFECT.before))
    assert "norm rises from 1.50 to 6.50 times" in headline(
        replace(EFFECT, before=EFFECT.after, after=EFFECT.before)
    )
