from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.support.bench_picture import RESOLUTION, texts_and_bars

from regraft.bench_row import measure
from regraft.bundle import Bundle
from regraft.commands import bench
from regraft.engines import open_engine
from regraft.errors import GateError

Regraft = Callable[..., tuple[int, str, str]]


def test_the_table(regraft: Regraft, pristine_bundle: Path) -> None:
    code, out, err = regraft("bench", pristine_bundle, "--seconds", 0, "--rounds", 5)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "python:small.py:small, fp32, 16 x 16 pixels"
    assert lines[1].startswith("ort-cpu (onnxruntime ")
    assert lines[2] == "random pictures; --images takes yours"
    assert [line.split()[0] for line in lines[4:]] == ["1", "8"]
    assert all(line.split()[-1] == "5" for line in lines[4:])


def test_the_figures_fit_together(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path]
) -> None:
    code, out, err = regraft(
        *("bench", pristine_bundle, "--json", "--batch-sizes", "3,13", "--images", *photos),
        *("--seconds", 0.2, "--threads", 1),
    )
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["engine"] == "ort-cpu"
    assert said["engine_details"]["threads"] == "1"
    assert said["images"] == [str(photo) for photo in photos]
    assert [row["batch"] for row in said["batches"]] == [3, 13]
    for row in said["batches"]:
        assert row["rounds"] >= 10
        assert 0 < row["patched_ms"] <= row["patched_p99_ms"]
        assert 0 < row["baseline_ms"] <= row["baseline_p99_ms"]
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        rate = row["batch"] / row["patched_ms"] * 1000
        assert row["patched_images_per_second"] == pytest.approx(rate)
        assert row["on_device"] is None


def test_the_picture_shows_the_figures(
    regraft: Regraft, pristine_bundle: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "bench.svg"
    words = ("bench", pristine_bundle, "--json", "--batch-sizes", "1,4", "--seconds", 0.1)
    code, out, _ = regraft(*words, "--plot", picture)
    assert code == 0
    texts, bars = texts_and_bars(picture)
    each = []
    for row in json.loads(out)["batches"]:
        assert f"batch {row['batch']}" in texts
        assert any(text.startswith(f"{row['ratio']['median']:.3f} (") for text in texts)
        each += [row["baseline_ms"] / row["batch"], row["patched_ms"] / row["batch"]]
    assert bars == pytest.approx([e / max(each) for e in each], abs=RESOLUTION)
    assert "exists already" in regraft(*words, "--plot", picture)[2]
    again = [word for word in words if word != "--json"]
    code, out, _ = regraft(*again, "--plot", picture, "--force")
    assert (code, out.splitlines()[-1]) == (0, f"written: {picture}")
    code, _, err = regraft(*words, "--plot", tmp_path / "b.png")
    assert (code, "ends in '.png'; expected .svg" in err) == (2, True)


def test_images_that_cannot_be_read_are_counted_and_named(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], tmp_path: Path
) -> None:
    bad = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for path in bad:
        path.write_bytes(b"")
    code, out, err = regraft("bench", pristine_bundle, "--images", photos[0], *bad)
    assert (code, out) == (1, "")
    assert err == (
        f"regraft: 2 of 3 images could not be read: {bad[0]}: is empty (0 bytes); {bad[1]}: is "
        "empty (0 bytes)\n"
    )


def test_a_bundle_without_baseline_says_so(
    regraft: Regraft, tmp_path: Path, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(tmp_path / "lean", baseline=False)
    code, out, err = regraft("bench", bundle)
    assert (code, out) == (1, "")
    assert "holds no graph 'baseline', because it was exported with --no-baseline" in err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda array: array * 1.001, r"pooled of patched differs from what the extractor gives"),
        (lambda array: array * np.nan, r"pooled of patched holds NaN or Inf"),
    ],
    ids=["differs", "nan"],
)
def test_wrong_outputs_are_not_timed(
    pristine_bundle: Path, spoil: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    bundle = Bundle.open(pristine_bundle)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    with (
        open_engine(bundle.graph("baseline")) as baseline,
        open_engine(bundle.graph("model")) as patched,
    ):
        assert measure(bundle, baseline, patched, pixels, 0, 2).rounds == 2
        honest, calls = patched._run, 0

        def spoiled(images: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
            nonlocal calls
            calls += 1
            arrays = list(honest(images, outputs))
            if calls > 4:  # after the extractor's own run and the warm-up
                arrays[1] = spoil(arrays[1])
            return arrays

        patched._run = spoiled
        with pytest.raises(GateError, match=message):
            measure(bundle, baseline, patched, pixels, 0, 5)


def test_random_pictures_are_like_photographs() -> None:
    picture = np.asarray(bench._random_picture((64, 48), seed=1), np.float32)
    assert picture.shape == (64, 48, 3)
    neighbours = np.corrcoef(picture[:-1].ravel(), picture[1:].ravel())[0, 1]
    assert 0.8 < neighbours < 0.999
    other = np.asarray(bench._random_picture((64, 48), seed=2), np.float32)
    assert np.abs(picture - other).mean() > 10
