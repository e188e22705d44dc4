"""ort-cuda on a card, from export to features: `make test-gpu`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import bundles, constants, graphs, models, pictures
from tests.support.families import cases, planted_module, units_of
from tests.support.server import serving, tensor
from tests.support.small_families import SMALL

from regraft.building import build, plan
from regraft.bundle import Bundle
from regraft.engines import Engine, EngineOptions, open_engine
from regraft.engines.cuda_runtime import Cuda
from regraft.engines.ort_cuda.operators import (
    SUFFIX,
    compile_library,
    needs_operators,
)
from regraft.errors import GateError
from regraft.neurons import Neurons, RegisterNeuron
from regraft.parity import LIMITS, Meter
from regraft.redirect import RedirectOptions
from regraft_export.export_options import ExportOptions
from regraft_export.graph.cuda.choices import Choices
from regraft_export.graph.cuda.fuse import fuse, prepare
from regraft_export.graph.patch import Patch, Wanted
from regraft_export.reference import PyTorchReference
from regraft_export.trace import trace
from regraft_export.vit.structure import from_module

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

Features = Mapping[str, NDArray[np.float32]]
Opened = Callable[..., Engine]
OPTIONS = ExportOptions(layers=(1, 3), attentions=(2,))
# Families whose graphs differ; the others are fused in the same ways (test_cuda.py has them all).
DIFFERENT = (
    *("hub_dinov2", "hub_dinov2_g_reg", "hf_siglip", "hf_internvit", "open_clip"),
    *("hf_dinov3", "timm_dinov3", "timm_eva02", "timm_rope_mixed"),
)


def reference() -> PyTorchReference:
    """PyTorch with hooks, float32, on the CPU."""
    return PyTorchReference(bundles.vit(), bundles.found(), OPTIONS.redirect)


@pytest.fixture(
    params=[(kind, own) for kind in ("fp32", "fp16") for own in (False, True)],
    ids=lambda param: f"{param[0]}{' operators' if param[1] else ''}",
)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    """A bundle whose graphs for CUDA passed their gate on this machine."""
    precision, own = request.param
    options = ExportOptions(layers=(1, 3), attentions=(2,), precision=precision, operators=own)
    bundles.export(tmp_path / "bundle", options)
    bundle = Bundle.open(tmp_path / "bundle")
    planned = plan(bundle, "ort-cuda", {})
    found, reports = build(bundle, planned, bundles.batches(), reference())
    assert found.passed
    assert {report["graph"] for report in reports.values()} == {
        f"{graph}{SUFFIX if own else '.cuda.onnx'}" for graph in ("model", "baseline")
    }
    return bundle


def test_bf16_that_misses_its_limit_is_refused(tmp_path: Path) -> None:
    """As PyTorch does in bf16: 2.2e-2 behind the last block of the planted ViT, at most 2e-2."""
    bundles.export(tmp_path / "bundle", ExportOptions(layers=(1, 3), precision="bf16"))
    bundle = Bundle.open(tmp_path / "bundle")
    with pytest.raises(GateError, match=r"hidden\.3: relative error 2"):
        build(bundle, plan(bundle, "ort-cuda", {}), bundles.batches(), reference())


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
        assert engine.details()["graph"].endswith(".cuda.onnx")
        for count in (1, 5, 12, 2, 64, 67, 1, 7):
            pixels = pictures.pixels(count, bundles.SIZE)
            right = reference().run("model", pixels, list(engine.outputs))
            assert_equal(engine.run(pixels), right, built.manifest.precision)


@pytest.mark.parametrize("own", [False, True], ids=["", "operators"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", cases({name: SMALL[name] for name in DIFFERENT}))
def test_every_family_equals_the_cpu(name: str, precision: str, own: bool, tmp_path: Path) -> None:
    family = SMALL[name]
    size = (family.size, family.size)
    vit = from_module(models.livened(family.visual(planted_module(family))).eval(), size)
    neurons = Neurons(tuple(RegisterNeuron(*unit) for unit in units_of(family)))
    pixels = pictures.pixels(5, size)
    exact, traced = (prepare(trace(vit, size, kind)) for kind in ("fp32", precision))
    token = Patch(neurons, RedirectOptions())
    for patch in (None, token, replace(token, constants=constants.drawn(vit))):
        right = graphs.run_whole(
            fuse(exact, patch, Wanted()).proto, {"pixel_values": pixels}, optimize=False
        )
        fused = fuse(traced, patch, Wanted(), Choices(operators=own))
        file = tmp_path / f"model{SUFFIX if fused.fusions.operators else '.cuda.onnx'}"
        file.write_bytes(fused.proto.SerializeToString())
        assert needs_operators(file) == own
        if own:
            compile_library(tmp_path)
        with open_engine(file, "ort-cuda", precision=precision, built=tmp_path) as engine:
            for _ in range(3):  # as it is, recorded, replayed
                assert_equal(engine.run(pixels), right, precision)


def test_batches_on_their_way_do_not_meet(opened: Opened, built: Bundle) -> None:
    batches = [pictures.pixels(8, bundles.SIZE) + 0.1 * i for i in range(12)]
    with opened() as engine:
        right = [engine.run(batch) for batch in batches]
        started = [engine.start(batch) for batch in batches]  # two slots: most are taken over
        for finish, expected in zip(started, right, strict=True):
            for name, value in finish().items():
                np.testing.assert_array_equal(value, expected[name])


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


def test_serve_answers_while_it_reads_the_model_anew(built: Bundle) -> None:
    pytest.importorskip("uvicorn", reason="the server needs it")
    batches = [pictures.pixels(count, bundles.SIZE) for count in (1, 2, 3, 5, 8)]
    rights = [reference().run("model", batch, ["pooler_output"]) for batch in batches]
    failures: list[BaseException] = []
    words = (f"vit={built.path}", "--engine", "ort-cuda", "--model-control")
    with serving(*words) as server:

        def work(first: int) -> None:
            try:
                for turn in range(first, first + 25):
                    batch, right = batches[turn % len(batches)], rights[turn % len(batches)]
                    reply = server.infer("vit", {"inputs": [tensor(batch)]})
                    assert reply.status == 200, reply.body
                    found = {"pooler_output": reply.arrays["pooler_output"]}
                    assert_equal(found, right, built.manifest.precision)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            assert server.ask("POST", "/v2/repository/models/vit/load", {}).status == 200
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        assert server.stop() == 0
        assert not [line for line in server.lines if "ort-cuda" in line], server.lines


def test_a_thousand_runs_take_no_more_memory(opened: Opened) -> None:
    """The card tells what is free of all of it: nothing else may run there meanwhile."""
    cuda = Cuda(engine="ort-cuda")
    batches = [pictures.pixels(count, bundles.SIZE) for count in (1, 2, 3, 5, 12)]
    with opened() as engine:
        for batch in batches * 2:
            engine.run(batch)
        free, _ = cuda.call("cudaMemGetInfo")
        for turn in range(1000):
            engine.run(batches[turn % len(batches)])
        assert cuda.call("cudaMemGetInfo")[0] >= free - (1 << 20)
