"""What stands in the page: the numbers of `regraft verify`, every section, nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regraft.bundle import Bundle
from regraft.images import decode
from regraft.report.colours import VIRIDIS, table
from regraft.report.markup import png_uri
from regraft.report.measure import PICTURE_EDGE, Source, measure
from regraft.report.measurement import Measurement
from regraft.report.wording import headline, percent

Regraft = Callable[..., tuple[int, str, str]]
MakePage = Callable[..., Any]


@pytest.fixture(scope="module")
def page(make_page: MakePage, probed: Path, pictures: Path) -> Any:
    return make_page(probed, pictures)


@pytest.fixture(scope="module")
def found(probed: Path, pictures: Path) -> Measurement:
    sources = [Source(path, path.name) for path in sorted(pictures.iterdir())]
    return measure(Bundle.open(probed), sources)


def section(page: Any, ident: str) -> Any:
    return page.one("section", id=ident)


def test_every_section_is_there(page: Any) -> None:
    titles = [h.text for h in page.all("h2")]
    assert titles == [
        *("Over the set", "Image by image", "Controls", "Parity", "Bundle", "How to reproduce"),
    ]
    links = {a.attributes["href"] for a in page.one("nav").all("a")}
    assert links == {f"#{s.attributes['id']}" for s in page.all("section")}
    assert len(section(page, "set").all("figure", class_="chart")) == 4
    assert len(page.all("article")) == 7


def test_the_key_figures_are_those_of_verify(
    regraft: Regraft, page: Any, probed: Path, pictures: Path
) -> None:
    code, out, _ = regraft("verify", probed, "--images", pictures, "--json")
    assert code == 0
    effect = json.loads(out)["effect"]
    before, after = effect["before"], effect["after"]
    assert before["outliers"] > after["outliers"] == 0
    strong = [node.text for node in page.one("ul", class_="key").all("strong")]
    ratios = [f"{n['largest'] / n['median']:.2f}" for n in (before, after)]
    assert strong == [
        f"{before['outliers']} → 0",
        f"{ratios[0]} → {ratios[1]}",
        f"{effect['cosine_median']:.4f}",
        f"{effect['register_attention']['2'] * 100:.1f}%",
    ]
    title = page.one("h1").text
    assert title.startswith(
        f"The patch removes all {before['outliers']} outlier tokens in 7 images"
    )
    assert f"from {ratios[0]} to {ratios[1]} times the median" in title
    assert f"median cosine of {effect['cosine_median']:.4f}" in title


def test_the_numbers_by_layer(page: Any, found: Measurement) -> None:
    rows = section(page, "set").rows()[1:]
    assert [row[0] for row in rows] == ["0 ▲", "1 ▲", "2"]
    for i, row in enumerate(rows):
        before = found.before.norms[:, i, 1:]
        after, register = found.after.norms[:, i, 1:-1], found.after.norms[:, i, -1]
        expected = [np.median(before), np.median(after), before.max(), after.max()]
        assert row[1:6] == [f"{value:.4g}" for value in (*expected, np.median(register))]
        share = found.after.attention[:, i, -1].mean()
        assert row[6] == f"{share * 100:.1f}%"
        assert float(row[6][:-1]) == pytest.approx(
            100 * found.effect.register_attention[i], abs=0.06
        )


def test_the_picture_is_what_the_model_sees(page: Any, probed: Path, pictures: Path) -> None:
    preprocessing = Bundle.open(probed).manifest.preprocessing
    for article, path in zip(page.all("article"), sorted(pictures.iterdir()), strict=True):
        assert article.one("h3").text == path.name
        shown = _image(article.all("img")[0])
        assert np.array_equal(np.asarray(shown), np.asarray(preprocessing.view(decode(path))))


def test_maps_hold_the_norms_and_shares(page: Any, found: Measurement) -> None:
    for i, article in enumerate(page.all("article")):
        maps = article.all("img", class_="map")
        states = (found.before.norms, found.after.norms)
        states += (found.before.attention, found.after.attention)
        for image, state in zip(maps, states, strict=True):
            values = np.array(image.attributes["data-values"].split(), float)
            assert values == pytest.approx(state[i, 2, 1:65], rel=1e-3)


def test_all_norm_maps_share_one_scale(page: Any, found: Measurement) -> None:
    colours = table(VIRIDIS)
    norms = np.concatenate([found.before.norms[:, 2, 1:], found.after.norms[:, 2, 1:65]], axis=1)
    lo, hi = np.log(norms.min()), np.log(norms.max())
    for article in page.all("article"):
        for image in article.all("img", class_="map")[:2]:
            values = np.log(np.array(image.attributes["data-values"].split(), float)).reshape(8, 8)
            pixels = np.asarray(_image(image).convert("RGB"))
            assert pixels.shape == (240, 240, 3)
            assert (pixels.reshape(8, 30, 8, 30, 3) == pixels[::30, ::30][:, None, :, None]).all()
            expected = colours[np.round((values - lo) / (hi - lo) * 255).astype(int)].astype(int)
            assert np.abs(pixels[::30, ::30] - expected).max() <= 4  # values have four digits


def test_outlier_tokens_are_outlined_and_counted(page: Any, found: Measurement) -> None:
    for i, article in enumerate(page.all("article")):
        count = int(found.outliers(found.before)[i].sum())
        assert count
        word = "token" if count == 1 else "tokens"
        assert f"{count} outlier {word} → 0" in article.one("header").text
        before, after = article.all("img", class_="map")[:2]
        tiles = article.all("figure", class_="tile")
        for tile in (tiles[0], tiles[1], tiles[3]):
            path = tile.one("path", class_="over").attributes["d"]
            values = np.array(before.attributes["data-values"].split(), float).reshape(8, 8)
            assert _enclosed(path) == {(r, c) for r, c in np.argwhere(values > 10).tolist()}
        assert not tiles[2].all("path")
        assert not tiles[4].all("path")
        assert float(after.attributes["alt"].split("largest\u00a0")[1].split(",")[0]) <= 6.001


def test_the_register_stands_beside_the_maps(page: Any, found: Measurement) -> None:
    for i, article in enumerate(page.all("article")):
        share = float(found.after.attention[i, 2, -1])
        caption = article.all("figcaption")[-1].text
        assert f"register\u00a0{percent(share)}" in caption
        patches = float(found.after.attention[i, 2, 1:65].sum())
        assert f"patches\u00a0{percent(patches)}" in caption


def test_controls_and_parity(page: Any) -> None:
    rows = section(page, "controls").rows()
    assert rows[1:3] == [
        ["as it is", "12", "\u2013", "5.12", "\u2013", "\u2013", "\u2013"],
        ["redirected", "0", "100.0%", "1.25", "77.5", "0.9876", "0.9765"],
    ]
    assert [row[0] for row in rows[3:]] == [
        "control: as many random neurons, redirected",
        "control: a plain zero token, no redirect",
        "control: the neurons zeroed, no register",
    ]
    assert "on 9 images used neither for scoring" in section(page, "controls").text
    parity = section(page, "parity")
    assert parity.rows()[1:] == [
        ["model", "last_hidden_state", "5.9e-07", "0.999998", "0.999997", "passed"],
        ["baseline", "pooler_output", "6.9e-07", "\u2013", "0.999996", "passed"],
        [
            *("probe, probe_baseline", "2 outputs, the largest error"),
            *("3.5e-07", "\u2013", "\u2013", "passed"),
        ],
        ["limit", "", "≤ 1e-04", "≥ 0.9999", "≥ 0.999", ""],
    ]
    assert "PyTorch with hooks, float32 on 12 images: passed." in parity.text


def test_bundle_and_how_to_reproduce(page: Any, probed: Path, pictures: Path) -> None:
    facts = section(page, "bundle").facts()
    assert facts["Model"] == "python:small.py:small"
    assert facts["Register neurons"] == "3 neurons: 1 in layer 0, 2 in layer 1"
    assert facts["Redirect"] == "value per-neuron; cls zero; patches zero; 1 register; scale 1"
    assert facts["Outlier token"] == "patch norm above 10 at the output of layer 2"
    made = section(page, "reproduce")
    assert made.one("pre").text.startswith(f"regraft report {probed} --images {pictures} --out ")
    assert made.facts()["Images"] == "7 images"
    assert made.facts()["Resize"] == "shorter edge to 32, bicubic"
    assert made.facts()["Normalise"] == (
        "grey levels \u00d7 0.00392157, mean 0.5, 0.5, 0.5, std 0.25, 0.25, 0.25"
    )


def test_nothing_is_fetched(page: Any) -> None:
    assert not page.all("link")
    assert not page.all("iframe")
    for node in page.all():
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            address = node.attributes.get(name, "")
            assert address.startswith(("data:image/png;base64,", "#")) or not address
        assert "style" not in node.attributes
        assert not any(name.startswith("on") for name in node.attributes)
    style, script = page.one("style").text, page.one("script").text
    assert not re.search(r"url\(|@import|@font-face", style)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|eval\(", script)
    assert "src" not in page.one("script").attributes
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    for text in (style, script):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


HOSTILE = "a&b <script>alert(1)<!-- \"'> \u202egnp.png"


def test_names_are_escaped(
    make_page: MakePage, write_probed: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    evil = "python:<img src=x onerror=alert(2)>.py:f"
    report = {"output": "<b>x</b>", "before": None, "after": [], "controls": {"</table><i>": {}}}
    bundle = write_probed(tmp_path / "bundle", model=evil, report=report)
    folder = tmp_path / "<u>in"
    folder.mkdir()
    shutil.copy(next(pictures.iterdir()), folder / HOSTILE)
    page = make_page(bundle, folder)
    # The direction override is no printable character and would turn the text that follows.
    assert page.one("article").one("h3").text == HOSTILE.replace("\u202e", "\ufffd")
    assert section(page, "bundle").facts()["Model"] == evil
    assert "control: </table><i>" in section(page, "controls").text
    assert str(folder) in section(page, "reproduce").one("pre").text
    assert len(page.all("script")) == 1
    for name in ("i", "u"):
        assert not page.all(name)
    assert all(image.attributes["src"].startswith("data:") for image in page.all("img"))


def test_a_name_that_is_not_utf8(
    make_page: MakePage, probed: Path, pictures: Path, tmp_path: Path
) -> None:
    shutil.copy(next(pictures.iterdir()), tmp_path / "caf\udce9\n.png")
    page = make_page(probed, tmp_path)
    assert page.one("article").one("h3").text == "caf\ufffd\ufffd.png"


def test_without_class_token(
    make_page: MakePage, write_probed: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    page = make_page(write_probed(tmp_path / "bundle", class_token=False), pictures)
    assert "CLS" not in page.one("body").text.replace("cls zero", "")
    assert "Mean attention of the patches, before" in page.all("article")[0].text


def test_what_is_missing_is_said(
    make_page: MakePage, write_probed: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    page = make_page(write_probed(tmp_path / "b", report=None), pictures)
    assert "has no report of regraft find (a hand-made list" in section(page, "controls").text
    assert not section(page, "controls").all("table")


def test_nothing_stands_out(
    make_page: MakePage, write_probed: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    page = make_page(
        write_probed(tmp_path / "bundle", threshold=1e6), pictures, "--max-images", "1"
    )
    assert page.one("h1").text.startswith("There are no outlier tokens in this image, neither")
    assert not page.all("path", class_="over")


def test_the_size_of_a_page() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (PICTURE_EDGE, PICTURE_EDGE, 3), np.uint8)
    maps = 4 * 37 * 37 * 10 + 4 * 4000  # numbers and pictures of 37 x 37 patches
    assert 16 * (len(png_uri(Image.fromarray(noise))) + maps) < 7_500_000


def test_the_headline_is_printed(
    regraft: Regraft, probed: Path, pictures: Path, tmp_path: Path, found: Measurement
) -> None:
    code, out, err = regraft("report", probed, "--images", pictures, "--out", tmp_path / "r.html")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == headline(found.effect)


def _image(node: Any) -> Image.Image:
    data = node.attributes["src"].removeprefix("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def _enclosed(path: str) -> set[tuple[int, int]]:
    """The cells of an 8 x 8 grid that have an odd number of vertical lines to their left."""
    vertical = {(int(x), int(y)) for x, y in re.findall(r"M(\d+),(\d+)v1", path)}
    return {
        (row, col)
        for row in range(8)
        for col in range(8)
        if sum((x, row) in vertical for x in range(col + 1)) % 2
    }
