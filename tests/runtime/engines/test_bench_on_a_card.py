"""`regraft bench` on a fake card, whose clock says one millisecond for a run of the graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import fake_onnxruntime
from tests.support.bench_picture import RESOLUTION, texts_and_bars

from regraft import bench_row
from regraft.engines.ort_cuda.engine import OrtCudaEngine
from regraft.engines.ort_cuda.runner import LARGEST

Regraft = Callable[..., tuple[int, str, str]]


def words(bundle: Path, *more: object) -> tuple[object, ...]:
    sizes = f"3,{LARGEST + 1}"
    return ("bench", bundle, "--engine", "ort-cuda", "--batch-sizes", sizes, "--seconds", 0, *more)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The patched graph takes a quarter longer; collects how often each was run in a row."""
    honest = OrtCudaEngine._device_seconds
    taken: dict[str, list[int]] = {"model.onnx": [], "baseline.onnx": []}

    def slower(self: OrtCudaEngine, batch: int, runs: int) -> float:
        taken[self.graph.name].append(runs)
        return honest(self, batch, runs) * (1.25 if self.graph.name == "model.onnx" else 1)

    monkeypatch.setattr(OrtCudaEngine, "_device_seconds", slower)
    return taken


def test_the_device_is_timed_alone_too(
    ort: fake_onnxruntime.Module,
    regraft: Regraft,
    pristine_bundle: Path,
    runs: dict[str, list[int]],
) -> None:
    code, out, _ = regraft(*words(pristine_bundle, "--rounds", 3))
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert " ".join(lines[-3]).startswith("the device alone, by its own clock, nothing copied (")
    ratio = ["1.250", "(1.250", "to", "1.250)"]
    assert lines[-2] == ["3", "1.000", "1.250", *ratio, "2400.0", "3"]
    # Two pieces, of 64 and of 1.
    assert lines[-1] == [f"{LARGEST + 1}", "2.000", "2.500", *ratio, "26000.0", "3"]
    # Five milliseconds in a row, as often for both, once it is known how many runs that is.
    assert runs == {"baseline.onnx": [3, 5, 5, 5, 3, 2, 2, 2], "model.onnx": [5, 5, 5, 2, 2, 2]}


def test_the_picture_shows_the_device_beside_the_whole(
    ort: fake_onnxruntime.Module,
    regraft: Regraft,
    pristine_bundle: Path,
    tmp_path: Path,
    runs: dict[str, list[int]],
) -> None:
    picture = tmp_path / "bench.svg"
    code, out, _ = regraft(*words(pristine_bundle, "--json", "--plot", picture))
    assert code == 0
    rows = json.loads(out)["batches"]
    assert [row["on_device"]["patched_ms"] for row in rows] == [1.25, 2.5]
    texts, bars = texts_and_bars(picture)
    labels = [text for text in texts if text.startswith(("batch ", "device "))]
    assert labels == ["batch 3", "device alone", f"batch {LARGEST + 1}", "device alone"]
    assert texts.count("1.250 (1.250 to 1.250)") == 2
    each = [
        part[name] / row["batch"]
        for row in rows
        for part in (row, row["on_device"])
        for name in ("baseline_ms", "patched_ms")
    ]
    assert bars == pytest.approx([e / max(each) for e in each], abs=RESOLUTION)


def test_half_of_the_time_is_the_devices(
    ort: fake_onnxruntime.Module,
    regraft: Regraft,
    pristine_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []
    for name in ("race", "compare"):
        honest = getattr(bench_row, name)

        def recorded(
            *args: object, seconds: float, honest: Callable[..., object] = honest, **more: object
        ) -> object:
            asked.append(seconds)
            return honest(*args, seconds=0, **more)

        monkeypatch.setattr(bench_row, name, recorded)
    bench = ("bench", pristine_bundle, "--batch-sizes", 1, "--seconds", 8)
    assert regraft(*bench, "--engine", "ort-cuda")[0] == 0
    assert asked == [4, 4]
    assert regraft(*bench, "--engine", "ort-cpu")[0] == 0
    assert asked == [4, 4, 8]
