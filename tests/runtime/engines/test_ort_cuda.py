"""ort-cuda on a fake card: the same code that runs on a real one, numbers from the CPU provider."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as real
import pytest
from numpy.typing import NDArray
from tests.support import fake_onnxruntime
from tests.support.fake_tensorrt import Status

from regraft.bundle import Bundle, record
from regraft.engines import Engine, EngineOptions, open_engine, open_graph, parts
from regraft.engines.ort_cuda.gate import GATE, Gate
from regraft.engines.ort_cuda.runner import LARGEST
from regraft.errors import EngineError, ImageError
from regraft.extractor import Extractor
from regraft.manifest import CUDA_GRAPHS
from regraft.manifest import NAME as MANIFEST
from regraft.serve import model as serve_model
from regraft.serve.settings import EngineChoice, Settings
from regraft.verification import Engines

Fake = fake_onnxruntime.Module


@pytest.fixture
def graph(pristine_bundle: Path) -> Path:
    return pristine_bundle / "model.onnx"


def pixels(count: int, seed: int = 0) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).normal(size=(count, 3, 16, 16))
    return drawn.astype(np.float32)


def right(graph: Path, batch: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    session = real.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixel_values": batch}), strict=True))


def test_every_batch_size_equals_the_cpu(ort: Fake, graph: Path) -> None:
    with open_engine(graph, "ort-cuda") as engine:
        for count in (1, 3, 8, 5, 3, LARGEST, LARGEST + 3, 1):
            batch = pixels(count, count)
            for name, value in right(graph, batch).items():
                np.testing.assert_allclose(engine.run(batch)[name], value, rtol=1e-5, atol=1e-6)
        assert engine.details()["cuda graphs"] == "yes"
        recorded = {number for _, number in ort.sessions[0].recorded}
        # Two numbers a bucket; a second slot only where a batch had two pieces of one size.
        assert recorded == {2, 8, 16, 2 * LARGEST}
        assert ort.sessions[0].provider["use_tf32"] == "0"
    assert ort.cudart.live == 0


def test_only_what_is_asked_for_is_copied_back(ort: Fake, graph: Path) -> None:
    with open_engine(graph, "ort-cuda") as engine:
        ort.cudart.copied.clear()
        engine.run(pixels(3), ["pooler_output"])
        assert [kind for kind, _ in ort.cudart.copied] == ["in", "out"]
        assert ort.cudart.copied[1][1] == 3 * 8 * 4  # three images of a bucket of four


@pytest.fixture
def whole(graph: Path) -> Path:
    """The same graph, as it leaves the cutting to the copy back: 16 patches, then one more."""
    model = onnx.load(graph)
    (entry,) = [o for o in model.graph.output if o.name == "last_hidden_state"]
    tokens = entry.type.tensor_type.shape.dim[1].dim_value
    added = model.metadata_props.add()
    added.key = parts.METADATA
    added.value = json.dumps(
        {
            "front": ["last_hidden_state", 0, tokens - 1],
            "back": ["last_hidden_state", tokens - 1, tokens],
        }
    )
    file = graph.with_name("whole.cuda.onnx")
    onnx.save(model, file)
    return file


def test_parts_are_cut_by_the_copy_back(ort: Fake, graph: Path, whole: Path) -> None:
    tokens = right(graph, pixels(3))["last_hidden_state"]
    with open_engine(whole, "ort-cuda") as engine, open_engine(whole, "ort-cpu") as cpu:
        assert list(engine.outputs)[:2] == list(cpu.outputs)[:2] == ["front", "back"]
        ort.cudart.copied.clear()
        found = engine.run(pixels(3), ["back", "front"])
        assert [size for kind, size in ort.cudart.copied if kind == "out"] == [
            tokens[:, -1:].nbytes,
            tokens[:, :-1].nbytes,
        ]
        for got in (found, cpu.run(pixels(3), ["back", "front"])):
            np.testing.assert_allclose(got["front"], tokens[:, :-1], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(got["back"], tokens[:, -1:], rtol=1e-5, atol=1e-6)
        for name, value in engine.run(pixels(LARGEST + 2)).items():
            np.testing.assert_allclose(
                value, cpu.run(pixels(LARGEST + 2))[name], rtol=1e-5, atol=1e-6
            )


def test_several_batches_may_be_on_their_way(ort: Fake, graph: Path) -> None:
    batches = [pixels(3, seed) for seed in range(5)]
    with open_engine(graph, "ort-cuda") as engine:
        started = []
        for batch in batches:
            given = batch.copy()
            started.append(engine.start(given, ["pooler_output"]))
            given[:] = np.nan  # the caller's again
        for i in (4, 0, 2, 1, 3):  # in any order; three had to make room before
            expected = right(graph, batches[i])["pooler_output"]
            np.testing.assert_allclose(
                started[i]()["pooler_output"], expected, rtol=1e-5, atol=1e-6
            )
        assert {number for _, number in ort.sessions[0].recorded} == {8, 9}
        late = engine.start(batches[0])
    with pytest.raises(EngineError, match="is closed; open it again"):
        late()
    assert ort.cudart.live == 0


def test_a_stream_ahead_gives_the_same_in_order(ort: Fake, pristine_bundle: Path) -> None:
    images = [np.full((20, 20, 3), 10 * i, np.uint8) for i in range(7)]
    with Extractor.open(pristine_bundle, "ort-cuda", batch_size=2) as extractor:
        plain = list(extractor.stream(images))
        ahead = list(extractor.stream(images, ahead=True))
    assert [part.indices.tolist() for part in ahead] == [[0, 1], [2, 3], [4, 5], [6]]
    for one, other in zip(plain, ahead, strict=True):
        np.testing.assert_array_equal(one.pooled, other.pooled)


def test_a_stream_ahead_hands_out_what_came_before_a_bad_image(
    ort: Fake, pristine_bundle: Path, tmp_path: Path
) -> None:
    images = [np.zeros((20, 20, 3), np.uint8)] * 2 + [tmp_path / "absent.jpg"]
    with Extractor.open(pristine_bundle, "ort-cuda", batch_size=1) as extractor:
        found = extractor.stream(images, ahead=True)
        assert [next(found).indices.tolist() for _ in range(2)] == [[0], [1]]
        with pytest.raises(ImageError, match=r"absent\.jpg"):
            next(found)


def test_a_batch_that_is_lost_says_so(ort: Fake, graph: Path) -> None:
    with open_engine(graph, "ort-cuda") as engine:
        engine.run(pixels(2))
        lost = engine.start(pixels(2))
        ort.cudart.fails["cudaEventSynchronize"] = Status.cudaErrorLaunchFailure
        with pytest.raises(EngineError, match="cudaEventSynchronize failed"):
            lost()
        with pytest.raises(EngineError, match="this batch was lost with an earlier failure"):
            lost()
        assert engine.run(pixels(2))["pooler_output"].shape[0] == 2


def test_the_card_times_itself(ort: Fake, graph: Path) -> None:
    with open_engine(graph, "ort-cuda") as engine:
        assert engine.device_seconds(3, 4) == 1e-3  # the fake's clock: one millisecond a run
        assert engine.device_seconds(LARGEST + 1, 2) == 2e-3  # two pieces
    engine = open_engine(graph, "ort-cpu")
    with engine, pytest.raises(EngineError, match="ort-cpu: has no device with a clock of its own"):
        engine.device_seconds(1)


def test_a_thousand_runs_take_no_more_memory(ort: Fake, graph: Path) -> None:
    with open_engine(graph, "ort-cuda") as engine:
        engine.run(pixels(2))
        before = ort.cudart.live
        for _ in range(1000):
            engine.run(pixels(2), ["pooler_output"])
        assert ort.cudart.live == before


def test_threads_share_one_recording_each_bucket(ort: Fake, graph: Path) -> None:
    expected = right(graph, pixels(2))["pooler_output"]
    wrong: list[int] = []

    def work(engine: object) -> None:
        for _ in range(5):
            got = engine.run(pixels(2), ["pooler_output"])["pooler_output"]  # type: ignore[attr-defined]
            if not np.allclose(got, expected, rtol=1e-5, atol=1e-6):
                wrong.append(1)

    with open_engine(graph, "ort-cuda") as engine:
        engine.run(pixels(2))
        threads = [threading.Thread(target=work, args=(engine,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        # This thread's, and that of the one that all others go through.
        assert len(ort.sessions[0].recorded) == 2


def test_engines_do_not_disturb_each_others_recordings(ort: Fake, graph: Path) -> None:
    ort.recording_takes = 0.005
    failures: list[BaseException] = []
    start = threading.Barrier(3)

    def work(seed: int) -> None:
        try:
            start.wait()
            for turn in range(3):  # opened, recorded, replayed and closed beside the others
                with open_engine(graph, "ort-cuda") as engine:
                    for count in (1, 2, 2, 3, 3, 5):
                        batch = pixels(count, seed + turn)
                        found = engine.run(batch, ["pooler_output"])["pooler_output"]
                        expected = right(graph, batch)["pooler_output"]
                        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(10 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not ort.cudart.forbidden
    assert ort.cudart.live == 0


def test_nothing_waits_for_an_engine_that_is_opened(ort: Fake, graph: Path) -> None:
    with open_engine(graph, "ort-cuda") as engine:
        engine.run(pixels(1))
        with GATE.opening():  # elsewhere, for seconds
            for count in (1, 3, 3):
                expected = right(graph, pixels(count))["pooler_output"]
                found = engine.run(pixels(count))["pooler_output"]
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert {number for _, number in ort.sessions[0].recorded} == {2}
        engine.run(pixels(3))
        assert {number for _, number in ort.sessions[0].recorded} == {2, 8}


def test_what_cannot_be_recorded_later_runs_without(
    ort: Fake, graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ort.full_at = 1
    with open_engine(graph, "ort-cuda") as engine:
        engine.run(pixels(1))
        with GATE.opening():
            engine.run(pixels(3))
        for _ in range(3):  # there is memory for one recording alone
            expected = right(graph, pixels(3))["pooler_output"]
            found = engine.run(pixels(3))["pooler_output"]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert caplog.text.count("too little free memory for a CUDA graph more") == 1
        ort.full_at = 0
        with GATE.opening():
            engine.run(pixels(5))
        engine.run(pixels(5))
        assert {number for _, number in ort.sessions[0].recorded} == {2, 16}


def test_runs_wait_for_a_recording_and_a_recording_for_runs() -> None:
    gate, passed = Gate(), []
    running, recorded = threading.Event(), threading.Event()

    def record() -> None:
        with gate.alone() as alone:
            passed.append(("recorded", alone))
            recorded.wait(0.05)
            passed.append(("done", alone))

    def run() -> None:
        running.wait()
        with gate.together():
            passed.append(("ran", True))

    threads = [threading.Thread(target=work) for work in (record, run)]
    with gate.together():
        threads[0].start()
        while not gate._waiting:  # it waits for this run, and later runs for it
            time.sleep(0.001)
        threads[1].start()
        running.set()
        assert not recorded.wait(0.02)
        assert not passed
    for thread in threads:
        thread.join()
    assert passed == [("recorded", True), ("done", True), ("ran", True)]


def test_where_no_second_slot_fits_one_has_to_do(
    ort: Fake, graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches = [pixels(3, seed) for seed in range(4)]
    with open_engine(graph, "ort-cuda") as engine:
        engine.run(batches[0])
        held = ort.cudart.live
        ort.cudart.memory = 1 << 12
        _run_ahead(engine, batches, graph)
        assert ort.cudart.live == held
        assert caplog.text.count("too little free memory to copy one batch of 4 while") == 1
        with pytest.raises(EngineError, match=r"cudaMalloc failed.*free memory on the card"):
            engine.run(pixels(64))  # a first slot that does not fit is an error
        ort.cudart.memory = 1 << 30
        _run_ahead(engine, batches, graph)
        assert {number for _, number in ort.sessions[0].recorded} == {8}


def test_where_no_second_recording_fits_one_slot_has_to_do(
    ort: Fake, graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ort.full_at = 1
    with open_engine(graph, "ort-cuda") as engine:
        engine.run(pixels(3))
        held = ort.cudart.live
        _run_ahead(engine, [pixels(3, seed) for seed in range(4)], graph)
        assert ort.cudart.live == held
        assert caplog.text.count("takes one after the other from here on") == 1
        with pytest.raises(EngineError, match="the card has too little free memory; free some"):
            engine.run(pixels(8))
    assert ort.cudart.live == 0


def test_another_failure_of_a_second_slot_is_an_error(ort: Fake, graph: Path) -> None:
    with open_engine(graph, "ort-cuda") as engine:
        first = engine.start(pixels(3), ["pooler_output"])
        ort.failure = "something else"
        with pytest.raises(EngineError, match="something else"):
            engine.start(pixels(3))
        ort.failure = ""
        expected = right(graph, pixels(3))["pooler_output"]
        np.testing.assert_allclose(first()["pooler_output"], expected, rtol=1e-5, atol=1e-6)


def _run_ahead(engine: Engine, batches: list[NDArray[np.float32]], graph: Path) -> None:
    started = [engine.start(batch, ["pooler_output"]) for batch in batches]
    for finish, batch in zip(started, batches, strict=True):
        expected = right(graph, batch)["pooler_output"]
        np.testing.assert_allclose(finish()["pooler_output"], expected, rtol=1e-5, atol=1e-6)


def test_without_cuda_graphs(ort: Fake, graph: Path) -> None:
    with open_engine(graph, "ort-cuda", options=EngineOptions(optimize=False)) as engine:
        engine.run(pixels(2))
        assert ort.sessions[0].provider["enable_cuda_graph"] == "0"
        assert not ort.sessions[0].recorded


def test_it_takes_the_graph_for_cuda_and_says_so_if_there_is_none(
    ort: Fake, graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fused = graph.with_name("model.cuda.onnx")
    fused.write_bytes(graph.read_bytes())
    with caplog.at_level(logging.WARNING, "regraft"):
        with open_engine(graph, "ort-cuda", variants={"cuda": fused}) as engine:
            assert engine.graph == fused
        assert "without a graph for CUDA" not in caplog.text
        assert "model.cuda.onnx was not verified on this machine" in caplog.text
        with open_engine(graph, "ort-cuda") as engine:
            assert engine.graph == graph
    assert "model.onnx was exported without a graph for CUDA" in caplog.text


@pytest.fixture
def fused(bundle_folder: Path) -> Path:
    """A bundle with graphs for CUDA, which here are the portable ones."""
    bundle, added = Bundle.open(bundle_folder), {}
    for name, cuda in CUDA_GRAPHS.items():
        file = bundle_folder / f"{name}.cuda.onnx"
        file.write_bytes(bundle.graph(name).read_bytes())
        added[cuda] = file.name
    manifest = replace(
        bundle.manifest,
        graphs={**bundle.manifest.graphs, **added},
        files={**bundle.manifest.files, **{n: record(bundle_folder / n) for n in added.values()}},
    )
    (bundle_folder / MANIFEST).write_text(manifest.text())
    return bundle_folder


def test_the_graph_for_cuda_is_what_everybody_runs(ort: Fake, fused: Path) -> None:
    bundle = Bundle.open(fused)
    settings = Settings(engine=EngineChoice("ort-cuda"))
    with (
        open_graph(bundle, "model", "ort-cuda") as opened,
        serve_model._open(fused, settings)[1] as served,
        Engines(bundle, "ort-cuda", EngineOptions()) as verified,
        Extractor.open(fused, engine="ort-cuda") as extractor,
    ):
        for engine in (opened, served, verified["model"], extractor._engine):
            assert engine.graph == fused / "model.cuda.onnx"
        assert verified["baseline"].graph == fused / "baseline.cuda.onnx"


def test_auto_takes_it_before_the_cpu_and_after_tensorrt(ort: Fake, graph: Path) -> None:
    with open_engine(graph, "auto") as engine:
        assert engine.name == "ort-cuda"


def test_bf16_has_to_be_built(ort: Fake, graph: Path) -> None:
    with pytest.raises(EngineError, match=r"was not built in bf16 .* regraft build .*ort-cuda"):
        open_engine(graph, "ort-cuda", precision="bf16")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nodes assigned to the default CPU EP, but fallback to CPU EP is disabled", "no CUDA ker"),
        ("Failed to allocate memory for requested buffer of size 99", "too little free memory"),
        ("CUDA error 719: unspecified launch failure", "the card was lost; restart"),
        ("something else", "something else"),
    ],
)
def test_one_clear_error_when_opening_and_running(
    ort: Fake, graph: Path, text: str, expected: str
) -> None:
    ort.refusal = f"[ONNXRuntimeError] {text}\nmore"
    with pytest.raises(EngineError, match=expected) as caught:
        open_engine(graph, "ort-cuda")
    assert str(caught.value).startswith("ort-cuda: cannot open model.onnx")
    assert ort.cudart.live == 0
    ort.refusal = ""
    with open_engine(graph, "ort-cuda") as engine:
        ort.failure = text
        with pytest.raises(EngineError, match=expected):
            engine.run(pixels(1))


def test_what_is_missing_is_named(
    ort: Fake, graph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ort.libraries = False
    with pytest.raises(EngineError, match=r"libcublasLt.*pip install 'onnxruntime-gpu\[cuda,cudnn"):
        open_engine(graph, "ort-cuda")
    assert capsys.readouterr().out == ""  # where answers for machines go
    assert ort.cudart.live == 0
    ort.cudart.cards = 0
    with pytest.raises(EngineError, match="ort-cuda: there is no card; use ort-cpu"):
        open_engine(graph, "ort-cuda")
    ort.cudart.fails["cudaGetDeviceCount"] = Status.cudaErrorInsufficientDriver
    with pytest.raises(EngineError, match="install or upgrade the NVIDIA driver"):
        open_engine(graph, "ort-cuda")
    ort.available = ["CPUExecutionProvider"]
    with pytest.raises(EngineError, match="is the one for CPUs; pip uninstall onnxruntime, then"):
        open_engine(graph, "ort-cuda")
    ort.available = [fake_onnxruntime.CUDA]
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(EngineError, match="cuda-bindings is not installed; pip install 'regraft"):
        open_engine(graph, "ort-cuda")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="onnxruntime-gpu is not installed") as caught:
        open_engine(graph, "ort-cuda")
    hint = (
        "pip install 'regraft-runtime[cuda]', or in a checkout of regraft pip install "
        "'./runtime[cuda]'; where CUDA or cuDNN are not installed, also "
        "'onnxruntime-gpu[cuda,cudnn]'"
    )
    assert str(caught.value).endswith(hint)


def test_too_little_memory_leaves_nothing_behind(ort: Fake, graph: Path) -> None:
    with open_engine(graph, "ort-cuda") as engine:
        engine.run(pixels(1))
        before, ort.cudart.memory = ort.cudart.live, 1 << 12
        with pytest.raises(EngineError, match=r"cudaMalloc failed.*free memory on the card"):
            engine.run(pixels(64))
        assert ort.cudart.live == before
        engine.run(pixels(1))
    assert ort.cudart.live == 0


def test_build_verifies_warms_and_remembers(
    ort: Fake, graph: Path, photos: list[Path], regraft: Callable[..., tuple[int, str, str]]
) -> None:
    words = ("build", graph.parent, "--engine", "ort-cuda", "--images", *photos)
    code, out, err = regraft(*words)
    assert code == 0
    assert "model.onnx was exported without a graph for CUDA" in err
    assert "parity of ort-cuda (fp32)" in out
    assert "passed" in out
    code, out, _ = regraft(*words)
    assert "ort-cuda (fp32): built before" in out
    ort.__version__ = "1.31.2"  # another version has to prove itself again
    code, out, _ = regraft(*words)
    assert (code, "ort-cuda (fp32): built\n" in out) == (0, True)


def test_a_missed_limit_is_not_remembered(
    ort: Fake,
    graph: Path,
    photos: list[Path],
    regraft: Callable[..., tuple[int, str, str]],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real_floats = ort.cudart.floats
    # The card adds to every pixel that it reads.
    monkeypatch.setattr(ort.cudart, "floats", lambda a, s: _off(real_floats(a, s), s))
    words = ("build", graph.parent, "--engine", "ort-cuda", "--images", *photos)
    code, _, err = regraft(*words)
    assert code == 1
    assert "ort-cuda is not equal to the graph that export verified" in err
    assert not list(cache.rglob("key.json"))


def _off(array: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    return array + 1 if len(shape) == 4 and shape[1:] == (3, 16, 16) else array
