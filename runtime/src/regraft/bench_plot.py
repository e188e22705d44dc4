"""The figures of ``regraft bench`` as one SVG picture, written without a plotting library.

Bars are the median time per image, baseline beside patched, one pair for each batch size, and one
for the device alone where it has a clock; under a pair stands their ratio with its 95 % interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _TOP, _HEIGHT, _PAIR, _BAR = 64, 76, 240, 150, 44
_COLOURS = {"baseline": "#9aa5b1", "patched": "#2563eb"}


@dataclass(frozen=True)
class Pair:
    """One pair of bars: milliseconds per run, and patched over baseline with its interval."""

    label: str
    batch: int
    baseline_ms: float
    patched_ms: float
    ratio: tuple[float, float, float]


def svg(title: str, subtitle: str, pairs: Sequence[Pair]) -> str:
    """The picture.

    Args:
        title: first line.
        subtitle: second line, smaller.
        pairs: at least one.
    """
    top = max(max(p.baseline_ms, p.patched_ms) / p.batch for p in pairs)
    width = max(_LEFT + _PAIR * len(pairs) + 24, 560)
    height = _TOP + _HEIGHT + 84
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(16, 26, title, "start", 16),
        _text(16, 46, subtitle, "start", 11, "#52606d"),
        *_axis(top, width),
    ]
    for index, pair in enumerate(pairs):
        lines += _bars(pair, _LEFT + _PAIR * index + 24, top)
    lines += _legend(height)
    return "\n".join([*lines, "</svg>", ""])


def _axis(top: float, width: int) -> Iterator[str]:
    for part in range(5):
        value = top * part / 4
        y = _TOP + _HEIGHT - _HEIGHT * part / 4
        yield (f'<line x1="{_LEFT}" x2="{width - 16}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e7eb"/>')
        yield _text(_LEFT - 8, y + 4, f"{value:.3g}", "end", 11, "#52606d")
    yield _text(16, _TOP - 12, "ms per image", "start", 11, "#52606d")


def _bars(pair: Pair, x: float, top: float) -> Iterator[str]:
    for slot, (name, ms) in enumerate(
        (("baseline", pair.baseline_ms), ("patched", pair.patched_ms))
    ):
        each = ms / pair.batch
        high = _HEIGHT * each / top
        left, y = x + slot * (_BAR + 8), _TOP + _HEIGHT - high
        yield (
            f'<rect x="{left}" y="{y:.1f}" width="{_BAR}" height="{high:.1f}" '
            f'fill="{_COLOURS[name]}"/>'
        )
        yield _text(left + _BAR / 2, y - 4, f"{each:.3g}", "middle", 11)
    middle, base = x + _BAR + 4, _TOP + _HEIGHT
    yield _text(middle, base + 18, pair.label, "middle")
    median, low, high_end = pair.ratio
    ratio = f"{median:.3f} ({low:.3f} to {high_end:.3f})"
    yield _text(middle, base + 35, ratio, "middle", 11, "#52606d")


def _legend(height: int) -> Iterator[str]:
    x = _LEFT
    for name, colour in _COLOURS.items():
        yield f'<rect x="{x}" y="{height - 26}" width="12" height="12" fill="{colour}"/>'
        yield _text(x + 18, height - 16, name, "start", 12)
        x += 100
    yield _text(x, height - 16, "below: patched over baseline, 95 % interval", "start", 11)


def _text(
    x: float, y: float, text: str, anchor: str = "start", size: int = 13, fill: str = "#1f2933"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{fill}">{escape(text)}</text>'
    )
