from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from regraft.engines import NAMES, Engine, EngineOptions, open_engine
from regraft.errors import EngineError, InputError


@pytest.fixture
def engine(pristine_bundle: Path):
    with open_engine(pristine_bundle / "model.onnx", "ort-cpu") as opened:
        yield opened


def pixels(batch: int = 2, size: int = 16) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, 3, size, size)).astype(np.float32)


def embed(kernel: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The small bundle's patch tokens by numpy alone: (B, 16, D)."""
    B = len(images)
    cells = images.reshape(B, 3, 4, 4, 4, 4).transpose(0, 2, 4, 1, 3, 5).reshape(B, 16, -1)
    return cells @ kernel.reshape(len(kernel), -1).T


def test_outputs_are_what_the_graph_computes(engine: Engine, kernel: np.ndarray) -> None:
    images = pixels(3)
    outputs = engine.run(images)
    patches = embed(kernel, images)
    np.testing.assert_allclose(outputs["last_hidden_state"][:, 1:], patches, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs["pooler_output"], patches.mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        outputs["test_time_registers"][:, 0], patches.max(axis=1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("options", [EngineOptions(spinning=True), EngineOptions(optimize=False)])
def test_options_change_no_result(
    engine: Engine, pristine_bundle: Path, options: EngineOptions
) -> None:
    with open_engine(pristine_bundle / "model.onnx", "ort-cpu", options=options) as other:
        for name, array in other.run(pixels()).items():
            np.testing.assert_allclose(array, engine.run(pixels())[name], rtol=1e-5, atol=1e-6)


def test_only_the_outputs_asked_for(engine: Engine) -> None:
    assert list(engine.outputs) == [
        *("last_hidden_state", "pooler_output", "hidden.1", "attentions.1"),
        "test_time_registers",
    ]
    assert engine.size == (16, 16)
    assert list(engine.run(pixels(), ["hidden.1", "pooler_output"])) == [
        "hidden.1",
        "pooler_output",
    ]
    with pytest.raises(EngineError) as caught:
        engine.run(pixels(), ["hidden.7"])
    assert "ort-cpu: model.onnx has no output 'hidden.7'; it has last_hidden_state," in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (pixels().astype(np.float64), r"got float64 of shape \(2, 3, 16, 16\)"),
        (pixels(size=20), r"got float32 of shape \(2, 3, 20, 20\)"),
        (pixels()[0], r"got float32 of shape \(3, 16, 16\)"),
        (pixels()[:0], r"got float32 of shape \(0, 3, 16, 16\)"),
        (pixels().transpose(0, 2, 3, 1), r"got float32 of shape \(2, 16, 16, 3\)"),
        ([[1.0]], "got list"),
    ],
    ids=["dtype", "size", "no-batch", "empty", "channels-last", "list"],
)
def test_wrong_pixels_are_refused(engine: Engine, wrong: np.ndarray, got: str) -> None:
    expected = r"; expected float32 of shape \(B, 3, 16, 16\), B at least 1"
    with pytest.raises(InputError, match=f"pixel_values: {got}{expected}"):
        engine.run(wrong)


def test_strided_pixels_are_as_good(engine: Engine) -> None:
    images = pixels(4)
    strided = engine.run(images[::2])["pooler_output"]
    np.testing.assert_array_equal(
        strided, engine.run(np.ascontiguousarray(images[::2]))["pooler_output"]
    )


def test_a_closed_engine_says_so(pristine_bundle: Path) -> None:
    engine = open_engine(pristine_bundle / "model.onnx")
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="ort-cpu: is closed; open it again"):
        engine.run(pixels())


def test_a_broken_graph_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(EngineError, match=r"^ort-cpu: cannot open model\.onnx \(.+\)$"):
        open_engine(tmp_path / "model.onnx")


def test_a_graph_with_another_input_is_refused(tmp_path: Path, bundle_folder: Path) -> None:
    model = onnx.load(bundle_folder / "model.onnx")
    model.graph.input[0].name = "images"
    model.graph.node[0].input[0] = "images"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(EngineError, match=r"other\.onnx takes images; expected one input pixel_va"):
        open_engine(tmp_path / "other.onnx")


def test_every_onnxruntime_exception_is_mapped(engine: Engine) -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = [k for k in vars(state).values() if isinstance(k, type) and issubclass(k, Exception)]
    assert len(kinds) >= 10
    for kind in kinds:
        with (
            pytest.raises(EngineError, match=r"^ort-cpu: doing it \(first line\)$"),
            engine._failures("doing it"),
        ):
            raise kind("first line\nsecond line")


def test_names_that_cannot_run_are_errors_not_fallbacks(pristine_bundle: Path) -> None:
    graph = pristine_bundle / "model.onnx"
    assert set(NAMES) == {"auto", "ort-cpu", "ort-cuda", "tensorrt", "openvino"}
    with pytest.raises(EngineError, match=r"^ort-cuda: the onnxruntime .* is the one for CPUs"):
        open_engine(graph, "ort-cuda")
    with pytest.raises(
        InputError, match="there is no engine 'onnx'; expected one of auto, ort-cpu"
    ):
        open_engine(graph, "onnx")


def test_auto_names_its_choice(pristine_bundle: Path) -> None:
    with open_engine(pristine_bundle / "model.onnx", "auto") as engine:
        assert engine.name == "ort-cpu"


@pytest.mark.parametrize("name", ["auto", "ort-cpu"])
def test_bf16_is_refused_on_a_cpu(pristine_bundle: Path, name: str) -> None:
    with pytest.raises(EngineError, match=r"ort-cpu: cannot run bf16.*--precision fp32"):
        open_engine(pristine_bundle / "model.onnx", name, precision="bf16")


def test_fp16_runs_with_a_warning(pristine_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "regraft"):
        open_engine(pristine_bundle / "model.onnx", precision="fp32").close()
        gate = EngineOptions(optimize=False)  # what a gate opens is not meant to be fast
        open_engine(pristine_bundle / "model.onnx", precision="fp16", options=gate).close()
        assert not caplog.records
        open_engine(pristine_bundle / "model.onnx", precision="fp16").close()
    assert "ort-cpu: the bundle is fp16" in caplog.text


@pytest.mark.parametrize("name", ["auto", "ort-cpu"])
def test_a_missing_onnxruntime_says_what_to_install(
    pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError) as caught:
        open_engine(pristine_bundle / "model.onnx", name)
    assert str(caught.value).endswith(
        "ort-cpu: onnxruntime is not installed; pip install 'regraft-runtime[cpu]', or in a "
        "checkout of regraft pip install './runtime[cpu]'"
    )


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_senseless_numbers_of_threads_are_refused(threads: int) -> None:
    with pytest.raises(InputError, match=f"threads is {threads}; expected 1 to 1024"):
        EngineOptions(threads=threads)


def test_details_say_what_a_measurement_needs(pristine_bundle: Path) -> None:
    options = EngineOptions(threads=1)
    with open_engine(pristine_bundle / "model.onnx", options=options) as engine:
        assert engine.details()["threads"] == "1"
        assert engine.details()["onnxruntime"][0].isdigit()


class SlowEngine(Engine):
    """Fails if two threads are inside at once."""

    name = "slow"
    inside = 0

    @classmethod
    def unavailable(cls, precision: str) -> str | None:
        return None

    def _open(self, graph: Path, options: EngineOptions):
        return (4, 4), {"pooler_output": ("batch", 1)}

    def _run(self, images: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        self.inside += 1
        time.sleep(0.002)
        assert self.inside == 1
        self.inside -= 1
        return [images.mean(axis=(1, 2, 3))[:, None]]


def test_threads_share_an_engine_one_at_a_time() -> None:
    engine = SlowEngine(Path("none.onnx"), "fp32", EngineOptions())
    results: dict[int, float] = {}

    def work(value: int) -> None:
        images = np.full((1, 3, 4, 4), value, np.float32)
        results[value] = float(engine.run(images)["pooler_output"][0, 0])

    threads = [threading.Thread(target=work, args=(value,)) for value in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {value: float(value) for value in range(20)}
