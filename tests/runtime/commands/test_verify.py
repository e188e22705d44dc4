from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import bundles, pictures

from regraft.bundle import Bundle, record
from regraft.commands import verify as command
from regraft.engines.ort_cpu import OrtCpuEngine
from regraft.manifest_file import digest

Regraft = Callable[..., tuple[int, str, str]]
GRAPH = "the graph that export verified (ort-cpu, optimiser off)"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.exported(tmp_path_factory)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write(tmp_path_factory.mktemp("verify"), 5, first=40)


def test_a_good_bundle_passes(regraft: Regraft, bundle: Path, images: Path) -> None:
    code, out, err = regraft("verify", bundle, "--images", images, "--batch-size", "2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"parity of ort-cpu (fp32) with {GRAPH}, 5 images: passed"
    heads = "graph output relative error token cosine worst token image"
    assert lines[1].split() == heads.split()
    assert lines[2].split()[-3:] == ["1.000000"] * 3
    rows = [line.split()[:2] for line in lines[2:13]]
    assert rows[0] == ["model", "last_hidden_state"]
    assert rows[-1] == ["baseline", "pooler_output"]
    assert lines[13].startswith("effect at layer 2: outlier tokens (norm above 40) ")
    assert " -> 0 of 80; largest patch norm " in lines[13]
    assert lines[14].startswith("  register: norm ")
    assert "cosine of pooled to the baseline: median " in lines[14]
    assert len(lines) == 15


def test_against_pytorch_with_hooks(regraft: Regraft, bundle: Path, images: Path) -> None:
    code, out, err = regraft("verify", bundle, "--images", images, "--model", bundles.PLANTED)
    assert (code, err) == (0, "")
    assert out.startswith(
        "parity of ort-cpu (fp32) with PyTorch with hooks, float32, 5 images: passed\n"
    )


def test_the_answer_for_machines(regraft: Regraft, bundle: Path, images: Path) -> None:
    code, out, err = regraft("verify", bundle, "--images", images, "--json", "--max-images", "3")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["schema"], found["passed"], found["images"]) == (1, True, 3)
    assert (found["engine"], found["precision"], found["reference"]) == ("ort-cpu", "fp32", GRAPH)
    assert found["effect"]["removed"] == 1.0
    assert {row["graph"] for row in found["parity"]} == {"model", "baseline"}


def test_another_model_is_refused(regraft: Regraft, bundle: Path, images: Path) -> None:
    code, out, err = regraft("verify", bundle, "--images", images, "--model", bundles.PLAIN)
    assert (code, out) == (1, "")
    theirs, ours = bundles.loaded(bundles.PLAIN).weights_sha256, bundles.loaded().weights_sha256
    assert err == (
        f"regraft: {bundles.PLAIN} has weights {theirs[:12]}..., the bundle was made from "
        f"{bundles.PLANTED} with weights {ours[:12]}...; give the model the bundle was made from\n"
    )


def test_weights_without_a_model_are_refused(regraft: Regraft, bundle: Path, images: Path) -> None:
    code, out, err = regraft("verify", bundle, "--images", images, "--weights", "w.safetensors")
    assert (code, out) == (2, "")
    assert err == "regraft: --weights is given without --model; give both or neither\n"


def test_a_model_needs_the_export_distribution(
    regraft: Regraft, bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "entry_points", lambda **_: [])
    code, _, err = regraft("verify", bundle, "--images", images, "--model", bundles.PLANTED)
    assert code == 1
    assert err == (
        "regraft: --model needs the export distribution; pip install "
        "'regraft-export', or in a checkout of regraft pip install './export'\n"
    )


def wrong(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Lets the optimised engine compute one output wrongly, as a faulty optimiser would."""
    real_open, real_run = OrtCpuEngine._open, OrtCpuEngine._run

    def open_(self: OrtCpuEngine, graph: Path, options: object) -> object:
        self.faulty = options.optimize and graph.name == "model.onnx"
        return real_open(self, graph, options)

    def run(self: OrtCpuEngine, pixels: object, outputs: list[str]) -> object:
        found = list(real_run(self, pixels, outputs))
        if self.faulty:
            found[outputs.index("pooler_output")] *= factor
        return found

    monkeypatch.setattr(OrtCpuEngine, "_open", open_)
    monkeypatch.setattr(OrtCpuEngine, "_run", run)


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_wrong_engine_fails_after_its_findings_are_printed(
    regraft: Regraft,
    bundle: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    wrong(monkeypatch, 1.02)
    code, out, err = regraft("verify", bundle, "--images", images, *words)
    assert code == 1
    assert err == (
        f"regraft: ort-cpu is not equal to {GRAPH}: model pooler_output: relative error 2.00e-02; "
        "at most 1e-04 allowed\n"
    )
    if words:
        assert json.loads(out)["passed"] is False
    else:
        assert out.splitlines()[0].endswith("5 images: FAILED")
        (row,) = (line for line in out.splitlines() if line.endswith("  FAILED"))
        assert row.split() == ["model", "pooler_output", "2.0e-02", "1.000000", "FAILED"]


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_nan_is_reported_in_one_line(
    regraft: Regraft,
    bundle: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    wrong(monkeypatch, float("nan"))
    code, out, err = regraft("verify", bundle, "--images", images, *words)
    assert code == 1
    assert err == (
        f"regraft: ort-cpu is not equal to {GRAPH}: model pooler_output: NaN or infinity\n"
    )
    assert out


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_nan_everywhere_is_reported_in_one_line(
    regraft: Regraft,
    bundle: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    real = OrtCpuEngine._run

    def run(self: OrtCpuEngine, pixels: object, outputs: list[str]) -> object:
        return [value * float("nan") for value in real(self, pixels, outputs)]

    monkeypatch.setattr(OrtCpuEngine, "_run", run)
    code, out, err = regraft("verify", bundle, "--images", images, *words)
    assert code == 1
    assert err.count("\n") == 1
    assert "model last_hidden_state: NaN or infinity; model hidden.1: NaN or infinity" in err
    if words:
        assert json.loads(out)["effect"]["after"]["median"] is None


def test_an_exchanged_graph_fails_against_pytorch(
    regraft: Regraft, bundle: Path, images: Path, tmp_path: Path
) -> None:
    # The baseline in the place of the model would lack an output; so the neurons are exchanged.
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    neurons = json.loads((other / "neurons.json").read_text())
    neurons["neurons"] = neurons["neurons"][:1]
    (other / "neurons.json").write_text(json.dumps(neurons))
    manifest = json.loads((other / "manifest.json").read_text())
    now = record(other / "neurons.json")
    manifest["files"]["neurons.json"] = {"sha256": now.sha256, "bytes": now.bytes}
    manifest["sha256"] = digest(manifest)
    (other / "manifest.json").write_text(json.dumps(manifest))
    Bundle.open(other)
    code, out, err = regraft("verify", other, "--images", images, "--model", bundles.PLANTED)
    assert code == 1
    assert "FAILED" in out
    assert err.startswith("regraft: ort-cpu is not equal to PyTorch with hooks, float32: model ")
    assert err.count("\n") == 1


def test_a_changed_byte_is_found_before_anything_runs(
    regraft: Regraft, bundle: Path, images: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    content = bytearray((other / "weights.data").read_bytes())
    content[5000] ^= 1
    (other / "weights.data").write_bytes(content)
    code, out, err = regraft("verify", other, "--images", images)
    assert (code, out) == (1, "")
    assert "weights.data was changed (its sha256 differs)" in err


def test_unreadable_pictures_are_named_and_left_out(
    regraft: Regraft, bundle: Path, tmp_path: Path
) -> None:
    folder = pictures.write(tmp_path / "pictures", 3)
    (folder / "empty.png").touch()
    code, out, err = regraft("verify", bundle, "--images", folder)
    assert code == 0
    assert "3 images: passed" in out
    assert err == f"regraft: {folder / 'empty.png'}: is empty (0 bytes)\n"
    code, out, err = regraft("verify", bundle, "--images", folder, "--strict")
    assert code == 1
    assert "3 images: passed" in out
    assert err.splitlines()[1:] == ["regraft: 1 of 4 images could not be read (named above)"]


def test_without_threads_there_is_one_message(
    regraft: Regraft, bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    code, out, err = regraft("verify", bundle, "--images", images)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("regraft: no thread can be started to decode images (can't start new ")


def test_comparing_nothing_is_a_failure(regraft: Regraft, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_text("no picture")
    code, out, err = regraft("verify", bundle, "--images", folder)
    assert (code, out) == (1, "")
    assert err.splitlines()[1:] == ["regraft: the only image could not be read (named above)"]


def test_what_is_not_there_is_named(regraft: Regraft, bundle: Path, tmp_path: Path) -> None:
    code, _, err = regraft("verify", tmp_path / "none", "--images", tmp_path)
    assert code == 1
    assert err.startswith(f"regraft: {tmp_path / 'none'}: no such folder; expected a folder with ")
    code, _, err = regraft("verify", bundle, "--images", tmp_path / "none")
    assert (code, err) == (
        1,
        f"regraft: {tmp_path / 'none'}: no such file or folder; expected images\n",
    )


def test_an_engine_that_cannot_run_here_is_an_error(
    regraft: Regraft, bundle: Path, images: Path
) -> None:
    code, out, err = regraft("verify", bundle, "--images", images, "--engine", "ort-cuda")
    assert (code, out) == (1, "")
    assert err.startswith("regraft: ort-cuda: the onnxruntime that is installed is the one")


def test_a_process_of_its_own_verifies_without_torch(bundle: Path, images: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = None\n"
        "from regraft.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "verify", str(bundle), "--images", str(images)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].endswith("5 images: passed")
