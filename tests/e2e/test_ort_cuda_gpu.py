"""ort-cuda on a card, from export to features: `make test-gpu`.

Written without a card at hand and not run yet, but for its collection.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import bundles, pictures

from regraft.building import build, plan
from regraft.bundle import Bundle
from regraft.engines import Engine, EngineOptions, open_engine
from regraft.engines.cuda_runtime import Cuda
from regraft.parity import LIMITS, Meter
from regraft_export.exporting import ExportOptions
from regraft_export.reference import PyTorchReference

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

Features = Mapping[str, NDArray[np.float32]]
Opened = Callable[..., Engine]
OPTIONS = ExportOptions(layers=(1, 3), attentions=(2,))


def reference() -> PyTorchReference:
    """PyTorch with hooks, float32, on the CPU."""
    return PyTorchReference(bundles.vit(), bundles.found(), OPTIONS.redirect)


@pytest.fixture(params=["fp32", "fp16", "bf16"])
def built(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    """A bundle whose graphs for CUDA passed their gate on this machine."""
    options = ExportOptions(layers=(1, 3), attentions=(2,), precision=request.param)
    bundles.export(tmp_path / "bundle", options)
    bundle = Bundle.open(tmp_path / "bundle")
    planned = plan(bundle, "ort-cuda", {})
    found, reports = build(bundle, planned, bundles.batches(), reference())
    assert found.passed
    assert {report["graph"] for report in reports.values()} == {
        "model.cuda.onnx",
        "baseline.cuda.onnx",
    }
    return bundle


@pytest.fixture
def opened(built: Bundle) -> Opened:
    """``opened(optimize=True)``: the engine of its ``model``; optimize is CUDA graphs."""

    def open_(optimize: bool = True) -> Engine:
        return open_engine(
            built.graph("model"),
            "ort-cuda",
            precision=built.manifest.precision,
            options=EngineOptions(optimize=optimize),
            variants=built.variants("model"),
        )

    return open_


def assert_equal(found: Features, right: Features, precision: str) -> None:
    for name, value in found.items():
        meter = Meter("model", name, True)
        meter.update(right[name], value)
        assert not meter.result(LIMITS[precision]).failures


@pytest.mark.parametrize("graphs", [True, False])
def test_changing_batches_give_the_references_features(
    opened: Opened, built: Bundle, graphs: bool
) -> None:
    with opened(graphs) as engine:
        assert engine.details()["graph"] == "model.cuda.onnx"
        for count in (1, 5, 12, 2, 64, 67, 1, 7):
            pixels = pictures.pixels(count, bundles.SIZE)
            right = reference().run("model", pixels, list(engine.outputs))
            assert_equal(engine.run(pixels), right, built.manifest.precision)


def test_two_engines_in_two_threads(opened: Opened, built: Bundle) -> None:
    pixels = [pictures.pixels(count, bundles.SIZE) for count in (3, 8)]
    names = ["last_hidden_state", "pooler_output"]
    right = [reference().run("model", batch, names) for batch in pixels]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with opened() as engine:
                for _ in range(50):
                    found = engine.run(pixels[index], names)
                    assert_equal(found, right[index], built.manifest.precision)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_thousand_runs_take_no_more_memory(opened: Opened) -> None:
    cuda = Cuda(engine="ort-cuda")
    batches = [pictures.pixels(count, bundles.SIZE) for count in (1, 2, 3, 5, 12)]
    with opened() as engine:
        for batch in batches * 2:
            engine.run(batch)
        free, _ = cuda.call("cudaMemGetInfo")
        for turn in range(1000):
            engine.run(batches[turn % len(batches)])
        assert cuda.call("cudaMemGetInfo")[0] >= free - (1 << 20)
