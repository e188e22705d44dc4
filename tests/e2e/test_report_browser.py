"""`regraft report` in a real browser: Debian's chromium.

The page must raise nothing on the console, decode every picture, fetch nothing, fit a phone, and
read its maps out.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import handmade_vit
from tests.support.browser import OUTSIDE, Browser, luminance, require_chromium

from regraft.cli.main import main
from regraft_export.demo import sample_images_folder

SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
SCHEMES = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}
EVERYWHERE = pytest.mark.parametrize(
    ("size", "scheme"), [(size, scheme) for size in SIZES for scheme in SCHEMES]
)
IMAGES = 6
FIGURES = {
    "outlier_tokens": 123456,
    "removed": 0.5,
    "largest_over_median": 6.5,
    "register_norm": 155.25,
    "output_cosine_median": 0.9876,
    "output_cosine_smallest": 0.9765,
}
REPORT = {
    "images": 16,
    "output": "pooled",
    "before": {key: FIGURES[key] for key in ("outlier_tokens", "largest_over_median")},
    "after": FIGURES,
    "controls": dict.fromkeys(("random_neurons", "zero_token", "zeroed_without_register"), FIGURES),
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a model with planted register neurons, and images with trying names."""
    base = tmp_path_factory.mktemp("report")
    images = base / "images"
    (images / "a folder").mkdir(parents=True)
    names = [f"{i}.png" for i in range(IMAGES - 2)]
    names += [f"{'very-' * 40}long.png", '<img src=x onerror=alert(1)> & "quoted".png']
    for source, name in zip(sorted(sample_images_folder().iterdir()), names, strict=False):
        shutil.copy(source, images / "a folder" / name)
    neurons = {
        "schema": 1,
        "neurons": [{"layer": la, "index": i, "sign": s} for la, i, s in handmade_vit.PLANTED],
        "detection_layer": 2,
        "threshold": 16.0,
        "report": REPORT,
    }
    (base / "neurons.json").write_text(json.dumps(neurons))
    model = f"python:{Path(handmade_vit.__file__)}:planted"
    shown = ["--images", str(images)]
    found = ["--neurons", str(base / "neurons.json")]
    assert main(["export", model, *found, *shown, "--out", str(base / "bundle")]) == 0
    out = base / "report.html"
    assert main(["report", str(base / "bundle"), *shown, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(require_chromium(), tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@EVERYWHERE
def test_the_page_opens_without_a_complaint(
    browser: Browser, page: Path, size: str, scheme: str
) -> None:
    browser.open(page, SIZES[size], scheme)
    pictures = browser.evaluate(
        "Promise.all([...document.images].map((i) => i.decode().then(() => i.naturalWidth)))"
    )
    assert len(pictures) == 5 * IMAGES
    assert min(pictures) > 0
    # Everything at once: what is closed, and what lies below the screen.
    browser.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    browser.evaluate("scrollTo({top: document.body.scrollHeight, behavior: 'instant'})")
    assert browser.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert browser.evaluate(OUTSIDE) == []
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == SCHEMES[scheme]
    assert browser.complaints() == []
    assert browser.requested() == [page.resolve().as_uri()]


def test_small_text_stays_readable_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, SIZES["phone"], "light")
    heights = browser.evaluate(
        "[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect().height)"
    )
    assert min(heights) >= 10  # of a line: letters of about nine pixels


@EVERYWHERE
def test_texts_stand_out_from_the_ground(
    browser: Browser, page: Path, size: str, scheme: str
) -> None:
    browser.open(page, SIZES[size], scheme)
    pairs = browser.evaluate(
        """[...document.querySelectorAll("p, h1, h2, h3, td, th, dt, dd, a, summary, small, li,"
        + "figcaption, .chart text")].map((e) => [e.tagName, getComputedStyle(e)[
          e.tagName === "text" ? "fill" : "color"]])"""
    )
    ground = luminance(SCHEMES[scheme])
    for tag, colour in pairs:
        dark, light = sorted((luminance(colour), ground))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (tag, colour)  # WCAG 2.2, level AA


def test_pointing_at_a_patch_reads_its_numbers(browser: Browser, page: Path) -> None:
    browser.open(page, SIZES["desktop"], "light")
    assert not browser.evaluate("document.querySelector('.hint').hidden")
    browser.evaluate("document.querySelector('.sample').scrollIntoView({behavior: 'instant'})")
    box = browser.evaluate(
        "document.querySelectorAll('.sample .frame')[1].getBoundingClientRect().toJSON()"
    )
    row, col, side = 2, 1, 4
    x, y = (
        box[edge] + box[length] * (at + 0.5) / side
        for edge, length, at in (("x", "width", col), ("y", "height", row))
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    told = browser.evaluate("document.querySelector('.readout').textContent")
    maps = browser.evaluate(
        "[...document.querySelector('.sample').querySelectorAll('.map')].map("
        "(m) => m.dataset.values.split(' ').map(Number))"
    )
    at = [values[row * side + col] for values in maps]
    numbers = [float(n) for n in re.findall(r"[\d.]+(?:e-?\d+)?", told)]
    assert told.startswith("Row 2, column 1: norm ")
    assert numbers[:2] == [row, col]
    assert numbers[2:4] == pytest.approx(at[:2], rel=1e-3)
    assert numbers[4:] == pytest.approx([100 * share for share in at[2:]], rel=1e-2)
    cursors = browser.evaluate(
        "[...document.querySelector('.sample').querySelectorAll('.cursor')].map("
        "(c) => [c.getAttribute('x'), c.getAttribute('y'), c.getAttribute('visibility')])"
    )
    assert cursors == [["1", "2", "visible"]] * 5
    assert browser.complaints() == []


def test_the_browser_does_complain(browser: Browser, page: Path, tmp_path: Path) -> None:
    """The policy blocks, and what is blocked is seen by the tests above."""
    text = page.read_text(encoding="utf-8")
    added = "<script>alert(1)</script><img src='http://127.0.0.1:9/x.png'><p style='color:red'>"
    (tmp_path / "worse.html").write_text(text.replace("</main>", f"</main>{added}"))
    browser.open(tmp_path / "worse.html", SIZES["desktop"], "light")
    told = " ".join(browser.complaints())
    for directive in ("script-src", "img-src", "style-src"):
        assert directive in told
