"""The page of `regraft serve` in a real browser: Debian's chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support import handmade_vit
from tests.support.browser import OUTSIDE, Browser, luminance, require_chromium
from tests.support.server import Server, serving

from regraft.cli.main import main
from regraft_export.demo import sample_images_folder

SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
SCHEMES = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}
EVERYWHERE = pytest.mark.parametrize(
    ("size", "scheme"), [(size, scheme) for size in SIZES for scheme in SCHEMES]
)
IMAGES = sorted(sample_images_folder().iterdir())[:6]
KEY = "letters-and-numbers-123"
DONE = (
    "!$('#result').hidden && $('#status').textContent === '' "
    "&& !$('#latency').textContent.includes('…')"
)
QUERY = (
    "window.$ = (s) => document.querySelector(s); "
    "window.$$ = (s) => [...document.querySelectorAll(s)];"
)
SRC = "$$('.map').map((i) => i.src)"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of a model with planted register neurons: token, kv, and without a baseline."""
    base = tmp_path_factory.mktemp("bundles")
    neurons = {
        "schema": 1,
        "neurons": [{"layer": la, "index": i, "sign": s} for la, i, s in handmade_vit.PLANTED],
        "detection_layer": 2,
        "threshold": 16.0,
    }
    (base / "neurons.json").write_text(json.dumps(neurons))
    (base / "images").mkdir()
    for image in IMAGES:
        (base / "images" / image.name).write_bytes(image.read_bytes())
    model = f"python:{Path(handmade_vit.__file__)}:planted"
    words = ["export", model, "--neurons", str(base / "neurons.json")]
    words += ["--images", str(base / "images")]
    more = {"token": [], "kv": ["--variant", "kv"], "bare": ["--no-baseline"]}
    for name, options in more.items():
        assert main([*words, "--out", str(base / name), *options]) == 0
    return {name: base / name for name in more}


@pytest.fixture(scope="module")
def server(bundles: dict[str, Path]) -> Iterator[Server]:
    models = [f"{name}={path}" for name, path in bundles.items()]
    with serving(*models, "--max-body", 1) as started:
        yield started


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(require_chromium(), tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@dataclass
class Page:
    """The page, open in a browser."""

    browser: Browser
    origin: str

    def tell(self, expression: str) -> Any:
        return self.browser.evaluate(expression)

    def look(self, image: Path) -> None:
        self.browser.choose("#choose", image)
        self.browser.wait(f"$('#file').textContent === {json.dumps(image.name)} && {DONE}")

    def alert(self) -> str:
        self.browser.wait("$('#alert').textContent !== ''")
        return str(self.tell("$('#alert').textContent"))

    def choose(self, bundle: int) -> None:
        self.tell(f"$('#model').value = {bundle}; $('#model').dispatchEvent(new Event('change'))")


def opened(browser: Browser, server: Server, size: str = "desktop", scheme: str = "light") -> Page:
    page = Page(browser, f"http://127.0.0.1:{server.port}/")
    browser.open(page.origin, SIZES[size], scheme)
    page.tell(QUERY)
    return page


@pytest.fixture
def page(browser: Browser, server: Server) -> Page:
    page = opened(browser, server)
    browser.wait("$('#source').textContent !== ''")
    return page


@EVERYWHERE
def test_an_image_is_looked_at(browser: Browser, server: Server, size: str, scheme: str) -> None:
    page = opened(browser, server, size, scheme)
    page.look(IMAGES[0])
    pictures = page.tell(
        "Promise.all([...document.images].map((i) => i.decode().then(() => i.naturalWidth)))"
    )
    assert len(pictures) == 5
    assert min(pictures) > 0
    assert re.fullmatch(r"\d+ → \d+", page.tell("$('#outliers strong').textContent"))
    assert re.fullmatch(r"[\d.]+ → [\d.]+", page.tell("$('#latency strong').textContent"))
    page.tell("$$('details').forEach((d) => { d.open = true; })")
    assert page.tell("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.tell(OUTSIDE) == []
    assert page.tell("getComputedStyle(document.body).backgroundColor") == SCHEMES[scheme]
    # Letters of a colour bar and of the slider's numbers stay readable.
    heights = page.tell("$$('.bar text, #marks text').map((t) => t.getBoundingClientRect().height)")
    assert min(heights) >= 10
    assert browser.complaints() == []
    paths = ("", "page/models", *(f"page/models/token/versions/1/{w}" for w in ("maps", "latency")))
    assert browser.requested() == [page.origin + path for path in paths]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_texts_stand_out(browser: Browser, server: Server, scheme: str) -> None:
    page = opened(browser, server, scheme=scheme)
    page.look(IMAGES[0])
    pairs = page.tell(
        """$$("p, h2, h3, li *, b, label, figcaption, td, th, summary, svg text").map((e) =>
        [e.outerHTML.slice(0, 60), getComputedStyle(e)[e.tagName === "text" ? "fill" : "color"]])"""
    )
    ground = luminance(SCHEMES[scheme])
    for element, colour in pairs:
        dark, light = sorted((luminance(colour), ground))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (element, colour)  # WCAG 2.2, level AA


def test_everything_that_can_be_used_has_a_name(page: Page) -> None:
    page.look(IMAGES[0])
    nodes = page.browser.call("Accessibility.getFullAXTree")["nodes"]
    found: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            role = node["role"]["value"]
            found.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert len(found["slider"]) == len(found["combobox"]) == 1
    assert len(found["application"]) == 4
    for role in ("slider", "combobox", "application", "button", "heading", "image", "region"):
        assert all(found[role]), (role, found[role])
    assert found["application"][0].startswith("Norm of the patches, baseline, layer 2")


def test_a_dropped_image(page: Page) -> None:
    page.browser.drop((640, 700), IMAGES[1])
    page.browser.wait(DONE)
    assert page.tell("$('#file').textContent") == IMAGES[1].name
    assert not page.tell("document.body.classList.contains('dragging')")
    # The last one that is asked for is the one that is shown.
    page.browser.drop((640, 700), IMAGES[2])
    page.browser.drop((640, 700), IMAGES[3])
    page.browser.wait(f"$('#file').textContent === '{IMAGES[3].name}' && {DONE}")
    assert page.tell("$('#picture').alt").startswith(IMAGES[3].name)
    assert page.browser.complaints() == []


def test_a_pasted_image(page: Page) -> None:
    page.tell(
        """new Promise((done) => {
          const canvas = document.createElement("canvas");
          canvas.toBlob((blob) => {
            const data = new DataTransfer();
            data.items.add(new File([blob], "pasted.png"));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data}));
            done();
          });
        })"""
    )
    page.browser.wait(DONE)
    assert page.tell("$('#file').textContent") == "pasted.png"


def test_the_layer_is_changed_with_keys(page: Page) -> None:
    page.look(IMAGES[0])
    assert (
        page.tell("$('#layer-name').textContent")
        == "Layer 2, detection layer, has register neurons"
    )
    shown = page.tell(SRC)
    ratio = page.tell("$('#ratio strong').textContent")
    page.tell("$('#layer').focus()")
    page.browser.press("ArrowRight")
    assert page.tell("$('#layer').ariaValueText") == "Layer 3"
    assert page.tell("$('#layer-name').textContent") == "Layer 3"
    assert all(new != old for new, old in zip(page.tell(SRC), shown, strict=True))
    assert page.tell("$('#ratio strong').textContent") != ratio
    assert "output of layer 3" in page.tell("$('.bar figcaption').textContent")
    # Another image keeps the layer.
    page.look(IMAGES[1])
    assert page.tell("$('#layer-name').textContent") == "Layer 3"
    page.tell("$('#layer').focus()")
    page.browser.press("ArrowLeft")
    assert page.tell("$('#layer').value") == "2"
    assert page.browser.complaints() == []


def test_a_patch_is_read_with_keys_and_pointer(page: Page) -> None:
    page.look(IMAGES[0])
    page.tell("$('.pane .frame').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.browser.press(key)  # the first one enters the map
    told = page.tell("$('#readout').textContent")
    assert told.startswith("Row 1, column 1: norm ")
    cursors = page.tell(
        "$$('#result .cursor').map((c) => ['x', 'y', 'visibility'].map((n) => c.getAttribute(n)))"
    )
    assert cursors == [["1", "1", "visible"]] * 5
    page.tell("$('.groups').scrollIntoView({behavior: 'instant', block: 'end'})")
    box = page.tell("$$('.pane .frame')[3].getBoundingClientRect().toJSON()")
    x, y = box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.4
    page.browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert page.tell("$('#readout').textContent") == told
    assert page.browser.complaints() == []


def test_a_bad_image_is_told_and_the_last_good_one_stays(page: Page, tmp_path: Path) -> None:
    page.look(IMAGES[0])
    bad = tmp_path / "<b>notes.txt"
    bad.write_text("nothing to see")
    page.browser.choose("#choose", bad)
    assert page.alert() == (
        f"{bad.name} was not looked at.image: is not an image file that Pillow reads"
    )
    assert page.tell("$('#file').textContent") == IMAGES[0].name
    assert not page.tell("document.body.classList.contains('busy')")
    page.look(IMAGES[1])
    assert page.tell("$('#alert').textContent") == ""


def test_a_large_file_is_not_even_sent(page: Page, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(3 << 19))
    before = page.browser.requested()
    page.browser.choose("#choose", tmp_path / "large.png")
    assert page.alert().endswith("It has 1.5 MiB; this server takes at most 1 MiB (--max-body).")
    assert page.browser.requested() == before
    assert page.browser.complaints() == []


def test_another_bundle(page: Page) -> None:
    assert page.tell("$$('#model option').map((o) => o.text)") == ["token", "kv", "bare"]
    page.look(IMAGES[0])
    assert page.tell("$('#register span').textContent") == "CLS attention on the register"
    page.choose(1)
    page.browser.wait(
        f"$('#register span').textContent === 'CLS attention on the constants' && {DONE}"
    )
    assert "without a register" in page.tell("$('#aside').textContent")
    page.choose(2)
    told = page.tell("$('#obstacle').textContent")
    assert told.startswith("There are no maps of bare: the bundle was exported with --no-baseline")
    assert page.tell("$('#result').hidden && $('#drop').hidden && !$('#obstacle').hidden")
    page.choose(0)
    page.browser.wait(DONE)
    assert page.tell("$('#obstacle').hidden && !$('#drop').hidden")
    assert page.browser.complaints() == []


def test_the_key(browser: Browser, bundles: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    with serving(f"small={bundles['token']}", "--key-file", tmp_path / "key") as server:
        page = opened(browser, server)
        assert page.tell("!$('#key-form').hidden && $('#drop').hidden && $('#intro').hidden")
        assert page.tell("document.activeElement.id") == "key"
        assert browser.complaints() == []
        for wrong, told in (("no", "not the server's key"), ("nö", "printable ASCII")):
            _give(page, wrong)
            assert told in page.alert()
            assert page.tell("!$('#key-form').hidden")
            page.tell("$('#alert').replaceChildren()")
        _give(page, KEY)
        browser.wait("$('#key-form').hidden")
        page.look(IMAGES[0])
        assert page.tell("$('#alert').textContent") == ""
        # It is kept nowhere.
        assert (
            page.tell("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        )


def _give(page: Page, key: str) -> None:
    page.tell(f"$('#key').value = {json.dumps(key)}; $('#key-form button').click()")


def test_the_server_is_gone(browser: Browser, bundles: dict[str, Path]) -> None:
    with serving(f"small={bundles['token']}", "--drain-delay", 0) as server:
        page = opened(browser, server)
        browser.wait("$('#source').textContent !== ''")
        server.stop()
        browser.choose("#choose", IMAGES[0])
        assert page.alert().endswith("The server does not answer. Is it still running?")


def test_the_browser_does_complain(browser: Browser, server: Server) -> None:
    """The policy blocks, and what is blocked is seen by the tests above."""
    page = opened(browser, server)
    page.tell(
        """document.body.insertAdjacentHTML("beforeend",
          "<img src='http://127.0.0.1:9/x.png' onerror='alert(1)'><p style='color:red'>");
        document.body.append(Object.assign(document.createElement("script"), {text: "1"}))"""
    )
    browser.wait("true")
    told = " ".join(browser.complaints())
    for directive in ("script-src", "img-src", "style-src"):
        assert directive in told
