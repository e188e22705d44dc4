from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest

from regraft import engines
from regraft.engines import Engine, EngineOptions, cache_key, open_engine
from regraft.engines import openvino as module
from regraft.engines.openvino import BLOB, OpenVinoEngine
from regraft.errors import EngineError

BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def silent(phase: str, done: int, total: int | None) -> None:
    pass


def pixels(batch: int = 2, size: int = 16, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, 3, size, size)).astype(np.float32)


def build(graph: Path, folder: Path, precision: str = "fp32") -> Path:
    folder.mkdir()
    OpenVinoEngine.build(graph, precision, {}, folder, silent)
    return folder


@pytest.fixture(scope="module")
def built(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(pristine_bundle / "model.onnx", tmp_path_factory.mktemp("openvino") / "built")


@pytest.fixture
def engine(pristine_bundle: Path, built: Path):
    with open_engine(pristine_bundle / "model.onnx", "openvino", built=built) as opened:
        yield opened


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(b - a) / np.linalg.norm(a))


@pytest.mark.parametrize("order", [(1, 2, 8, 3), (8, 1, 8)])
def test_any_batch_size_in_any_order_equals_ort_cpu(
    engine: Engine, pristine_bundle: Path, order: tuple[int, ...]
) -> None:
    with open_engine(pristine_bundle / "model.onnx", "ort-cpu") as cpu:
        assert list(engine.outputs) == list(cpu.outputs)
        assert engine.size == cpu.size
        for batch in order:
            expected = cpu.run(pixels(batch, seed=batch))
            for name, array in engine.run(pixels(batch, seed=batch)).items():
                assert (array.dtype, array.shape) == (np.float32, expected[name].shape)
                assert relative(expected[name], array) < 1e-4, (name, batch)


def test_outputs_belong_to_the_caller(engine: Engine) -> None:
    first = engine.run(pixels(2, seed=1))["last_hidden_state"]
    before = first.copy()
    engine.run(pixels(2, seed=2))
    np.testing.assert_array_equal(first, before)


def test_only_the_outputs_asked_for_in_their_order(engine: Engine) -> None:
    every = engine.run(pixels())
    some = engine.run(pixels(), ["hidden.1", "pooler_output"])
    assert list(some) == ["hidden.1", "pooler_output"]
    for name, array in some.items():
        np.testing.assert_array_equal(array, every[name])


def test_two_threads_share_an_engine(engine: Engine) -> None:
    inputs = [pixels(1 + i % 3, seed=i) for i in range(12)]
    expected = [engine.run(images)["pooler_output"] for images in inputs]
    found: dict[int, np.ndarray] = {}

    def work(start: int) -> None:
        for i in range(start, len(inputs), 2):
            found[i] = engine.run(inputs[i])["pooler_output"]

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, array in enumerate(expected):
        np.testing.assert_allclose(found[i], array, rtol=1e-5, atol=1e-6)


def test_the_precision_is_never_openvinos_own_choice(
    pristine_bundle: Path, built: Path, tmp_path: Path
) -> None:
    graph = pristine_bundle / "model.onnx"
    report = OpenVinoEngine.build(graph, "fp32", {}, tmp_path, silent)
    assert report["precision"] == "fp32"
    assert set(report["layers"]) == {"f32"}
    assert report["bytes"] == (tmp_path / BLOB).stat().st_size
    with open_engine(graph, "openvino", built=built, options=EngineOptions(threads=1)) as engine:
        assert engine.precision == engine.details()["precision"] == "fp32"
        model = engine._model
        assert model.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
        assert model.get_property("INFERENCE_NUM_THREADS") == 1
        assert engine.details()["threads"] == "1"
        assert engine.details()["openvino"] == openvino.get_version()


def test_bf16_is_computed_in_bf16_where_the_processor_can(
    pristine_bundle: Path, tmp_path: Path, engine: Engine
) -> None:
    graph = pristine_bundle / "model.onnx"
    options = EngineOptions(precision="bf16")
    if not BF16:
        with pytest.raises(EngineError, match="this processor has no bf16 arithmetic"):
            open_engine(graph, "openvino", options=options, built=tmp_path)
        return
    report = OpenVinoEngine.build(graph, "bf16", {}, tmp_path, silent)
    assert "bf16" in report["layers"]
    with open_engine(graph, "openvino", options=options, built=tmp_path) as fast:
        assert fast.precision == "bf16"
        model = fast._model
        assert model.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16
        error = relative(*(e.run(pixels(4))["hidden.1"] for e in (engine, fast)))
    assert 1e-5 < error < 2e-2


@pytest.mark.parametrize("asked", ["bf16", None])
def test_bf16_is_refused_where_the_processor_has_none(
    pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    monkeypatch.setattr(module, "_capabilities", lambda core: ["FP32", "INT8"])
    bundle = "fp32" if asked else "bf16"
    with pytest.raises(EngineError) as caught:
        open_engine(
            pristine_bundle / "model.onnx",
            "openvino",
            precision=bundle,
            options=EngineOptions(precision=asked),
        )
    assert str(caught.value) == (
        "openvino: this processor has no bf16 arithmetic (AVX512_BF16 or AMX), it has FP32, INT8; "
        "use --precision fp32, of a bundle exported in it"
    )


@pytest.mark.parametrize(
    ("bundle", "asked"), [("fp32", "fp16"), ("fp16", "bf16"), ("bf16", "fp32")]
)
def test_other_changes_of_precision_are_refused(
    pristine_bundle: Path, bundle: str, asked: str
) -> None:
    message = (
        f"openvino: computes a bundle in its own precision, here {bundle}; asked for {asked}: "
    )
    with pytest.raises(EngineError, match=message):
        open_engine(
            pristine_bundle / "model.onnx",
            "openvino",
            precision=bundle,
            options=EngineOptions(precision=asked),
        )


@pytest.mark.parametrize("name", ["ort-cpu", "auto"])
def test_engines_without_a_choice_refuse_another_precision(
    pristine_bundle: Path, name: str
) -> None:
    with pytest.raises(
        EngineError, match=r"^ort-cpu: computes .*; asked for bf16: export with --p"
    ):
        open_engine(pristine_bundle / "model.onnx", name, options=EngineOptions(precision="bf16"))


def test_without_a_build_it_says_which_command_to_run(
    pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("built silently")

    monkeypatch.setattr(OpenVinoEngine, "build", never)
    graph = pristine_bundle / "model.onnx"
    with pytest.raises(EngineError) as caught:
        open_engine(graph, "openvino")
    assert str(caught.value) == (
        "openvino: model.onnx was not built in fp32 on this machine, or for another version, "
        f"device or content; run: regraft build {pristine_bundle} --engine openvino --images DIR"
    )
    if BF16:
        with pytest.raises(EngineError, match=r"--engine openvino --precision bf16 --images DIR$"):
            open_engine(graph, "openvino", options=EngineOptions(precision="bf16"))


def test_auto_never_means_openvino(pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "openvino" in engines.MODULES
    with open_engine(pristine_bundle / "model.onnx", "auto") as engine:
        assert (engine.name, engine.precision) == ("ort-cpu", "fp32")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="no engine can run here"):
        open_engine(pristine_bundle / "model.onnx", "auto")


@pytest.mark.parametrize(
    ("absent", "reason"),
    [(True, "is not installed"), (False, r"cannot be imported \(libtbb.so: no such file\)")],
)
def test_a_missing_package_says_what_to_install(
    pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch, absent: bool, reason: str
) -> None:
    if absent:
        monkeypatch.setitem(sys.modules, "openvino", None)
    else:

        def broken() -> None:
            raise ImportError("libtbb.so: no such file")

        monkeypatch.setattr(module, "_core", broken)
    message = rf"^openvino: openvino {reason}; pip install 'regraft-runtime\[openvino\]', or in a "
    message += r"checkout of regraft pip install './runtime\[openvino\]'$"
    with pytest.raises(EngineError, match=message):
        open_engine(pristine_bundle / "model.onnx", "openvino")


@pytest.mark.parametrize("content", [b"", b"nonsense" * 100], ids=["empty", "nonsense"])
def test_a_blob_that_openvino_refuses_is_one_error(
    pristine_bundle: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / BLOB).write_bytes(content)
    with pytest.raises(EngineError) as caught:
        open_engine(pristine_bundle / "model.onnx", "openvino", built=tmp_path)
    text = str(caught.value)
    assert text.startswith("openvino: cannot open model.onnx ([CPU] Cannot import compiled blob: ")
    assert "\n" not in text
    (tmp_path / BLOB).unlink()
    with pytest.raises(EngineError, match=r"model\.blob: cannot be read \(No such file"):
        open_engine(pristine_bundle / "model.onnx", "openvino", built=tmp_path)


def test_a_broken_graph_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(
        EngineError, match=r"^openvino: cannot compile model\.onnx \(Unable to read"
    ):
        build(tmp_path / "model.onnx", tmp_path / "built")


def test_a_graph_with_another_input_is_refused(tmp_path: Path, bundle_folder: Path) -> None:
    model = onnx.load(bundle_folder / "model.onnx")
    model.graph.input[0].name = "images"
    model.graph.node[0].input[0] = "images"
    graph = tmp_path / "other.onnx"
    onnx.save(model, graph)
    folder = build(graph, tmp_path / "built")
    with pytest.raises(EngineError, match=r"other\.onnx takes images; expected one input pixel_v"):
        open_engine(graph, "openvino", built=folder)


def test_a_closed_engine_says_so(pristine_bundle: Path, built: Path) -> None:
    engine = open_engine(pristine_bundle / "model.onnx", "openvino", built=built)
    engine.close()
    with pytest.raises(EngineError, match="openvino: is closed; open it again"):
        engine.run(pixels())


def test_the_key_follows_content_version_and_device(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = bundle_folder / "model.onnx"
    keys = [cache_key(OpenVinoEngine, graph, "fp32")]
    assert keys[0].version == openvino.get_version()
    assert openvino.Core().get_property("CPU", "FULL_DEVICE_NAME") in keys[0].device
    elsewhere = shutil.copytree(bundle_folder, tmp_path / "elsewhere")
    assert cache_key(OpenVinoEngine, elsewhere / "model.onnx", "fp32") == keys[0]
    keys.append(cache_key(OpenVinoEngine, graph, "bf16"))
    keys.append(cache_key(OpenVinoEngine, bundle_folder / "baseline.onnx", "fp32"))
    weights = bytearray((bundle_folder / "weights.data").read_bytes())
    weights[-1] ^= 1
    (bundle_folder / "weights.data").write_bytes(weights)
    keys.append(cache_key(OpenVinoEngine, graph, "fp32"))
    monkeypatch.setattr(openvino, "get_version", lambda: "2099.1")
    keys.append(cache_key(OpenVinoEngine, graph, "fp32"))
    monkeypatch.setattr(module, "_capabilities", lambda core: ["FP32"])
    keys.append(cache_key(OpenVinoEngine, graph, "fp32"))
    assert len({key.folder for key in keys}) == len(keys)
