"""What the picture of ``regraft bench --plot`` shows."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

RESOLUTION = 1e-3  # of a bar over the highest: tenths of a pixel, of 120 or more
_SPACE = "{http://www.w3.org/2000/svg}"


def texts_and_bars(picture: Path) -> tuple[list[str], list[float]]:
    """Every text, and every bar's height over the highest, in the order in which they stand."""
    root = ElementTree.parse(picture).getroot()
    texts = [node.text or "" for node in root.iter(f"{_SPACE}text")]
    # The first rectangle is the ground, the last two are the legend's.
    heights = [float(node.attrib["height"]) for node in root.iter(f"{_SPACE}rect")][1:-2]
    return texts, [height / max(heights) for height in heights]
