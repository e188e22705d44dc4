"""TensorRT on a card, from build to features: `make test-gpu`.

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
from regraft.verification import UnoptimisedGraph
from regraft_export.export_options import ExportOptions

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

Features = Mapping[str, NDArray[np.float32]]
Opened = Callable[..., Engine]


@pytest.fixture(params=["fp32", "fp16"])
def built(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    """A bundle whose engine was built, and passed its gate, on this machine."""
    folder = tmp_path / "bundle"
    bundles.export(folder, ExportOptions(layers=(1, 3), attentions=(2,), precision=request.param))
    bundle = Bundle.open(folder)
    planned = plan(bundle, "tensorrt", {"max-batch": "12", "level": "1"})
    with UnoptimisedGraph(bundle) as reference:
        found, reports = build(bundle, planned, bundles.batches(), reference)
    assert found.passed
    assert set(reports) == {"model", "baseline"}
    types = {"fp32": "FP32", "fp16": "FP16"}[request.param]
    assert set(reports["model"]["network"]["types"]) == {types}
    assert reports["model"]["engine"]["layers"] > 0
    return bundle


@pytest.fixture
def opened(built: Bundle) -> Opened:
    """``opened(optimize=True)``: the engine of its ``model``; optimize is CUDA graphs."""
    precision = built.manifest.precision

    def open_(optimize: bool = True, engine: str = "tensorrt") -> Engine:
        options = EngineOptions(optimize=optimize)
        return open_engine(built.graph("model"), engine, precision=precision, options=options)

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
    with opened(graphs) as engine, opened(engine="ort-cpu") as reference:
        assert engine.details()["cuda graphs"] == ("yes" if graphs else "no")
        for count in (1, 5, 12, 2, 13, 30, 1, 7):
            pixels = pictures.pixels(count, bundles.SIZE)
            right = reference.run(pixels)
            assert_equal(engine.run(pixels), right, built.manifest.precision)
        assert engine.details()["cuda graphs"] == ("yes" if graphs else "no")


def test_two_engines_in_two_threads(opened: Opened, built: Bundle) -> None:
    pixels = [pictures.pixels(count, bundles.SIZE) for count in (3, 8)]
    with opened(engine="ort-cpu") as reference:
        right = [reference.run(batch) for batch in pixels]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with opened() as engine:
                for _ in range(50):
                    found = engine.run(pixels[index])
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
    cuda = Cuda()
    batches = [pictures.pixels(count, bundles.SIZE) for count in (1, 2, 3, 5, 12)]
    with opened() as engine:
        for batch in batches:
            engine.run(batch)
        free, _ = cuda.call("cudaMemGetInfo")
        for turn in range(1000):
            engine.run(batches[turn % len(batches)])
        assert cuda.call("cudaMemGetInfo")[0] >= free - (1 << 20)
