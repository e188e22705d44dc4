"""The whole page: headline, charts, images, controls, parity, and how it was made."""

from __future__ import annotations

import base64
import hashlib
import platform
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources

import numpy as np
import PIL

from regraft import __version__
from regraft.bundle import Bundle
from regraft.report import figures, tables
from regraft.report.colours import ColourScale
from regraft.report.facts import bundle_facts, preprocessing_facts
from regraft.report.layer_maps import MapScales, map_scales
from regraft.report.maps import samples
from regraft.report.markup import Markup, clean, el, fragment
from regraft.report.measurement import Measurement
from regraft.report.wording import (
    cosine,
    count,
    counted,
    headline,
    looked_at,
    over_median,
    percent,
    short,
    stand_in,
)

_SECTIONS = {
    "set": "Over the set",
    "images": "Image by image",
    "controls": "Controls",
    "parity": "Parity",
    "bundle": "Bundle",
    "reproduce": "How to reproduce",
}
_ASIDE = {
    "token": "The register is not a patch and not on the maps; its norm and its share of the "
    "attention stand beside them.",
    "kv": "The constants that stand in for a register are no token and not on the maps; their "
    "share of the attention stands beside them.",
}


@dataclass(frozen=True)
class Origin:
    """How the page came about.

    Attributes:
        command: the words of the command line.
        given: how many images there were to choose from.
        left_out: the names of those that could not be read.
        written: when, with a time zone.
    """

    command: Sequence[str]
    given: int
    left_out: Sequence[str]
    written: datetime


def page(bundle: Bundle, found: Measurement, origin: Origin) -> str:
    """The HTML file's content."""
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; "
        f"script-src {_source(script)}; base-uri 'none'; form-action 'none'"
    )
    model = clean(found.manifest.model.get("source", "unknown model"))
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", f"regraft report: {model}"),
        el("style", Markup(style)),
    )
    contents = {
        "set": _over_the_set(found),
        "images": _image_by_image(found, map_scales(found, found.manifest.detection_layer)),
        "controls": tables.controls(bundle.neurons()),
        "parity": tables.parity(bundle),
        "bundle": tables.facts(bundle_facts(found.manifest, bundle.neurons())),
        "reproduce": _reproduce(found, origin),
    }
    body = el(
        "body",
        _header(found, model),
        el(
            "main",
            (
                el("section", el("h2", title), contents[key], id=key)
                for key, title in _SECTIONS.items()
            ),
        ),
        _footer(found, origin),
        el("script", Markup(script)),
    )
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"


def _header(found: Measurement, model: str) -> Markup:
    links = (el("a", title, href=f"#{key}") for key, title in _SECTIONS.items())
    return el(
        "header",
        el("p", "regraft report · ", el("bdi", model), class_="overline"),
        el("h1", headline(found.effect)),
        el("ul", _key_figures(found), class_="key"),
        el("nav", links, aria_label="Sections"),
        class_="top",
    )


def _key_figures(found: Measurement) -> Iterator[Markup]:
    effect = found.effect
    before, after = over_median(effect.before), over_median(effect.after)
    layer = effect.detection_layer
    what = looked_at(found.manifest.tokens.class_token)
    yield _key_figure(
        "Outlier tokens",
        f"{count(effect.before.outliers)} → {count(effect.after.outliers)}",
        f"of {counted(effect.patches, 'patch', 'patches')}",
    )
    yield _key_figure(
        "Largest patch norm ÷ median",
        f"{before:.2f} → {after:.2f}",
        f"largest {short(effect.before.largest)} → {short(effect.after.largest)}",
    )
    yield _key_figure(
        "Output cosine, median",
        cosine(effect.cosine_median),
        f"smallest {cosine(effect.cosine_smallest)}",
    )
    yield _key_figure(
        f"{what[0].upper()}{what[1:]} on the {stand_in(found.manifest.variant)}",
        percent(effect.register_attention[layer]),
        f"in layer {layer}"
        if effect.register_norm is None
        else f"in layer {layer}; register norm {short(effect.register_norm)}",
    )


def _key_figure(name: str, value: str, note: str) -> Markup:
    return el("li", el("span", name), el("strong", value), el("small", note))


def _over_the_set(found: Measurement) -> Markup:
    charts = (
        figures.histogram(found),
        figures.profile(found),
        figures.attention(found),
        figures.outputs(found),
    )
    return fragment(
        el("div", charts, class_="charts"),
        el("details", el("summary", "The numbers by layer"), tables.by_layer(found)),
    )


def _image_by_image(found: Measurement, scales: MapScales) -> Markup:
    threshold = found.manifest.threshold
    return fragment(
        el(
            "p",
            "Every image has the same two colour scales, before and after. Outlined patches are "
            "outlier tokens in that state (in the picture: before). "
            + _ASIDE[found.manifest.variant],
            el("span", " Point at a patch to read its numbers.", class_="hint", hidden=""),
        ),
        el(
            "div",
            scales.norms.bar(
                "norms", _inside(scales.norms, threshold, f"threshold {short(threshold)}")
            ),
            scales.attention.bar(
                "attention",
                _inside(scales.attention, 1 / found.manifest.tokens.count, "evenly spread"),
            ),
            class_="colourbars",
        ),
        samples(found, scales),
    )


def _inside(colours: ColourScale, number: float, name: str) -> tuple[tuple[float, str], ...]:
    """A mark on a colour bar, if it lies on it."""
    return ((number, name),) if colours.scale.lo < number < colours.scale.hi else ()


def _reproduce(found: Measurement, origin: Origin) -> Markup:
    shown, given = len(found.samples), origin.given
    which = f"{counted(shown, 'image')}"
    if shown + len(origin.left_out) < given:
        which += f" of {count(given)}, evenly spaced in their order"
    if origin.left_out:
        names = ", ".join(clean(name) for name in origin.left_out)
        which += f"; could not be read and left out: {names}"
    return fragment(
        el("pre", el("code", clean(shlex.join(origin.command)))),
        tables.facts(
            [
                ("Images", which),
                ("Engine", clean(found.engine)),
                *preprocessing_facts(found.manifest.preprocessing),
            ]
        ),
    )


def _footer(found: Measurement, origin: Origin) -> Markup:
    made = (
        f"Written {origin.written.strftime('%Y-%m-%d %H:%M %Z')} by regraft {__version__}, Python "
        f"{platform.python_version()}, numpy {np.__version__}, Pillow {PIL.__version__}, "
        f"{found.engine}."
    )
    colours = (
        "Colours of the maps: viridis (norms) and magma (attention), perceptually uniform, "
        "interpolated between nine of their colours."
    )
    return el("footer", el("p", made), el("p", colours))


def _asset(name: str) -> str:
    return resources.files("regraft.report").joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
