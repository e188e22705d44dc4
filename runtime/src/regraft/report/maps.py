"""One image: the picture, norm maps and attention maps, before and after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.effect import Effect
from regraft.report.colours import ColourScale
from regraft.report.layer_maps import LayerMaps, MapScales, When, numbers_of, outline
from regraft.report.markup import Markup, clean, el, fragment, png_uri
from regraft.report.measurement import Measurement
from regraft.report.wording import cosine, count, counted, looked_at, short


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

    @property
    def maps(self) -> LayerMaps:
        return LayerMaps(self.found, self.i, self.found.manifest.detection_layer)

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
        return _tile(image, self.maps.outliers("before"), "As the model sees it", None)

    def _norms(self, when: When) -> Markup:
        note = self.maps.norms_note(when)
        image = _map(self.scales.norms, self.maps.norms(when), "norm", when, note)
        return _tile(image, self.maps.outliers(when), f"Norm, {when}", note)

    def _attention(self, when: When) -> Markup:
        note = self.maps.attention_note(when)
        image = _map(self.scales.attention, self.maps.attention(when), "attention", when, note)
        what = looked_at(self.found.manifest.tokens.class_token)
        title = f"{what[0].upper()}{what[1:]}, {when}"
        return _tile(image, self.maps.outliers(when), title, note)


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
        data_values=numbers_of(values),
    )


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
    path = outline(marked)
    if not path:
        return None
    # Twice, light over dark, so that it is seen on every colour.
    return fragment(el("path", d=path, class_=kind) for kind in ("under", "over"))
