"""Axes, lines, steps and legends as SVG, drawn in units that stay readable on a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from regraft.report.markup import Content, Markup, el
from regraft.report.scales import Scale

WIDTH, HEIGHT = 480, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 44, 46
_DOT = 3


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        scale: its numbers.
        label: what they are, with the unit.
        ticks: the numbers that are written.
        number: how.
    """

    scale: Scale
    label: str
    ticks: Sequence[float]
    number: Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """How one row of numbers is drawn and called.

    Attributes:
        name: for the legend.
        style: CSS classes: a colour (before, after, register) and maybe dashed or area.
        shape: of its sample in the legend: line, dots (a line with dots), area or triangle.
    """

    name: str
    style: str
    shape: str = "line"


@dataclass(frozen=True)
class Plot:
    """The area between two axes."""

    x: Axis
    y: Axis

    def across(self, value: float) -> float:
        """Where a number lies horizontally."""
        return _LEFT + float(self.x.scale.place(value)) * (WIDTH - _LEFT - _RIGHT)

    def up(self, value: float) -> float:
        """Where a number lies vertically."""
        return HEIGHT - _BOTTOM - float(self.y.scale.place(value)) * (HEIGHT - _TOP - _BOTTOM)

    def line(
        self, series: Series, xs: Sequence[float], ys: Sequence[float], titles: Sequence[str] = ()
    ) -> Markup:
        """A line; ``titles`` puts a dot at every point, which shows its text on hovering."""
        points = " ".join(
            f"{self.across(x):.1f},{self.up(y):.1f}" for x, y in zip(xs, ys, strict=True)
        )
        dots = (
            el(
                "circle",
                el("title", title),
                cx=self.across(x),
                cy=self.up(y),
                r=_DOT if series.shape == "dots" else _DOT - 1.0,
            )
            for x, y, title in zip(xs, ys, titles, strict=True)
        )
        # A single point makes no line, but its dot shows.
        return el("g", el("polyline", points=points), dots if titles else None, class_=series.style)

    def steps(self, series: Series, edges: Sequence[float], counts: Sequence[int]) -> Markup:
        """A histogram's outline over the bins that hold something, filled if the style says so."""
        floor = HEIGHT - _BOTTOM
        path, inside = list[str](), False
        for left, right, number in zip(edges[:-1], edges[1:], counts, strict=True):
            start, y = self.across(left), self.up(number)
            if number:
                path.append(f"{'V' if inside else f'M{start:.1f},{floor}V'}{y:.1f}")
                path.append(f"H{self.across(right):.1f}")
            elif inside:
                path.append(f"V{floor}")
            inside = bool(number)
        path.append(f"V{floor}" if inside else "")
        return el("path", d="".join(path), class_=f"steps {series.style}")

    def points(
        self, series: Series, xs: Sequence[float], ys: Sequence[float], titles: Sequence[str]
    ) -> Markup:
        """Dots without a line, which show their text on hovering."""
        dots = (
            el("circle", el("title", title), cx=self.across(x), cy=self.up(y), r=_DOT + 1.5)
            for x, y, title in zip(xs, ys, titles, strict=True)
        )
        return el("g", dots, class_=series.style)

    def mark(self, x: float, name: str) -> Markup:
        """A vertical line with its name on top."""
        at = self.across(x)
        # The name stays within the chart, also at its ends.
        anchor = "end" if at > WIDTH * 0.85 else "middle" if at > WIDTH * 0.15 else None
        return el(
            "g",
            el("line", x1=at, x2=at, y1=_TOP - 6, y2=HEIGHT - _BOTTOM),
            el("text", name, x=at, y=_TOP - 11, class_=anchor),
            class_="mark",
        )

    def feet(self, series: Series, xs: Iterable[float]) -> Markup:
        """Triangles that stand on the horizontal axis."""
        return el(
            "g", (_triangle(self.across(x), HEIGHT - _BOTTOM) for x in xs), class_=series.style
        )

    def draw(self, name: str, *content: Content) -> Markup:
        """The SVG: grid and axes, then the content."""
        floor, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        rows = (self._row(tick, right) for tick in self.y.ticks)
        columns = (
            el(
                "text",
                self.x.number(tick),
                x=self.across(tick),
                y=floor + 18,
                class_="middle",
            )
            for tick in self.x.ticks
        )
        return el(
            "svg",
            el("g", rows, class_="grid"),
            el("g", columns),
            el("line", x1=_LEFT, x2=right, y1=floor, y2=floor, class_="axis"),
            el("text", self.y.label, x=0, y=12, class_="title"),
            el("text", self.x.label, x=(_LEFT + right) / 2, y=HEIGHT - 6, class_="title middle"),
            *content,
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=name,
        )

    def _row(self, tick: float, right: int) -> Markup:
        y = self.up(tick)
        return el(
            "g",
            el("line", x1=_LEFT, x2=right, y1=y, y2=y),
            el("text", self.y.number(tick), x=_LEFT - 7, y=y + 4, class_="end"),
        )


def legend(rows: Iterable[Series]) -> Markup:
    """What each style means."""
    return el("ul", (el("li", _sample(series), series.name) for series in rows), class_="legend")


def _sample(series: Series) -> Markup:
    shapes: dict[str, Content] = {
        "line": el("polyline", points="1,7 25,7"),
        "dots": (el("polyline", points="1,7 25,7"), el("circle", cx=13, cy=7, r=_DOT)),
        "area": el("rect", x=1, y=2, width=24, height=10),
        "triangle": _triangle(13, 12),
    }
    return el(
        "svg",
        el("g", shapes[series.shape], class_=series.style),
        viewBox="0 0 26 14",
        aria_hidden="true",
    )


def _triangle(x: float, y: float) -> Markup:
    return el("path", d=f"M{x - 5:.1f},{y:.1f}h10l-5,-9z")
