"""Colour tables for the maps, and the bars that say which colour is which number.

Both tables are perceptually uniform and ordered by lightness, so that they can be read with any
colour vision and in greyscale: viridis (norms) and magma (attention) of Smith and van der Walt,
public domain, interpolated between nine of their colours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regraft.report.markup import Markup, el
from regraft.report.scales import Scale

VIRIDIS = "440154 472d7b 3b528b 2c728e 21908c 27ad81 5dc863 aadc32 fde725"
MAGMA = "000004 1d1147 51127c 822681 b63679 e65164 fb8861 fec287 fcfdbf"

_WIDTH, _BAR, _TICK, _TEXT = 400, 14, 5, 13  # of a colour bar, in its own units
_EDGE = 16  # a label whose middle is nearer to an end is set flush with it


@dataclass(frozen=True)
class ColourScale:
    """Numbers to colours.

    Attributes:
        name: of the colour table.
        anchors: its colours, evenly spaced, as hex triplets between spaces.
        scale: the range of numbers.
        label: what the numbers are, with their unit.
        number: how a number is written.
    """

    name: str
    anchors: str
    scale: Scale
    label: str
    number: Callable[[float], str]

    def image(self, values: NDArray[np.float32], least_edge: int = 240) -> Image.Image:
        """A map of squares, one per value, enlarged without smoothing.

        Args:
            values: (rows, cols).
            least_edge: pixels that the longer edge gets, where whole squares allow it.

        Returns:
            A palette image, which as PNG is small.
        """
        factor = max(1, round(least_edge / max(values.shape)))
        levels = np.round(self.scale.place(values) * 255).astype(np.uint8)
        image = Image.fromarray(levels.repeat(factor, axis=0).repeat(factor, axis=1))
        image.putpalette(table(self.anchors).tobytes())  # turns L into P
        return image

    def bar(self, ident: str, marks: tuple[tuple[float, str], ...] = ()) -> Markup:
        """The colour bar with its ticks.

        Args:
            ident: unique in the page, for the gradient.
            marks: numbers pointed out above the bar, and their names.
        """
        top = _TEXT + 5 if marks else 0
        colours = self.anchors.split()
        stops = (
            el("stop", offset=i / (len(colours) - 1), stop_color=f"#{colour}")
            for i, colour in enumerate(colours)
        )
        bar = el("rect", x=0, y=top, width=_WIDTH, height=_BAR, fill=f"url(#{ident})", class_="bar")
        height = top + _BAR + _TICK + _TEXT + 3
        return el(
            "figure",
            el("figcaption", self.label),
            el(
                "svg",
                el("linearGradient", *stops, id=ident),
                bar,
                (self._mark(number, name, top) for number, name in marks),
                (self._tick(number, top + _BAR) for number in self.scale.ticks()),
                viewBox=f"0 0 {_WIDTH} {height}",
                role="img",
                aria_label=f"Colour bar: {self.label}, from {self.number(self.scale.lo)} to "
                f"{self.number(self.scale.hi)}",
            ),
            class_="colourbar",
        )

    def _x(self, number: float) -> float:
        return _WIDTH * float(self.scale.place(number))

    def _tick(self, number: float, y: int) -> Markup:
        x = self._x(number)
        return el(
            "g",
            el("line", x1=x, x2=x, y1=y, y2=y + _TICK, class_="axis"),
            _label(self.number(number), x, y + _TICK + _TEXT),
        )

    def _mark(self, number: float, name: str, top: int) -> Markup:
        x = self._x(number)
        return el(
            "g",
            el("line", x1=x, x2=x, y1=top - 4, y2=top + _BAR, class_="mark"),
            _label(name, x, top - 7, edge=3 * _EDGE),
        )


def _label(text: str, x: float, y: int, edge: int = _EDGE) -> Markup:
    anchor = None if x < edge else "end" if x > _WIDTH - edge else "middle"
    return el("text", text, x=x, y=y, class_=anchor)


def table(anchors: str) -> NDArray[np.uint8]:
    """256 colours between the anchors: uint8 (256, 3)."""
    colours = np.array([list(bytes.fromhex(c)) for c in anchors.split()], np.float64)
    places = np.linspace(0, 1, len(colours))
    wanted = np.linspace(0, 1, 256)
    columns: list[Any] = [np.interp(wanted, places, colours[:, i]) for i in range(3)]
    return np.round(np.stack(columns, axis=1)).astype(np.uint8)
