"""Verification of a real bundle: the planted ViT, exported once per run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import bundles, pictures

from regraft import engines
from regraft.bundle import Bundle
from regraft.engines import EngineOptions
from regraft.engines.ort_cpu import OrtCpuEngine
from regraft.errors import EngineError, GateError
from regraft.manifest import Manifest
from regraft.parity import Comparison
from regraft.redirect import RedirectOptions
from regraft.verification import UnoptimisedGraph, Verification, verify
from regraft_export.reference import PyTorchReference

Pixels = NDArray[np.float32]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(bundles.exported(tmp_path_factory))


def pixels() -> list[Pixels]:
    """Pictures that the export has not seen."""
    return [pictures.pixels(4, bundles.SIZE, first=70), pictures.pixels(2, bundles.SIZE, first=80)]


class Skewed(OrtCpuEngine):
    """An engine that computes one output wrongly."""

    name = "skewed"
    output, factor = "last_hidden_state", 1.01
    graphs: tuple[str, ...] = ("model.onnx",)

    def _run(self, pixels: Pixels, outputs: Sequence[str]) -> Sequence[Pixels]:
        found = super()._run(pixels, outputs)
        wrong = self.graph.name in self.graphs
        return [
            value * np.float32(self.factor) if wrong and name == self.output else value
            for name, value in zip(outputs, found, strict=True)
        ]


@pytest.fixture
def skewed(monkeypatch: pytest.MonkeyPatch) -> type[Skewed]:
    class Here(Skewed):
        pass

    real = engines.engine_class
    monkeypatch.setattr(
        engines, "engine_class", lambda name: Here if name == "skewed" else real(name)
    )
    return Here


def test_the_engine_equals_the_graph_that_export_verified(bundle: Bundle) -> None:
    seen: list[int] = []
    with UnoptimisedGraph(bundle) as reference:
        found = verify(bundle, pixels(), reference, on_batch=seen.append)
    assert (found.engine, found.precision, found.images) == ("ort-cpu", "fp32", 6)
    assert found.reference == "the graph that export verified (ort-cpu, optimiser off)"
    assert seen == [4, 2]
    assert found.passed
    found.gate()
    features = ["last_hidden_state", "hidden.1", "hidden.3", "attentions.2", "pooler_output"]
    assert [(c.graph, c.output) for c in found.parity] == [
        *(("model", name) for name in [*features, "test_time_registers"]),
        *(("baseline", name) for name in features),
    ]
    assert max(c.relative_error for c in found.parity) < 1e-5
    assert found.effect is not None
    assert found.effect.before.outliers > found.effect.after.outliers == 0
    assert found.effect.images == 6


def test_the_reference_is_not_the_optimised_engine_itself(bundle: Bundle) -> None:
    with UnoptimisedGraph(bundle, threads=1) as reference:
        assert reference.engines.options == EngineOptions(1, optimize=False)
        out = reference.run("model", pixels()[1], ["pooler_output"])
    assert list(out) == ["pooler_output"]


def test_probes_are_compared_where_asked_for(bundle: Bundle) -> None:
    reference = PyTorchReference(bundles.vit(), bundles.found(), RedirectOptions())
    found = verify(bundle, pixels(), reference, compare_probes=True)
    graphs = [c.graph for c in found.parity]
    assert graphs.count("probe") == graphs.count("probe_baseline") == 10
    assert found.passed


def test_an_engine_that_is_wrong_fails_and_is_named(bundle: Bundle, skewed: type[Skewed]) -> None:
    reference = PyTorchReference(bundles.vit(), bundles.found(), RedirectOptions())
    found = verify(bundle, pixels(), reference, "skewed")
    assert not found.passed
    assert found.failures == [
        "model last_hidden_state: relative error 1.00e-02; at most 1e-04 allowed"
    ]
    with pytest.raises(GateError) as caught:
        found.gate()
    assert str(caught.value) == (
        "skewed is not equal to PyTorch with hooks, float32: model last_hidden_state: relative "
        "error 1.00e-02; at most 1e-04 allowed"
    )
    assert found.to_json()["passed"] is False


@pytest.mark.parametrize("output", ["hidden.3", "attentions.2", "pooler_output"])
def test_every_output_counts(bundle: Bundle, skewed: type[Skewed], output: str) -> None:
    skewed.output = output
    with UnoptimisedGraph(bundle) as reference:
        found = verify(bundle, pixels(), reference, "skewed")
    assert [line.partition(":")[0] for line in found.failures] == [f"model {output}"]


def test_an_engine_that_yields_nan_fails_and_is_reported(
    bundle: Bundle, skewed: type[Skewed]
) -> None:
    skewed.factor = np.nan
    with UnoptimisedGraph(bundle) as reference:
        found = verify(bundle, pixels(), reference, "skewed")
    assert found.failures == ["model last_hidden_state: NaN or infinity"]
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("precision", "scale", "graphs", "named"),
    [
        ("fp16", 3000.0, ("model.onnx",), True),
        ("fp16", 3000.0, ("model.onnx", "baseline.onnx"), False),  # not by the redirect alone
        ("fp16", 1.0, ("model.onnx",), False),
        ("fp32", 3000.0, ("model.onnx",), False),
    ],
)
def test_a_scale_that_may_be_the_reason_is_named(
    bundle: Bundle,
    skewed: type[Skewed],
    precision: str,
    scale: float,
    graphs: tuple[str, ...],
    named: bool,
) -> None:
    skewed.factor, skewed.graphs = np.inf, graphs
    redirect = RedirectOptions(scale=(scale,))
    manifest = replace(bundle.manifest, precision=precision, redirect=redirect)
    with UnoptimisedGraph(bundle) as reference:
        found = verify(Bundle(bundle.path, manifest), pixels()[1:], reference, "skewed")
    with pytest.raises(GateError, match="NaN or infinity") as caught:
        found.gate()
    assert ("--scale 3000 may make numbers" in str(caught.value)) is named


def test_nothing_compared_is_a_failure(bundle: Bundle) -> None:
    with UnoptimisedGraph(bundle) as reference:
        found = verify(bundle, [], reference)
    assert (found.images, found.parity, found.effect, found.passed) == (0, (), None, False)
    with pytest.raises(GateError) as caught:
        found.gate()
    assert str(caught.value) == (
        "ort-cpu is not equal to the graph that export verified (ort-cpu, optimiser off): nothing "
        "was compared"
    )


def test_passing_needs_comparisons_images_and_no_failure() -> None:
    good = Comparison("model", "pooler_output", 0.0, None, 1.0, True, 3, ())
    bad = replace(good, failures=("model pooler_output: NaN or infinity",))
    whole = Verification("ort-cpu", "fp32", "it", 3, (good,), None)
    assert whole.passed
    assert not replace(whole, images=0).passed
    assert not replace(whole, parity=()).passed
    assert not replace(whole, parity=(good, bad)).passed
    assert whole.to_json()["effect"] is None


def rehashed(source: Path, target: Path, model: Path) -> Bundle:
    """A bundle whose model is another graph, with hashes that fit."""
    from regraft.bundle import record

    shutil.copytree(source, target)
    shutil.copy(model, target / "model.onnx")
    manifest = Manifest.load(target / "manifest.json")
    files = {**manifest.files, "model.onnx": record(target / "model.onnx")}
    (target / "manifest.json").write_text(json.dumps(replace(manifest, files=files).to_json()))
    return Bundle.open(target)


def test_a_graph_that_was_exchanged_fails_against_pytorch(bundle: Bundle, tmp_path: Path) -> None:
    import onnx

    # Same interface, but the register's value is doubled.
    model = onnx.load(bundle.graph("model"), load_external_data=False)
    for node in model.graph.node:
        if node.name == "regraft.redirect.1.add":
            model.graph.node.add(
                op_type="Add", input=[node.input[1]] * 2, output=["doubled"], name="doubled"
            )
            node.input[1] = "doubled"
    (tmp_path / "other.onnx").write_bytes(_sorted(model).SerializeToString())
    exchanged = rehashed(bundle.path, tmp_path / "exchanged", tmp_path / "other.onnx")
    reference = PyTorchReference(bundles.vit(), bundles.found(), RedirectOptions())
    found = verify(exchanged, pixels(), reference)
    assert not found.passed
    assert any(line.startswith("model test_time_registers: ") for line in found.failures)
    assert not [line for line in found.failures if line.startswith("baseline")]


def _sorted(model: object) -> object:
    import onnx_graphsurgeon as gs

    return gs.export_onnx(gs.import_onnx(model).toposort())


def test_without_probes_there_is_parity_and_no_effect(bundle: Bundle) -> None:
    manifest = bundle.manifest
    alone = Bundle(bundle.path, replace(manifest, graphs={"model": manifest.graphs["model"]}))
    with UnoptimisedGraph(alone) as reference:
        found = verify(alone, pixels(), reference)
    assert found.passed
    assert found.effect is None
    assert {c.graph for c in found.parity} == {"model"}


def test_the_limits_are_those_of_the_precision(bundle: Bundle, skewed: type[Skewed]) -> None:
    skewed.factor = 1.005
    half = Bundle(bundle.path, replace(bundle.manifest, precision="fp16"))
    reference = PyTorchReference(bundles.vit(), bundles.found(), RedirectOptions())
    assert verify(half, pixels(), reference, "skewed").passed
    assert not verify(bundle, pixels(), reference, "skewed").passed


def test_an_engine_that_cannot_run_the_precision_is_an_error(bundle: Bundle) -> None:
    unverified = Bundle(bundle.path, replace(bundle.manifest, precision="bf16"))
    with (
        UnoptimisedGraph(unverified) as reference,
        pytest.raises(EngineError, match="ort-cpu: cannot run bf16"),
    ):
        verify(unverified, pixels(), reference)


def test_engines_are_closed_also_when_the_reference_fails(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    real = OrtCpuEngine._close

    def close(self: OrtCpuEngine) -> None:
        closed.append(self.graph.name)
        real(self)

    monkeypatch.setattr(OrtCpuEngine, "_close", close)

    class Failing:
        name = "failing"

        def run(self, graph: str, pixels: Pixels, outputs: Sequence[str]) -> Mapping[str, Pixels]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        verify(bundle, pixels(), Failing())
    assert closed == ["model.onnx"]
