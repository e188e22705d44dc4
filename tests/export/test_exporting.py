from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tests.support import bundles, graphs, pictures, traces

from regraft.bundle import Bundle
from regraft.engines import parts
from regraft.errors import GateError, InputError, NeuronsError, OutputExistsError
from regraft.files import check_output
from regraft.neurons import Neurons, RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft_export import bundle_graphs, exporting
from regraft_export.export_options import ExportOptions
from regraft_export.reference import PyTorchReference

FILES = {
    "baseline.cuda.onnx",
    "baseline.onnx",
    "manifest.json",
    "model.cuda.onnx",
    "model.onnx",
    "neurons.json",
    "probe-baseline.onnx",
    "probe.onnx",
    "verify.json",
    "weights.data",
}
# What must not leave the machine that exports.
TELLTALES = (b"/home", b"/tmp", b"/root", b"/usr/", b"site-packages", b"regraft_export", b".py")


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_bundle_holds_what_its_manifest_says(exported: Path) -> None:
    assert names(exported) == FILES
    bundle = Bundle.open(exported)  # checks sizes and hashes
    manifest = bundle.manifest
    assert set(manifest.files) == FILES - {"manifest.json"}
    assert (exported / "manifest.json").read_text() == manifest.text()
    assert dict(manifest.graphs) == {
        "model": "model.onnx",
        "baseline": "baseline.onnx",
        "probe": "probe.onnx",
        "probe_baseline": "probe-baseline.onnx",
        "model_cuda": "model.cuda.onnx",
        "baseline_cuda": "baseline.cuda.onnx",
    }
    assert manifest.cuda is not None
    assert (manifest.cuda.attentions, manifest.cuda.redirects) == (4, 2)
    assert manifest.model == {
        "source": bundles.PLANTED,
        "architecture": "HandmadeVit",
        "weights_sha256": bundles.loaded().weights_sha256,
    }
    assert (manifest.layers, manifest.detection_layer, manifest.threshold) == ((1, 2), 2, 40.0)
    assert (manifest.precision, manifest.opset, manifest.verified) == ("fp32", 20, True)
    assert (manifest.tokens.test_time_registers, manifest.tokens.count) == (1, 17)
    sites = manifest.sites
    assert (sites.token, sites.redirect, sites.output, len(sites.mended)) == (1, 2, 4, 8)
    assert manifest.outputs == {
        "last_hidden_state": ("batch", 17, 48),
        "hidden.1": ("batch", 17, 48),
        "hidden.3": ("batch", 17, 48),
        "attentions.2": ("batch", 3, 4, 4),
        "pooler_output": ("batch", 48),
        "test_time_registers": ("batch", 1, 48),
    }
    assert {"regraft", "torch", "onnx", "onnxruntime", "numpy"} <= set(manifest.versions)
    assert bundle.neurons() == bundles.found()


def test_what_verify_json_says(exported: Path) -> None:
    said = Bundle.open(exported).verification()
    assert (said["passed"], said["images"], said["engine"]) == (True, 6, "ort-cpu")
    assert said["reference"] == "PyTorch with hooks, float32"
    assert said["limits"] == {
        "relative_error": 1e-4,
        "token_cosine": 0.9999,
        "image_cosine": 0.999,
    }
    compared = {(row["graph"], row["output"]) for row in said["parity"]}
    features = ["last_hidden_state", "hidden.1", "hidden.3", "attentions.2", "pooler_output"]
    probes = [f"{kind}.{i}" for kind in ("norms", "attentions") for i in range(4)]
    probes += ["last_hidden_state", "pooler_output"]
    assert compared == {
        ("model", "test_time_registers"),
        ("model_cuda", "test_time_registers"),
        *(
            (f"{graph}{form}", name)
            for graph in ("model", "baseline")
            for form in ("", "_cuda")
            for name in features
        ),
        *((graph, name) for graph in ("probe", "probe_baseline") for name in probes),
    }
    assert all(row["relative_error"] < 1e-5 and row["images"] == 6 for row in said["parity"])
    effect = said["effect"]
    assert effect["before"]["outliers"] > 0
    assert (effect["after"]["outliers"], effect["removed"]) == (0, 1.0)
    assert effect["after"]["largest"] < effect["before"]["largest"] / 2
    assert effect["register_norm"] > 40
    assert effect["patches"] == 6 * 16


def test_the_effect_is_what_pytorch_shows(exported: Path) -> None:
    effect = Bundle.open(exported).verification()["effect"]
    reference = PyTorchReference(bundles.vit(), bundles.found(), RedirectOptions())
    pixels = pictures.pixels(6, bundles.SIZE)
    before = reference.run("probe_baseline", pixels, ["norms.2"])["norms.2"][:, 1:]
    after = reference.run("probe", pixels, ["norms.2", "attentions.2"])
    norms = after["norms.2"]
    assert effect["before"]["outliers"] == (before > 40).sum()
    assert effect["before"]["median"] == pytest.approx(np.median(before), rel=1e-5)
    assert effect["after"]["largest"] == pytest.approx(norms[:, 1:17].max(), rel=1e-5)
    assert effect["register_norm"] == pytest.approx(np.median(norms[:, 17]), rel=1e-5)
    share = after["attentions.2"][:, :, 17].mean()
    assert effect["register_attention"]["2"] == pytest.approx(share, rel=1e-4)


def test_the_graphs_share_one_copy_of_the_weights(exported: Path) -> None:
    parameters = sum(p.numel() * 4 for p in bundles.vit().module.parameters())
    size = (exported / "weights.data").stat().st_size
    # The redirected layers' weights exist twice: as they were, and with rows of zeros.
    changed = 2 * 48 * 96 * 4
    assert parameters * 0.8 < size < parameters + changed + 4096 * 60
    large = sum((exported / name).stat().st_size for name in FILES if name.endswith(".onnx"))
    assert large < 4 * 60_000
    for name in FILES:
        if name.endswith(".onnx"):
            model = onnx.load(exported / name, load_external_data=False)
            places = {
                entry.value
                for tensor in model.graph.initializer
                for entry in tensor.external_data
                if entry.key == "location"
            }
            assert places == {"weights.data"}


def test_nothing_of_the_exporting_machine_is_in_the_graphs(exported: Path) -> None:
    for name in FILES:
        if name.endswith(".onnx"):
            content = (exported / name).read_bytes()
            for telltale in (*TELLTALES, str(Path.cwd()).encode(), b"Traceback"):
                assert telltale not in content, (name, telltale)
            model = onnx.load(exported / name, load_external_data=False)
            allowed = {parts.METADATA} if name == "model.cuda.onnx" else set()
            assert {entry.key for entry in model.metadata_props} == allowed
            assert not any(node.metadata_props for node in model.graph.node)
            assert not any(node.doc_string for node in model.graph.node)


@pytest.mark.parametrize("file", sorted(name for name in FILES if name.endswith(".onnx")))
def test_the_written_graphs_pass_the_full_check(exported: Path, file: str) -> None:
    onnx.checker.check_model(str(exported / file), full_check=True)


@pytest.mark.parametrize("optimize", [False, True])
def test_the_written_graphs_equal_pytorch(exported: Path, optimize: bool) -> None:
    pixels = pictures.pixels(5, bundles.SIZE, first=50)  # not those of the export
    reference = PyTorchReference(bundles.vit(), bundles.found(), RedirectOptions())
    bundle = Bundle.open(exported)
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for graph in bundle.manifest.graphs:
        session = ort.InferenceSession(
            str(bundle.graph(graph)), options, providers=["CPUExecutionProvider"]
        )
        shapes = {o.name: tuple(o.shape) for o in session.get_outputs()}
        cuts = parts.parts_of(session.get_modelmeta().custom_metadata_map, shapes)
        names = list(parts.shapes_of(shapes, cuts))
        found = dict(zip(shapes, session.run(list(shapes), {"pixel_values": pixels}), strict=True))
        right = reference.run(graph.removesuffix("_cuda"), pixels, names)
        for name in names:
            value = parts.cut(name, found, cuts)
            assert traces.error(value, right[name]) < 1e-5, (graph, name)


def test_the_baseline_is_the_model_without_registers(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx", load_external_data=False).graph
    baseline = onnx.load(exported / "baseline.onnx", load_external_data=False).graph
    ours = {o.name: o.SerializeToString() for o in model.output}
    theirs = {o.name: o.SerializeToString() for o in baseline.output}
    assert {**ours} == {**theirs, "test_time_registers": ours["test_time_registers"]}
    assert not any(node.name.startswith("regraft.redirect") for node in baseline.node)


@pytest.mark.usefixtures("quick_trace")
def test_without_a_baseline_there_are_no_probes_and_no_effect(tmp_path: Path) -> None:
    done = bundles.export(tmp_path / "bundle", ExportOptions(baseline=False))
    assert names(tmp_path / "bundle") == {
        "manifest.json",
        "model.cuda.onnx",
        "model.onnx",
        "neurons.json",
        "verify.json",
        "weights.data",
    }
    assert list(done.manifest.graphs) == ["model", "model_cuda"]
    assert done.verification.effect is None
    assert done.verification.passed
    assert {c.graph for c in done.verification.parity} == {"model", "model_cuda"}


REDIRECTS = [
    RedirectOptions("constant", "keep"),
    RedirectOptions("per-layer", "zero", "only-outliers", 2, (1.0, 0.5)),
    RedirectOptions("per-neuron", "keep", "mean"),
]


@pytest.mark.usefixtures("quick_trace")
@pytest.mark.parametrize("redirect", REDIRECTS, ids=lambda o: o.value)
def test_redirect_options_reach_the_graph_and_the_manifest(
    tmp_path: Path, redirect: RedirectOptions
) -> None:
    done = bundles.export(tmp_path / "bundle", ExportOptions(redirect=redirect))
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.redirect == redirect
    assert bundle.manifest.tokens.test_time_registers == redirect.registers
    assert bundle.manifest.outputs["test_time_registers"] == ("batch", redirect.registers, 48)
    assert done.verification.passed


@pytest.mark.usefixtures("quick_trace")
def test_the_default_redirect_adds_five_nodes_a_layer(tmp_path: Path) -> None:
    done = bundles.export(tmp_path / "bundle")
    assert done.nodes_added == {1: 5, 2: 5}


@pytest.mark.usefixtures("quick_trace")
def test_exporting_twice_gives_the_same_graphs(tmp_path: Path, exported: Path) -> None:
    bundles.export(tmp_path / "bundle")
    again, first = Bundle.open(tmp_path / "bundle").manifest, Bundle.open(exported).manifest
    for name in ("model.onnx", "weights.data", "probe.onnx", "baseline.onnx"):
        assert again.files[name] == first.files[name], name


@pytest.mark.usefixtures("quick_trace")
def test_half_precision_is_verified_and_half_the_size(tmp_path: Path, exported: Path) -> None:
    options = replace(bundles.OPTIONS, precision="fp16")
    done = bundles.export(tmp_path / "bundle", options)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.precision, manifest.verified, manifest.opset) == ("fp16", True, 20)
    assert done.verification.precision == "fp16"
    assert done.verification.passed
    worst = max(c.relative_error for c in done.verification.parity)
    assert 1e-5 < worst < 1e-2
    half = (tmp_path / "bundle" / "weights.data").stat().st_size
    assert half < 0.7 * (exported / "weights.data").stat().st_size
    for name in manifest.graphs.values():
        onnx.checker.check_model(str(tmp_path / "bundle" / name), full_check=True)


@pytest.mark.usefixtures("quick_trace")
def test_a_scale_too_large_for_half_precision_is_named(tmp_path: Path) -> None:
    redirect = RedirectOptions(registers=2, scale=(1.0, 3000.0))
    with pytest.raises(GateError) as caught:
        bundles.export(tmp_path / "bundle", ExportOptions(redirect=redirect, precision="fp16"))
    message = str(caught.value)
    assert "model test_time_registers: NaN or infinity" in message
    assert message.endswith(
        "; --scale 1 3000 may make numbers that fp16 cannot hold: give a smaller one, or take a "
        "wider precision"
    )
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("quick_trace")
def test_bfloat16_is_verified_as_its_float32_twin_and_marked(tmp_path: Path) -> None:
    done = bundles.export(tmp_path / "bundle", replace(bundles.OPTIONS, precision="bf16"))
    assert names(tmp_path) == {"bundle"}  # the twin is gone
    assert names(tmp_path / "bundle") == FILES
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.precision, manifest.verified, manifest.opset) == ("bf16", False, 22)
    assert (done.verification.precision, done.verification.passed) == ("fp32", True)
    model = onnx.load(tmp_path / "bundle" / "model.onnx")
    kinds = {t.data_type for t in model.graph.initializer if np.prod(t.dims) > 40}
    assert kinds == {TensorProto.BFLOAT16}
    assert {o.type.tensor_type.elem_type for o in model.graph.output} == {TensorProto.FLOAT}


@pytest.mark.usefixtures("quick_trace")
@pytest.mark.parametrize("graph", ["model", "probe"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_graph_that_is_not_equal_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: str, existing: bool
) -> None:
    out = tmp_path / "bundle"
    if existing:
        bundles.export(out, ExportOptions(baseline=False))
    before = {file.name: file.read_bytes() for file in out.iterdir()} if existing else {}
    real = bundle_graphs.build

    def corrupt(traced: object, patch: object, wanted: object) -> object:
        built = real(traced, patch, wanted)
        if patch is not None and wanted.probe == (graph == "probe"):
            weight = next(
                t for t in built.proto.graph.initializer if t.name == "regraft.redirect.1.weight"
            )
            values = np.frombuffer(weight.raw_data, np.float32).copy()
            values[5] += 30
            weight.raw_data = values.tobytes()
        return built

    monkeypatch.setattr(bundle_graphs, "build", corrupt)
    with pytest.raises(GateError) as caught:
        bundles.export(out, force=True)
    message = str(caught.value)
    assert message.startswith("ort-cpu is not equal to PyTorch with hooks, float32: ")
    assert f"{graph} last_hidden_state: relative error " in message
    assert "; at most 1e-04 allowed" in message
    assert names(tmp_path) == ({"bundle"} if existing else set())
    if existing:
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.usefixtures("quick_trace")
def test_wrong_hooks_are_found_by_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if rewrite and reference disagreed about CLS.
    class Other(PyTorchReference):
        def __init__(
            self, vit: object, neurons: Neurons, options: RedirectOptions, *rest: object
        ) -> None:
            super().__init__(vit, neurons, replace(options, cls="keep"), *rest)

    monkeypatch.setattr(exporting, "PyTorchReference", Other)
    with pytest.raises(GateError, match="model last_hidden_state: relative error"):
        bundles.export(tmp_path / "bundle")
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("quick_trace")
def test_verifying_on_nothing_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(GateError) as caught:
        bundles.export(tmp_path / "bundle", batches=lambda: iter(()))
    assert str(caught.value) == (
        "ort-cpu is not equal to PyTorch with hooks, float32: nothing was compared"
    )
    assert names(tmp_path) == set()


def test_an_existing_output_is_refused_before_anything_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "trace", lambda *_: pytest.fail("traced"))
    (tmp_path / "bundle").mkdir()
    with pytest.raises(OutputExistsError, match="exists already; give --force to replace it"):
        bundles.export(tmp_path / "bundle")
    (tmp_path / "bundle" / "letters.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is a folder without manifest\.json"):
        bundles.export(tmp_path / "bundle", force=True)
    assert check_output(tmp_path / "other") == (tmp_path / "other").resolve()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ExportOptions(layers=(0, 4)),
            "--layers: there is no block 4; the model has 4 blocks, 0 to 3",
        ),
        (
            ExportOptions(attentions=(17, 1)),
            "--attentions: there is no block 17; the model has 4 blocks, 0 to 3",
        ),
    ],
)
def test_blocks_outside_the_model_are_refused(
    tmp_path: Path, options: ExportOptions, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        bundles.export(tmp_path / "bundle", options)
    assert str(caught.value) == message
    assert names(tmp_path) == set()


def test_cls_attention_needs_a_class_token() -> None:
    from tests.support import models

    vit = models.vit("timm_siglip")
    ExportOptions(layers=(1,)).check_against(vit)
    with pytest.raises(InputError) as caught:
        ExportOptions(attentions=(1,)).check_against(vit)
    assert str(caught.value) == (
        "--attentions: this model has no class token, so there is no CLS attention to give"
    )


@pytest.mark.usefixtures("quick_trace")
def test_a_constant_value_without_recorded_values_is_refused(tmp_path: Path) -> None:
    by_hand = Neurons((RegisterNeuron(1, 7),))
    with pytest.raises(NeuronsError, match=r"index 7\) has none \(written by hand\?\)"):
        bundles.export(
            tmp_path / "bundle",
            ExportOptions(redirect=RedirectOptions("constant")),
            neurons=by_hand,
        )
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("quick_trace")
def test_progress_counts_every_image(tmp_path: Path) -> None:
    seen: list[int] = []
    bundles.export(tmp_path / "bundle", ExportOptions(baseline=False), on_batch=seen.append)
    assert seen == [4, 2]


def test_verify_json_is_json_without_nan(exported: Path) -> None:
    def refuse(word: str) -> None:
        pytest.fail(f"{word} in verify.json")

    for name in ("verify.json", "manifest.json", "neurons.json"):
        json.loads((exported / name).read_text(), parse_constant=refuse)


def test_the_weights_reach_the_engine_through_the_file(exported: Path) -> None:
    # A graph alone, without its folder, must not run with other weights unnoticed.
    content = (exported / "model.onnx").read_bytes()
    with pytest.raises(Exception, match=r"weights\.data"):
        graphs.open_session(content)
