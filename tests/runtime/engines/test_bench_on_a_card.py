"""`regraft bench` on a fake card, whose clock says one millisecond for a run of the graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.support import fake_onnxruntime

from regraft.engines.ort_cuda.engine import OrtCudaEngine
from regraft.engines.ort_cuda.runner import LARGEST

Regraft = Callable[..., tuple[int, str, str]]


def words(bundle: Path, *more: object) -> tuple[object, ...]:
    sizes = f"3,{LARGEST + 1}"
    return ("bench", bundle, "--engine", "ort-cuda", "--batch-sizes", sizes, "--seconds", 0, *more)


def test_the_device_is_timed_alone_too(
    ort: fake_onnxruntime.Module, regraft: Regraft, pristine_bundle: Path, tmp_path: Path
) -> None:
    code, out, _ = regraft(*words(pristine_bundle, "--rounds", 3))
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert " ".join(lines[-3]) == "the device alone, by its own clock, nothing copied:"
    one = ["1.000", "(1.000", "to", "1.000)"]
    assert lines[-2] == ["3", "1.000", "1.000", *one, "3000.0", "3"]
    # Two pieces, of 64 and of 1.
    assert lines[-1] == [f"{LARGEST + 1}", "2.000", "2.000", *one, "32500.0", "3"]
    picture = tmp_path / "bench.svg"
    code, out, _ = regraft(*words(pristine_bundle, "--json", "--plot", picture))
    assert [row["device"]["patched_ms"] for row in json.loads(out)["batches"]] == [1, 2]
    texts = [node.text for node in ElementTree.parse(picture).getroot().iter() if node.text]
    assert texts.count("device alone") == 2


def test_each_graph_is_timed_by_itself(
    ort: fake_onnxruntime.Module,
    regraft: Regraft,
    pristine_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = OrtCudaEngine._device_seconds

    def slower(self: OrtCudaEngine, batch: int, runs: int) -> float:
        return honest(self, batch, runs) * (1.25 if self.graph.name == "model.onnx" else 1)

    monkeypatch.setattr(OrtCudaEngine, "_device_seconds", slower)
    code, out, _ = regraft(*words(pristine_bundle, "--json"))
    assert code == 0
    device = json.loads(out)["batches"][0]["device"]
    assert (device["baseline_ms"], device["patched_ms"]) == (1, 1.25)
    assert device["ratio"] == {"median": 1.25, "low": 1.25, "high": 1.25}
