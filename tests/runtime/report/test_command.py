"""`regraft report` as a command: options, bad input, and what is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from regraft.commands.report import named
from regraft.image_files import evenly

Regraft = Callable[..., tuple[int, str, str]]
Parse = Callable[[str], Any]


def test_no_baseline(
    regraft: Regraft, write_probed: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    bundle = write_probed(tmp_path / "lean", baseline=False)
    code, out, err = regraft("report", bundle, "--images", pictures, "--out", tmp_path / "r.html")
    assert (code, out) == (1, "")
    assert "holds no graph 'probe_baseline', because it was exported with --no-baseline" in err
    assert [path.name for path in tmp_path.iterdir()] == ["lean"]


def test_nan_is_an_error(
    regraft: Regraft, write_probed: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    bundle = write_probed(tmp_path / "bundle", nan=True)
    words = ("--images", pictures, "--out", tmp_path / "r.html", "--batch-size", 2)
    code, out, err = regraft("report", bundle, *words)
    assert (code, out) == (1, "")
    assert "of probe_baseline holds NaN or infinity for picture 0.png, picture 1.png;" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.fixture
def mixed(pictures: Path, tmp_path: Path) -> Path:
    """A folder of two good pictures and two bad ones."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in (0, 1):
        (folder / f"{i}.png").write_bytes((pictures / f"picture {i}.png").read_bytes())
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("not a picture")
    return folder


def test_unreadable_images_are_named_and_left_out(
    regraft: Regraft, probed: Path, mixed: Path, tmp_path: Path, parse: Parse
) -> None:
    out_file = tmp_path / "r.html"
    code, _, err = regraft("report", probed, "--images", mixed, "--out", out_file)
    assert code == 0
    assert [line.split(": ")[1] for line in err.splitlines()] == [
        str(mixed / "empty.jpg"),
        str(mixed / "text.png"),
    ]
    page = parse(out_file.read_text(encoding="utf-8"))
    assert [h.text for h in page.one("section", id="images").all("h3")] == ["0.png", "1.png"]
    images = page.one("section", id="reproduce").facts()["Images"]
    assert images == "2 images; could not be read and left out: empty.jpg, text.png"
    code, _, err = regraft(
        "report", probed, "--images", mixed, "--out", out_file, "--force", "--strict"
    )
    assert code == 1
    assert "2 of 4 images could not be read (named above)" in err


def test_no_image_can_be_read(regraft: Regraft, probed: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").touch()
    code, out, err = regraft("report", probed, "--images", tmp_path, "--out", tmp_path / "r.html")
    assert (code, out) == (1, "")
    assert "the only image could not be read" in err
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("name", ["r.htm", "r", "r.html/"])
def test_the_page_needs_its_suffix(
    regraft: Regraft, probed: Path, pictures: Path, tmp_path: Path, name: str
) -> None:
    out = f"{tmp_path}/{name}"
    code, _, err = regraft("report", probed, "--images", pictures, "--out", out)
    assert (code, "; expected .html" in err) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept(
    regraft: Regraft, probed: Path, pictures: Path, tmp_path: Path
) -> None:
    out_file = tmp_path / "r.html"
    out_file.write_text("precious")
    code, _, err = regraft("report", probed, "--images", pictures, "--out", out_file)
    assert code == 1
    assert "exists already; give --force" in err
    assert out_file.read_text() == "precious"
    code, _, _ = regraft("report", probed, "--images", pictures, "--out", out_file, "--force")
    assert code == 0
    assert out_file.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_json_and_a_fixed_date(
    regraft: Regraft,
    probed: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parse: Parse,
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    pages = []
    for batch_size in (1, 5):
        out_file = tmp_path / "r.html"
        words = ("--max-images", 3, "--batch-size", batch_size, "--force", "--json")
        code, out, _ = regraft("report", probed, "--images", pictures, "--out", out_file, *words)
        assert code == 0
        summary = json.loads(out)
        assert summary["bytes"] == out_file.stat().st_size
        assert summary["images"] == summary["effect"]["images"] == 3
        pages.append(parse(out_file.read_text(encoding="utf-8")))
    assert "Written 1970-01-02 00:00 UTC by regraft" in pages[0].one("footer").text
    for page in pages:
        facts = page.one("section", id="reproduce").facts()
        assert facts["Images"] == "3 images of 7, evenly spaced in their order"
        assert page.one("pre").text.endswith(" --max-images 3")
        assert [h.text for h in page.all("h3") if h.text.startswith("picture")] == [
            *("picture 0.png", "picture 2.png", "picture 4.png"),
        ]
    assert pages[0].one("h1").text == pages[1].one("h1").text


def test_the_date_is_now(
    regraft: Regraft, probed: Path, pictures: Path, tmp_path: Path, parse: Parse
) -> None:
    before = datetime.now(UTC).replace(second=0, microsecond=0)
    words = ("--images", pictures, "--out", tmp_path / "r.html", "--max-images", 1)
    assert regraft("report", probed, *words)[0] == 0
    text = parse((tmp_path / "r.html").read_text(encoding="utf-8")).one("footer").text
    written = datetime.strptime(text[8:24], "%Y-%m-%d %H:%M").replace(tzinfo=UTC)
    assert before <= written <= datetime.now(UTC)


def test_evenly() -> None:
    paths = [Path(str(i)) for i in range(10)]
    assert evenly(paths, 10) == evenly(paths, 99) == paths
    assert evenly(paths, 4) == [paths[i] for i in (0, 2, 5, 7)]
    assert evenly(paths, 1) == paths[:1]


def test_names_are_relative_to_their_folder(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "b" / "1.png", tmp_path / "2.png"]
    assert [s.name for s in named(paths, [str(tmp_path / "a"), str(paths[1])])] == [
        *("b/1.png", "2.png"),
    ]
