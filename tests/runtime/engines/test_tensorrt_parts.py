"""TensorRT's engine around the builder and the runner; ``tensorrt`` is a fake, nothing runs.

The builder itself is tested by compiling, in ``tests/tensorrt_rig``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.support import fake_tensorrt as fake

from regraft import engine_cache
from regraft.engines import cache_key, open_engine
from regraft.engines.options import EngineOptions
from regraft.engines.tensorrt import engine as engine_module
from regraft.engines.tensorrt.builder import BuilderOptions, Plan
from regraft.engines.tensorrt.engine import PLAN, TIMING, TensorrtEngine
from regraft.engines.tensorrt.inspect import Network, read_inspector
from regraft.engines.tensorrt.listeners import Share, failure, logger
from regraft.errors import EngineError, InputError

DEFAULTS = {option.name: option.default for option in TensorrtEngine.build_options}


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake.Cudart]:
    """A machine with a card: both modules are fakes, and one plan can be opened."""
    runtime: Any = fake.Cudart()
    cuda, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    monkeypatch.setitem(sys.modules, "cuda", cuda)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module({b"a plan": fake.Engine(runtime)}))
    logger.cache_clear()
    yield runtime
    logger.cache_clear()


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"a graph")
    return tmp_path / "bundle" / "model.onnx"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[BuilderOptions, bytes]]:
    """What the builder is called with; its plans can be opened."""
    seen: list[tuple[BuilderOptions, bytes]] = []

    def build(graph: Path, options: BuilderOptions, progress: Any, timing: bytes) -> Plan:
        progress("compiling", 100, 100)
        seen.append((options, timing))
        return Plan(b"a plan", b"timings %d" % len(seen), Network(9, {"FP32": 3}, 2))

    monkeypatch.setattr(engine_module, "build", build)
    return seen


def build_into_cache(graph: Path) -> dict[str, Any]:
    key = cache_key(TensorrtEngine, graph, "fp32", DEFAULTS)
    with engine_cache.new_entry(key, graph) as draft:
        report = TensorrtEngine.build(graph, "fp32", DEFAULTS, draft.folder, lambda *_: None)
    return report


def test_what_was_built_runs(
    cudart: fake.Cudart, graph: Path, builds: list[tuple[BuilderOptions, bytes]]
) -> None:
    with pytest.raises(EngineError, match=r"^tensorrt: model.onnx was not built in fp32 on this"):
        open_engine(graph, "tensorrt")
    report = build_into_cache(graph)
    assert report == {
        "network": {"layers": 9, "types": {"FP32": 3}, "attentions": 2},
        "engine": {"layers": 1, "types": {"FP16": 1}, "fused_attentions": 1},
    }
    pixels = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    with open_engine(graph, "tensorrt") as engine:
        assert engine.size == (8, 8)
        assert engine.outputs == {
            "last_hidden_state": ("batch", 5, 4),
            "pooler_output": ("batch", 4),
        }
        for name, value in engine.run(pixels).items():
            np.testing.assert_array_equal(value, fake.right(pixels, name))
        assert engine.has_clock
        assert engine.device_seconds(5, 2) == 1e-3  # the fake's clock
        assert engine.details() == {
            "tensorrt": "11.4.0.0",
            "device": "Fake Card (sm_90, driver 13050)",
            "batches": "1,2,4,6",
            "cuda graphs": "yes",
        }
    assert cudart.live == 0
    with open_engine(graph, "tensorrt", options=EngineOptions(optimize=False)) as engine:
        assert engine.details()["cuda graphs"] == "no"


def test_auto_takes_it_once_it_is_built(
    cudart: fake.Cudart, graph: Path, builds: list[tuple[BuilderOptions, bytes]]
) -> None:
    build_into_cache(graph)
    with open_engine(graph, "auto") as engine:
        assert engine.name == "tensorrt"


def test_another_card_version_or_graph_needs_a_build_of_its_own(
    cudart: fake.Cudart,
    graph: Path,
    builds: list[tuple[BuilderOptions, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_into_cache(graph)
    open_engine(graph, "tensorrt").close()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["tensorrt"], "__version__", "11.5.0.0")
        with pytest.raises(EngineError, match="was not built"):
            open_engine(graph, "tensorrt")
    with monkeypatch.context() as patch:
        patch.setattr(fake.Cudart, "cudaDriverGetVersion", lambda self: 12090)
        with pytest.raises(EngineError, match="was not built"):
            open_engine(graph, "tensorrt")
    graph.write_bytes(b"another graph")
    with pytest.raises(EngineError, match="was not built"):
        open_engine(graph, "tensorrt")


def test_a_plan_that_was_changed_is_not_opened(
    cudart: fake.Cudart, graph: Path, builds: list[tuple[BuilderOptions, bytes]]
) -> None:
    build_into_cache(graph)
    folder = cache_key(TensorrtEngine, graph, "fp32", DEFAULTS).folder
    (folder / PLAN).write_bytes(b"b plan")
    with pytest.raises(EngineError, match=r"model\.plan was changed"):
        open_engine(graph, "tensorrt")


def test_a_plan_that_tensorrt_refuses_says_why(
    cudart: fake.Cudart, graph: Path, tmp_path: Path
) -> None:
    (tmp_path / PLAN).write_bytes(b"of another version")
    with pytest.raises(
        EngineError,
        match=r"^tensorrt: the plan of model.onnx cannot be opened; build it again: "
        "magic tag does not match$",
    ):
        open_engine(graph, "tensorrt", built=tmp_path)


def test_a_failing_run_is_one_error(
    cudart: fake.Cudart, graph: Path, builds: list[tuple[BuilderOptions, bytes]]
) -> None:
    build_into_cache(graph)
    with open_engine(graph, "tensorrt") as engine:
        cudart.fails["cudaMemcpyAsync"] = fake.Status.cudaErrorLaunchFailure
        with pytest.raises(EngineError, match=r"^tensorrt: cudaMemcpyAsync failed .* lost$"):
            engine.run(np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(EngineError, match="is closed"):
        engine.run(np.zeros((1, 3, 8, 8), np.float32))


def test_the_timing_cache_goes_from_build_to_build(
    cudart: fake.Cudart, graph: Path, builds: list[tuple[BuilderOptions, bytes]], cache: Path
) -> None:
    for _ in range(2):
        build_into_cache(graph)
    assert builds == [(BuilderOptions(), b""), (BuilderOptions(), b"timings 1")]
    (kept,) = cache.glob(f"engines/tensorrt-timing/*/*/{TIMING}")
    assert kept.read_bytes() == b"timings 2"
    # It holds compiled kernels, so that it is trusted no further than a plan.
    kept.write_bytes(b"timings 9")
    with pytest.raises(EngineError, match=r"timing.cache was changed"):
        build_into_cache(graph)


@pytest.mark.parametrize(
    ("module", "package"),
    [("tensorrt", "tensorrt"), ("cuda.bindings.runtime", "cuda-bindings")],
)
def test_a_missing_package_says_what_to_install(
    cudart: fake.Cudart, graph: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EngineError) as caught:
        open_engine(graph, "tensorrt")
    assert str(caught.value) == (
        f"tensorrt: {package} is not installed; pip install 'regraft-runtime[tensorrt]', "
        "or in a checkout of regraft pip install './runtime[tensorrt]'"
    )


def test_a_broken_installation_says_how(
    cudart: fake.Cudart, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt.py").write_text("import ctypes\nctypes.CDLL('libno_such_nvinfer.so')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt")
    reason = TensorrtEngine.unavailable("fp32")
    assert reason is not None
    assert reason.startswith("tensorrt cannot be imported (libno_such_nvinfer.so: ")


@pytest.mark.parametrize(
    ("call", "status", "message"),
    [
        ("cudaGetDeviceCount", fake.Status.cudaErrorInsufficientDriver, "NVIDIA driver"),
        ("cudaGetDeviceProperties", fake.Status.cudaErrorLaunchFailure, "restart the process"),
    ],
)
def test_a_missing_driver_is_named(
    cudart: fake.Cudart, call: str, status: fake.Status, message: str
) -> None:
    cudart.fails[call] = status
    reason = TensorrtEngine.unavailable("fp32")
    assert reason is not None
    assert reason.startswith(f"{call} failed ({status.name}: ")
    assert message in reason


def test_a_missing_card_is_named(cudart: fake.Cudart) -> None:
    assert TensorrtEngine.unavailable("bf16") is None
    cudart.cards = 0
    assert TensorrtEngine.unavailable("bf16") == (
        "there is no card; use ort-cpu, or check CUDA_VISIBLE_DEVICES"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"min-batch": 9}, r"min 9, opt 8, max 64; expected 1 <= min <= opt <= max"),
        ({"opt-batch": 65}, r"min 1, opt 65, max 64"),
        ({"max-batch": 4}, r"min 1, opt 8, max 4"),
        ({"level": 6}, r"level is 6; expected 0 to 5"),
    ],
)
def test_options_that_exclude_each_other_are_refused_before_the_build(
    changed: dict[str, int], message: str
) -> None:
    TensorrtEngine.check_build("fp32", DEFAULTS)
    with pytest.raises(InputError, match=message):
        TensorrtEngine.check_build("fp32", DEFAULTS | changed)


def test_options_reach_the_builder(
    cudart: fake.Cudart,
    graph: Path,
    builds: list[tuple[BuilderOptions, bytes]],
    tmp_path: Path,
) -> None:
    given = {"min-batch": 2, "opt-batch": 3, "max-batch": 5, "level": 1, "workspace-mib": 7}
    options = {**given, "attention": "fused"}
    assert set(options) == set(DEFAULTS)
    TensorrtEngine.build(graph, "fp32", options, tmp_path, lambda *_: None)
    assert builds[0][0] == BuilderOptions(2, 3, 5, 1, 7, True)


def test_progress_of_nested_phases_only_grows() -> None:
    share = Share()
    share.start("all", None, 2)
    share.start("first", "all", 4)
    assert share.step("first", 1) == pytest.approx(0.25)
    share.finish("first")  # before its last step
    assert share.step("all", 0) == pytest.approx(0.5)
    share.start("second", "all", 2)
    share.start("inner", "second", 10)
    assert share.step("inner", 4) == pytest.approx(0.5 + 0.5 * 0.25)
    share.start("inner", "second", 10)  # once more, under the same name
    assert share.step("inner", 0) == pytest.approx(0.625)
    assert share.step("second", 1) == pytest.approx(1.0)
    assert share.step("unknown", 0) == pytest.approx(1.0)
    share.start("empty", None, 0)
    assert share.step("empty", 3) == pytest.approx(1.0)


def test_an_error_repeats_no_line_and_says_how_many_it_leaves_out() -> None:
    assert str(failure("it fails", [])) == "tensorrt: it fails; TensorRT gave no reason"
    lines = ["a\n b", "a b", "c", "d", "e", "f"]
    assert str(failure("it fails", lines)) == "tensorrt: it fails: a b; c; d; and 2 more"


def test_the_inspector_is_read_in_both_forms() -> None:
    old = {
        "Layers": [
            {
                "Name": "conv",
                "LayerType": "gemm",
                "TacticName": "sm80_xmma",
                "Outputs": [{"Name": "a", "Format/Datatype": "Row major linear FP16 format"}],
            },
            {
                "Name": "__myl_Fc",
                "LayerType": "kgen",
                "TacticName": "_gemm_mha_v2_0x1",
                "Outputs": [{"Format/Datatype": "Half"}, {"Format/Datatype": "Int64"}],
            },
        ],
        "Bindings": ["pixel_values"],
    }
    new = {
        "Layers": [
            {"Name": "a", "Outputs": [{"Format": "Row major linear", "DataType": "BFloat16"}]},
            {"Name": "b", "TacticName": "fmha_v2_flash", "Outputs": [{"DataType": "Float"}]},
        ],
        "I/O Tensors": [{"Name": "pixel_values"}],
    }
    read = read_inspector(json.loads(json.dumps(old)))
    assert (read.layers, dict(read.types), read.fused_attentions) == (
        2,
        {"FP16": 2, "INT64": 1},
        1,
    )
    read = read_inspector(new)
    assert (read.layers, dict(read.types), read.fused_attentions) == (2, {"BF16": 1, "FP32": 1}, 1)
    names = read_inspector({"Layers": ["_gemm_mha_v2", "conv"]})
    assert (names.layers, dict(names.types), names.fused_attentions) == (2, {}, 1)
