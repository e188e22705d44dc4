"""``regraft patch --check``: what is printed, written and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from tests.support import handmade_vit, pictures
from tests.support.exporters import ANY, BATCH, dynamo, torchscript

from regraft.errors import GateError
from regraft.neurons import Neurons, RegisterNeuron
from regraft.parity import Comparison
from regraft.redirect import RedirectOptions
from regraft_export.demo import sample_images_folder
from regraft_export.foreign import patching
from regraft_export.foreign.check.checked import Checked
from regraft_export.sources import load

Regraft = Callable[..., tuple[int, str, str]]
OWN = (
    *("--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5),
    *("--interpolation", "bicubic", "--crop-pct", 0.9, "--crop-mode", "center"),
)


@pytest.fixture
def path(file: Callable[..., Path]) -> Path:
    return file("timm", "torchscript", 14, {"axes": BATCH})


@pytest.fixture
def listed(tmp_path: Path) -> Callable[..., Path]:
    """``listed(size)``: neurons with preprocessing for that size; without a size, by hand."""

    def write(size: tuple[int, int] | None = None) -> Path:
        about: dict[str, Any] = {}
        if size is not None:
            about = {"preprocessing": pictures.preprocessing(size).to_json()}
        found = Neurons((RegisterNeuron(0, 3), RegisterNeuron(2, 5)), about)
        (tmp_path / "n.json").write_text(json.dumps(found.to_json()))
        return tmp_path / "n.json"

    return write


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return pictures.write(tmp_path / "images", 10)


def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a row too few is zeroed, because the list that patching gets is shorter."""
    right = patching.redirect_neurons

    def redirect(graph: Any, down: Any, chosen: Any, *more: Any) -> int:
        return right(graph, down, chosen[:1] if len(chosen) > 1 else (_other(chosen[0]),), *more)

    monkeypatch.setattr(patching, "redirect_neurons", redirect)


def _other(neuron: RegisterNeuron) -> RegisterNeuron:
    return RegisterNeuron(neuron.layer, neuron.index + 1)


def test_a_right_patch_is_written_and_said_so(
    path: Path, listed: Callable[..., Path], images: Path, tmp_path: Path, regraft: Regraft
) -> None:
    words = ("patch", path, "--neurons", listed((48, 32)), "--check", images)
    code, out, _ = regraft(*words, "--out", tmp_path / "o.onnx")
    assert code == 0
    assert "check with the method in numpy, 8 images of 48 x 32, batches of 2: passed" in out
    assert "block 2" in out
    assert f"written: {tmp_path / 'o.onnx'}" in out
    onnx.checker.check_model(str(tmp_path / "o.onnx"))
    code, out, _ = regraft(*words, "--dry-run", "--json", "--check-images", 3)
    said = json.loads(out)
    assert (code, said["written"], said["check"]["passed"]) == (0, [], True)
    assert (said["check"]["images"], said["check"]["failures"]) == (3, [])
    assert {c["output"] for c in said["check"]["parity"]} == set(said["check"]["changes"])
    assert all(c["passed"] and c["images"] == 3 for c in said["check"]["parity"])


def test_what_find_found_in_the_file_is_patched_and_checked(
    tmp_path: Path, regraft: Regraft
) -> None:
    vit = load("python:regraft_export.demo:shipped_vit")
    path, samples = tmp_path / "in.onnx", sample_images_folder()
    dynamo(vit.module, vit.preprocessing.image_size, path, 20)
    words = ("--images", samples, "--out", tmp_path / "found.json", *OWN)
    assert regraft("find", path, *words)[0] == 0
    # With the preprocessing that `find` noted.
    words = ("--neurons", tmp_path / "found.json", "--out", tmp_path / "o.onnx", "--json")
    code, out, _ = regraft("patch", path, *words, "--check", samples)
    assert code == 0
    said = json.loads(out)["check"]
    assert (said["passed"], said["failures"], said["image_size"]) == (True, [], [96, 96])


@pytest.mark.parametrize("dry", [False, True])
def test_a_wrong_patch_is_not_written(
    dry: bool,
    path: Path,
    listed: Callable[..., Path],
    images: Path,
    tmp_path: Path,
    regraft: Regraft,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    neurons = listed((48, 32))
    before = set(tmp_path.iterdir())
    wrong(monkeypatch)
    end = ("--dry-run",) if dry else ("--out", tmp_path / "o.onnx")
    code, out, err = regraft("patch", path, "--neurons", neurons, "--check", images, *end)
    assert code == 1
    assert "batches of 2: FAILED" in out
    assert out.count("  FAILED") >= 2
    assert "nothing was written" in out
    assert "the patched graph is not equal to the method: patched" in err
    assert "relative error" in err
    code, out, err = regraft("patch", path, "--neurons", neurons, "--check", images, *end, "--json")
    said = json.loads(out)
    assert (code, said["check"]["passed"], said["written"]) == (1, False, [])
    assert any(not c["passed"] for c in said["check"]["parity"])
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("precision", "graph", "named"),
    [
        ("fp16", "patched", True),
        ("fp16", "patched, as float32", False),  # then it is not by what fp16 holds
        ("fp32", "patched", False),
    ],
)
def test_a_scale_that_may_be_the_reason_is_named(precision: str, graph: str, named: bool) -> None:
    infinite = Comparison(graph, "y", 0.0, None, None, False, 2, ("y: NaN or infinity",))
    checked = Checked(2, (48, 32), 2, precision, (infinite,), {"y": 1.0}, {})
    with pytest.raises(GateError) as caught:
        checked.gate(RedirectOptions(scale=(3000.0,)))
    hint = "; --scale 3000 may make numbers that fp16 cannot hold: give a smaller one, or take a"
    assert (hint in str(caught.value)) is named
    assert str(caught.value).endswith("; nothing was written")


def test_preprocessing_by_hand_and_from_the_neurons_file(
    path: Path, listed: Callable[..., Path], images: Path, regraft: Regraft
) -> None:
    words = ("patch", path, "--neurons", listed(), "--dry-run", "--check", images)
    code, out, err = regraft(*words)
    assert (code, out) == (1, "")
    assert "the preprocessing lacks mean, std, interpolation, crop_pct, crop_mode; give" in err
    assert "--mean --std --interpolation --crop-pct --crop-mode, or take the file" in err
    code, out, _ = regraft(*words, *OWN)
    assert (code, "passed" in out) == (0, True)
    # Of another size: the file's own counts, forced.
    code, out, _ = regraft("patch", path, "--neurons", listed((96, 96)), *words[4:], "--force")
    assert (code, "images of 48 x 32" in out) == (0, True)
    broken = json.loads(listed((48, 32)).read_text())
    broken["preprocessing"]["std"] = "none"
    words[3].write_text(json.dumps(broken))  # type: ignore[union-attr]  # the neurons file
    code, _, err = regraft(*words)
    assert (code, err.count("n.json: preprocessing is malformed: std is 'none'")) == (1, 1)


def test_without_threads_there_is_one_message(
    path: Path,
    listed: Callable[..., Path],
    images: Path,
    regraft: Regraft,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    words = ("patch", path, "--neurons", listed((48, 32)), "--dry-run", "--check", images)
    code, out, err = regraft(*words)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("regraft: no thread can be started to decode images ")


def test_images_that_are_none(
    path: Path, listed: Callable[..., Path], images: Path, tmp_path: Path, regraft: Regraft
) -> None:
    words = ("patch", path, "--neurons", listed((48, 32)), "--out", tmp_path / "o.onnx", "--check")
    (tmp_path / "empty").mkdir()
    code, _, err = regraft(*words, tmp_path / "empty")
    assert (code, "the folder holds no images" in err) == (1, True)
    code, _, err = regraft(*words, tmp_path / "nowhere")
    assert (code, "no such file or folder; expected images" in err) == (1, True)
    for picture in images.iterdir():
        picture.write_bytes(b"no picture")
    code, out, err = regraft(*words, images, "--check-images", 2)
    assert (code, out) == (1, "")
    assert f"{images}: none of the 2 images could be read (named above), so nothing can" in err
    assert err.count("is not an image file") == 2
    assert not (tmp_path / "o.onnx").exists()
    # One that can be read is enough, and the other is named.
    pictures.draw(1).save(images / "picture-000.png")
    code, out, err = regraft(*words, images, "--check-images", 2)
    assert (code, ", 1 image of 48 x 32, batches of 1" in out) == (0, True)
    assert "whether images of a batch are kept apart was not checked" in out
    assert "picture-001.png" in err


def test_options_that_need_check(path: Path, listed: Callable[..., Path], regraft: Regraft) -> None:
    words = ("patch", path, "--neurons", listed((48, 32)), "--dry-run")
    for more in ("--check-images", 3), ("--crop-pct", 0.9):
        code, out, err = regraft(*words, *more)
        assert (code, out) == (2, "")
        assert f"{more[0]} is given without --check DIR" in err


def test_a_file_for_any_size_is_checked_at_the_neurons_own(
    listed: Callable[..., Path], images: Path, tmp_path: Path, regraft: Regraft
) -> None:
    module = handmade_vit.AnySize()
    module.load_state_dict(handmade_vit.planted()[0].state_dict())
    torchscript(module.eval().requires_grad_(False), (32, 32), tmp_path / "in.onnx", 17, ANY)
    words = ("patch", tmp_path / "in.onnx", "--dry-run", "--check", images, "--neurons")
    code, out, _ = regraft(*words, listed((40, 56)))
    assert (code, "images of 40 x 56" in out) == (0, True)
    code, out, _ = regraft(*words, listed((40, 56)), "--image-size", "48,32")
    assert (code, "images of 48 x 32" in out) == (0, True)
    code, out, err = regraft(*words, listed((4, 56)))
    assert (code, out) == (1, "")
    assert "ONNX Runtime cannot run the nodes from" in err
    assert "the images were 4 x 56: if the file does not take that, give a size" in err


def test_what_the_check_does_not_understand_is_not_written(
    path: Path, listed: Callable[..., Path], images: Path, tmp_path: Path, regraft: Regraft
) -> None:
    """The patch takes it, as it happens; the check says which node it does not know."""
    model = onnx.load(path)
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    made = onnx.helper.make_node("Abs", [softmax.output[0]], ["changed"], name="positive")
    at = next(i for i, n in enumerate(model.graph.node) if softmax.output[0] in n.output)
    for reader in model.graph.node:
        reader.input[:] = ["changed" if i == softmax.output[0] else i for i in reader.input]
    model.graph.node.insert(at + 1, made)
    onnx.save(model, tmp_path / "in.onnx")
    words = ("patch", tmp_path / "in.onnx", "--neurons", listed((48, 32)))
    out = ("--out", tmp_path / "o.onnx")
    code, _, err = regraft(*words, *out, "--check", images)
    assert (code, (tmp_path / "o.onnx").exists()) == (1, False)
    assert "which is read by 'positive' (Abs)" in err
    assert "without --check it is patched, unchecked" in err
    assert regraft(*words, *out)[0] == 0


def test_onnxruntime_is_missed_and_torch_is_not(
    path: Path, listed: Callable[..., Path], images: Path
) -> None:
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
from regraft.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    words = ["patch", path, "--neurons", listed((48, 32)), "--dry-run", "--check", images]
    for blocked, code in ((("torch", "timm", "transformers"), 0), (("onnxruntime",), 1)):
        done = subprocess.run(
            [sys.executable, "-c", script.replace("BLOCKED", repr(blocked)), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
        if code:
            assert "--check runs the file with onnxruntime, which is not installed" in done.stderr
            assert "regraft-runtime[cpu]" in done.stderr
        else:
            assert "passed" in done.stdout
