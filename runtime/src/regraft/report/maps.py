"""One image: the picture, norm maps and attention maps, before and after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from regraft.effect import Effect
from regraft.report.colours import MAGMA, VIRIDIS, ColourScale
from regraft.report.markup import Markup, clean, el, fragment, png_uri
from regraft.report.measure import Measurement, State
from regraft.report.scales import log_scale
from regraft.report.wording import (
    cosine,
    count,
    counted,
    looked_at,
    percent,
    short,
    stand_in,
    tick_percent,
)

When: TypeAlias = Literal["before", "after"]

# Attention below this part of the largest share is drawn as if it were this, lest a few patches
# that get next to nothing take most of the colours.
_FAINTEST = 1 / 1000


@dataclass(frozen=True)
class MapScales:
    """The two colour scales, each common to all images, before and after."""

    norms: ColourScale
    attention: ColourScale


def map_scales(found: Measurement) -> MapScales:
    """Scales that hold every patch of both states at the detection layer."""
    layer = found.manifest.detection_layer
    states = (found.before, found.after)
    norms = np.concatenate([s.norms[:, layer, found.patches].ravel() for s in states])
    shares = np.concatenate([s.attention[:, layer, found.patches].ravel() for s in states])
    shares = np.maximum(shares, shares.max() * _FAINTEST)
    what = looked_at(found.manifest.tokens.class_token)
    return MapScales(
        ColourScale(
            "viridis",
            VIRIDIS,
            log_scale(norms),
            f"L2 norm of a patch, output of layer {layer} (logarithmic)",
            short,
        ),
        ColourScale(
            "magma",
            MAGMA,
            log_scale(shares),
            f"Share of {what} on a patch, layer {layer} (logarithmic)",
            tick_percent,
        ),
    )


def samples(found: Measurement, scales: MapScales) -> Iterator[Markup]:
    """One block per image."""
    for i in range(len(found.samples)):
        yield _Block(found, scales, i).draw()


@dataclass(frozen=True)
class _Block:
    """The block of image ``i``."""

    found: Measurement
    scales: MapScales
    i: int

    def draw(self) -> Markup:
        sample = self.found.samples[self.i]
        effect = sample.effect
        facts = (
            f"{counted(effect.before.outliers, 'outlier token')} → "
            f"{count(effect.after.outliers)}; {self._register(effect)}"
            f"output cosine {cosine(effect.cosine_median)}"
        )
        return el(
            "article",
            el("header", el("h3", el("bdi", clean(sample.name))), el("p", facts)),
            self._picture(),
            self._norms("before"),
            self._norms("after"),
            self._attention("before"),
            self._attention("after"),
            el("p", class_="readout"),
            class_="sample",
        )

    def _register(self, effect: Effect) -> str:
        norm = effect.register_norm
        return "" if norm is None else f"register norm {short(norm)}; "

    def _picture(self) -> Markup:
        image = el(
            "img",
            src=png_uri(self.found.samples[self.i].picture),
            alt="The image as the model sees it",
        )
        return _tile(image, self._outliers("before"), "As the model sees it", None)

    def _norms(self, when: When) -> Markup:
        effect = self.found.samples[self.i].effect
        norms = effect.before if when == "before" else effect.after
        note = _note(("largest", short(norms.largest)), ("median", short(norms.median)))
        values = self._grid(self._state(when).norms)
        image = _map(self.scales.norms, values, "norm", when, note)
        return _tile(image, self._outliers(when), f"Norm, {when}", note)

    def _attention(self, when: When) -> Markup:
        values = self._grid(self._state(when).attention)
        if when == "before":
            other = ("outliers", float(values[self._outliers(when)].sum()))
        else:
            effect = self.found.samples[self.i].effect
            other = (
                stand_in(self.found.manifest.variant),
                effect.register_attention[effect.detection_layer],
            )
        note = _note(("patches", percent(float(values.sum()))), (other[0], percent(other[1])))
        what = looked_at(self.found.manifest.tokens.class_token)
        image = _map(self.scales.attention, values, "attention", when, note)
        return _tile(image, self._outliers(when), f"{what[0].upper()}{what[1:]}, {when}", note)

    def _state(self, when: When) -> State:
        return self.found.before if when == "before" else self.found.after

    def _grid(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The patches at the detection layer: (rows, cols)."""
        manifest = self.found.manifest
        patches = values[self.i, manifest.detection_layer, self.found.patches]
        return patches.reshape(manifest.tokens.grid)

    def _outliers(self, when: When) -> NDArray[np.bool_]:
        return self._grid(self._state(when).norms) > self.found.manifest.threshold


def _map(
    colours: ColourScale, values: NDArray[np.float32], kind: str, when: When, note: str
) -> Markup:
    """A map with its numbers beside it, for the script that reads them out."""
    return el(
        "img",
        src=png_uri(colours.image(values)),
        alt=f"Map of {kind} {when}: {note}",
        class_="map",
        data_kind=kind,
        data_values=" ".join(f"{value:.4g}" for value in values.ravel()),
    )


def _note(*figures: tuple[str, str]) -> str:
    # A line breaks between two figures, not between a figure and its name.
    return ", ".join(f"{name}\u00a0{number}" for name, number in figures)


def _tile(image: Markup, outliers: NDArray[np.bool_], title: str, note: str | None) -> Markup:
    """A picture with its outlier tokens outlined: (rows, cols) of the patch grid."""
    rows, cols = outliers.shape
    overlay = el(
        "svg",
        _outlines(outliers),
        viewBox=f"0 0 {cols} {rows}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    below = None if note is None else (el("br"), note)
    return el(
        "figure",
        el("div", image, overlay, class_="frame"),
        el("figcaption", el("b", title), below),
        class_="tile",
    )


def _outlines(marked: NDArray[np.bool_]) -> Markup | None:
    """The borders between marked patches and others: (rows, cols)."""
    path = []
    padded = np.pad(marked, 1)
    for row, col in np.argwhere(marked).tolist():
        around = padded[row : row + 3, col : col + 3]
        sides = {
            f"M{col},{row}h1": around[0, 1],
            f"M{col},{row + 1}h1": around[2, 1],
            f"M{col},{row}v1": around[1, 0],
            f"M{col + 1},{row}v1": around[1, 2],
        }
        path += [side for side, neighbour in sides.items() if not neighbour]
    if not path:
        return None
    # Twice, light over dark, so that it is seen on every colour.
    return fragment(el("path", d="".join(path), class_=kind) for kind in ("under", "over"))
