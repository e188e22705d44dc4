"""`regraft find IN.onnx`: the neurons that the PyTorch route finds; what it needs and refuses."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from tests.support import models
from tests.support.exporters import BATCH, dynamo, torchscript
from tests.support.families import Family, planted_module
from tests.support.foreign_files import REFUSALS, bad
from tests.support.graphs import open_session
from tests.support.pictures import warned
from tests.support.planting import flagged_pictures, grey_levels, plant
from tests.support.small_families import EXPORTED
from torch import Tensor, nn

from regraft.neurons import Neurons, RegisterNeuron
from regraft_export.demo import sample_images_folder
from regraft_export.finding.find import Found, find_neurons
from regraft_export.finding.judge import Judge
from regraft_export.finding.outliers import detect
from regraft_export.finding.parts import ArrayImages
from regraft_export.finding.pytorch import PyTorchSubject
from regraft_export.finding.score import gather_norms, score_neurons
from regraft_export.finding.subject import Subject
from regraft_export.foreign.opening import open_file
from regraft_export.sources import load
from regraft_export.sources.data_config import PreprocessingOverrides
from regraft_export.vit.structure import from_module

pytestmark = pytest.mark.usefixtures("one_thread")

Regraft = Callable[..., tuple[int, str, str]]
GIVEN = PreprocessingOverrides(
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    interpolation="bicubic",
    crop_pct=1.0,
    crop_mode="center",
)
COLOURS = ("--mean", 0.5, 0.5, 0.5, "--std", 0.2, 0.2, 0.2)
GEOMETRY = ("--interpolation", "bicubic", "--crop-pct", 1, "--crop-mode", "center")
SHIPPED = "python:regraft_export.demo:shipped_vit"
SAMPLES = sample_images_folder()

EXPORTERS: dict[str, Callable[..., None]] = {
    "dynamo, any batch": functools.partial(dynamo, opset=20),
    "TorchScript, batch 1": functools.partial(torchscript, opset=17),
    "TorchScript, any batch": functools.partial(torchscript, opset=14, axes=BATCH),
}
FEWER = ("timm_vit", "hf_clip", "hub_dinov2_g_reg", "timm_siglip")


def agree(by_file: Found, by_pytorch: Found) -> None:
    """The same selection, order and threshold; figures but for rounding."""
    got, right = by_file.neurons, by_pytorch.neurons
    units = [[(n.layer, n.index, n.sign) for n in found.neurons] for found in (got, right)]
    assert units[0] == units[1]
    for a, b in zip(got.neurons, right.neurons, strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-4)
        assert a.value == pytest.approx(b.value, rel=1e-4)
    for name in ("threshold", "detection_layer", "images", "scoring", "seed", "score"):
        assert got.about[name] == right.about[name]
    assert by_file.runs == by_pytorch.runs
    close(got.about["report"], right.about["report"])
    close(got.about["selection"], right.about["selection"])
    close(got.about["fingerprints"], right.about["fingerprints"])


def close(a: Any, b: Any) -> None:
    if isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in b:
            close(a[key], b[key])
    elif isinstance(b, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            close(x, y)
    elif isinstance(b, float):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    else:
        assert a == b


@functools.cache
def planted(name: str) -> tuple[nn.Module, Family]:
    family = EXPORTED[name]
    return family.visual(planted_module(family)), family


def found_in(subject: Subject, family: Family) -> Found:
    pixels = flagged_pictures(24, 2, family.size, family.patch).numpy()
    return find_neurons(subject, ArrayImages(pixels, batch_size=5))


@functools.cache
def by_pytorch(name: str) -> Found:
    module, family = planted(name)
    return found_in(PyTorchSubject(from_module(module, (family.size, family.size))), family)


@pytest.mark.parametrize(
    ("name", "exporter"),
    [(name, how) for name in EXPORTED for how in EXPORTERS if name in FEWER or "any" in how],
)
def test_the_same_neurons_as_in_pytorch(name: str, exporter: str, tmp_path: Path) -> None:
    module, family = planted(name)
    EXPORTERS[exporter](module, (family.size, family.size), tmp_path / "in.onnx")
    found = found_in(open_file(tmp_path / "in.onnx", GIVEN).subject, family)
    agree(found, by_pytorch(name))
    assert {(n.layer, n.index) for n in found.neurons.neurons} == {(1, 5), (1, 60)}
    assert "torch" not in found.neurons.about["versions"]
    assert {"onnxruntime", "onnx"} <= found.neurons.about["versions"].keys()


def test_sets_of_units_are_judged_alike(tmp_path: Path) -> None:
    # Sets that begin at different layers, and a unit that acts through GELU's negative values.
    family = EXPORTED["timm_vit"]
    units = [(0, 5), (0, 60), (1, 7), (1, 100), (1, 130)]
    size = (family.size, family.size)
    module = models.livened(family.build())
    pictures = flagged_pictures(16, 1, family.size, family.patch)
    vit = plant(module, pictures, units, negative=[(1, 130)]).vit
    dynamo(module, size, tmp_path / "in.onnx", 20)
    pixels = flagged_pictures(10, 2, family.size, family.patch).numpy()
    subjects: list[Subject] = [
        open_file(tmp_path / "in.onnx", GIVEN).subject,
        PyTorchSubject(vit),
    ]
    agree(found_in(subjects[0], family), found_in(subjects[1], family))
    detection = detect(gather_norms(subjects[1], [pixels]))
    scores = score_neurons(subjects[1], [pixels], detection)
    assert scores.activation[1][130] < 0 < scores.score[1][130]
    judges = [Judge(subject, pixels, detection, scores, batch_size=4) for subject in subjects]
    for some in ([(1, 130)], units[2:], [(0, 5)], [(0, 5), (1, 7)], units, [(1, 3)]):
        got, right = (judge.run(some) for judge in judges)
        assert got.outliers == right.outliers
        assert got.largest == pytest.approx(right.largest, rel=1e-5)
    assert judges[0].runs == judges[1].runs
    # Passes began behind what no set touches, and what they began with was computed once.
    assert {layer for _, layer in judges[0]._starts} == {1}
    assert judges[0]._starts.keys() == judges[1]._starts.keys()


def test_silenced_units_leave_nothing_to_find(tmp_path: Path) -> None:
    from regraft.errors import ModelError

    family = EXPORTED["timm_vit"]
    module = models.livened(family.build())
    dynamo(module, (family.size, family.size), tmp_path / "in.onnx", 20)
    with pytest.raises(ModelError, match=r"^no outlier tokens: .* there is nothing to patch"):
        found_in(open_file(tmp_path / "in.onnx", GIVEN).subject, family)


# The command line.


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped ViT as a file, twice, and its neurons by PyTorch."""
    from regraft.cli.main import main

    folder = tmp_path_factory.mktemp("shipped")
    module = load(SHIPPED).module
    dynamo(module, (96, 96), folder / "dynamo.onnx", 20)
    torchscript(module, (96, 96), folder / "torchscript.onnx", 17)
    words = ["find", SHIPPED, "--images", str(SAMPLES), "--out", str(folder / "right.json")]
    assert main(words) == 0
    return folder


WITHOUT_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "timm", "transformers", "onnxscript", "safetensors"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
from regraft.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_the_shipped_vit_without_torch_found_and_patched(
    exporter: str, shipped: Path, tmp_path: Path
) -> None:
    def run(*words: object) -> str:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        said = warned(len(list(SAMPLES.iterdir()))) if words[0] == "find" else ""
        assert (done.returncode, done.stderr) == (0, said)
        return done.stdout

    path, neurons, out = shipped / f"{exporter}.onnx", tmp_path / "n.json", tmp_path / "out.onnx"
    half = ("--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5, *GEOMETRY)
    text = run("find", path, "--images", SAMPLES, "--out", neurons, *half)
    assert f"{path}: 12 register neurons (6 in layer 3, 6 in layer 4)" in text
    assert "control: zeroed, no register" in text
    right, got = (json.loads(p.read_text()) for p in (shipped / "right.json", neurons))
    for key in ("model", "architecture", "weights_sha256", "versions"):
        del right[key]
    for key in ("model", "files_sha256", "precision", "output", "versions"):
        del got[key]
    close(got, right)
    # No warning: the file is known by the fingerprints of its down-projections.
    text = run("patch", path, "--neurons", neurons, "--out", out)
    assert "redirect site: layer 4" in text
    pixels = np.random.default_rng(0).normal(size=(1, 3, 96, 96)).astype(np.float32)
    outputs = [
        open_session(p.read_bytes()).run(None, {onnx.load(p).graph.input[0].name: pixels})[0]
        for p in (path, out)
    ]
    assert outputs[0].shape == outputs[1].shape
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-4


def test_neurons_of_a_file_belong_to_its_pytorch_model_too(shipped: Path, tmp_path: Path) -> None:
    from regraft_export.identity import check_identity

    about = json.loads((shipped / "right.json").read_text())
    about = {k: about[k] for k in ("fingerprints", "image_size")} | {"model": "in.onnx"}
    rows = Neurons.load(shipped / "right.json").neurons
    loaded = load(SHIPPED)
    vit = from_module(loaded.module, (96, 96))
    assert check_identity(Neurons(rows, about), loaded, vit, force=False) == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a planted timm ViT as plain.onnx, and 24 pictures in images/."""
    folder = tmp_path_factory.mktemp("find-file")
    module, family = planted("timm_vit")
    dynamo(module, (family.size, family.size), folder / "plain.onnx", 18)
    (folder / "images").mkdir()
    pictures: Tensor = flagged_pictures(24, 2, family.size, family.patch)
    for number, levels in enumerate(grey_levels(pictures)):
        Image.fromarray(levels).save(folder / "images" / f"{number:02}.png")
    return folder


@pytest.fixture
def find(place: Path, tmp_path: Path, regraft: Regraft) -> Regraft:
    """Runs `regraft find FILE` on these pictures: exit code, stdout, stderr."""

    def call(path: Path, *words: object) -> tuple[int, str, str]:
        where = ("--images", place / "images", "--out", tmp_path / "n.json")
        return regraft("find", path, *where, *words)

    return call


def test_what_the_file_says(find: Regraft, place: Path, tmp_path: Path) -> None:
    code, out, err = find(place / "plain.onnx", *COLOURS, *GEOMETRY)
    assert (code, err) == (0, warned(24))
    assert "2 register neurons (2 in layer 1)" in out
    about = Neurons.load(tmp_path / "n.json").about
    assert about["model"] == str(place / "plain.onnx")
    assert len(about["files_sha256"]["plain.onnx"]) == 64
    assert (about["precision"], about["image_size"]) == ("fp32", [64, 64])
    assert about["preprocessing"]["std"] == [0.2, 0.2, 0.2]
    assert list(about["fingerprints"]) == ["1"]
    assert set(about["report"]["controls"]) == {
        "random_neurons",
        "zero_token",
        "zeroed_without_register",
    }
    text = (tmp_path / "n.json").read_bytes()
    assert find(place / "plain.onnx", *COLOURS, *GEOMETRY, "--force")[0] == 0
    assert (tmp_path / "n.json").read_bytes() == text


def test_neurons_of_another_fine_tune_do_not_patch(
    find: Regraft, place: Path, tmp_path: Path, regraft: Regraft
) -> None:
    assert find(place / "plain.onnx", *COLOURS, *GEOMETRY)[0] == 0
    model = onnx.load(place / "plain.onnx")
    draw = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim == 2:
            noise = 0.02 * values.std() * draw.normal(size=values.shape)
            other = (values + noise).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(other, tensor.name))
    onnx.save(model, tmp_path / "tuned.onnx")
    for path, code in ((tmp_path / "tuned.onnx", 1), (place / "plain.onnx", 0)):
        words = ("--neurons", tmp_path / "n.json", "--out", tmp_path / "out.onnx")
        got, _, err = regraft("patch", path, *words)
        assert got == code
        assert ("differs from the fingerprint" in err) == bool(code)


def test_fp16_gives_the_same_units(find: Regraft, tmp_path: Path) -> None:
    import copy

    module, family = planted("timm_vit")
    path = tmp_path / "fp16.onnx"
    dynamo(copy.deepcopy(module).half(), (family.size, family.size), path, 20)
    code, out, err = find(path, *COLOURS, *GEOMETRY)
    assert (code, err) == (0, warned(24))
    assert "float32 twin" not in out
    found = Neurons.load(tmp_path / "n.json")
    assert found.about["precision"] == "fp16"
    assert {(n.layer, n.index) for n in found.neurons} == {(1, 5), (1, 60)}


def test_bf16_says_that_it_runs_as_its_twin(
    find: Regraft, tmp_path: Path, regraft: Regraft
) -> None:
    import copy

    module, family = planted("timm_vit")
    path = tmp_path / "bf16.onnx"
    dynamo(copy.deepcopy(module).bfloat16(), (family.size, family.size), path, 22)
    code, out, err = find(path, *COLOURS, *GEOMETRY)
    assert (code, err) == (0, warned(24))
    assert "run as its float32 twin: ONNX Runtime has no bfloat16 on the CPU" in out
    assert Neurons.load(tmp_path / "n.json").about["precision"] == "bf16"
    words = ("--neurons", tmp_path / "n.json", "--dry-run")
    assert regraft("patch", path, *words)[::2] == (0, "")


def test_a_file_needs_its_preprocessing(find: Regraft, place: Path, tmp_path: Path) -> None:
    code, _, err = find(place / "plain.onnx", "--mean", 0.5, 0.5, 0.5)
    assert (code, err.count("\n")) == (1, 1)
    assert "lacks std, interpolation, crop_pct, crop_mode; give --std --interpolation" in err
    assert not (tmp_path / "n.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image-size", "96"], "is for images of 64 x 64, not 96 x 96; leave --image-size out"),
        (["--prefix", "text"], "no stack of transformer blocks has names that begin with 'text'"),
        (["--output", "text"], "--output is 'text'; expected an output computed from the images"),
        (["--detection-layer", "9"], "detection layer is 9; the model has 3 blocks"),
    ],
)
def test_bad_values(
    words: list[str], message: str, find: Regraft, place: Path, tmp_path: Path
) -> None:
    code, out, err = find(place / "plain.onnx", *COLOURS, *GEOMETRY, *words)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert not (tmp_path / "n.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "w.pt"], "--weights is for PyTorch models; "),
        (["--trust-repo"], "--trust-repo is for PyTorch models; "),
        (["--device", "cuda"], "--device is 'cuda'; an ONNX file runs on the CPU here"),
        (["--image-size", "64,64,64"], "'64,64,64' has 3 numbers; expected one, or two"),
    ],
)
def test_wrong_usage(
    words: list[str], message: str, find: Regraft, place: Path, tmp_path: Path
) -> None:
    code, out, err = find(place / "plain.onnx", *COLOURS, *GEOMETRY, *words)
    assert (code, out, message in err) == (2, "", True)
    assert not (tmp_path / "n.json").exists()


@pytest.mark.parametrize("option", ["--prefix", "--output"])
def test_options_of_files_are_refused_for_pytorch(
    option: str, tmp_path: Path, regraft: Regraft
) -> None:
    words = ("--images", SAMPLES, "--out", tmp_path / "n.json", option, "x")
    code, _, err = regraft("find", SHIPPED, *words)
    assert code == 2
    assert f"{option} is for ONNX files alone; MODEL is '{SHIPPED}'" in err


@pytest.mark.parametrize("kind", REFUSALS)
def test_bad_files_get_one_message_and_nothing_is_written(
    kind: str, find: Regraft, place: Path, tmp_path: Path
) -> None:
    path = bad(kind, tmp_path, place / "plain.onnx")
    before = {p.name for p in tmp_path.iterdir()}
    code, out, err = find(path, *COLOURS, *GEOMETRY)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert REFUSALS[kind] in err
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_file_that_is_missing_or_has_another_suffix(find: Regraft, tmp_path: Path) -> None:
    code, _, err = find(tmp_path / "none.onnx", *COLOURS, *GEOMETRY)
    assert code == 1
    assert "none.onnx: cannot be read (No such file or directory)" in err
    (tmp_path / "model.pt").write_bytes(b"no model at all")
    code, _, err = find(tmp_path / "model.pt", *COLOURS, *GEOMETRY)
    assert code == 1
    assert "model.pt: is truncated or no ONNX file" in err


def test_a_patched_file_is_refused(
    find: Regraft, place: Path, tmp_path: Path, regraft: Regraft
) -> None:
    hand = tmp_path / "hand.json"
    hand.write_text(json.dumps(Neurons((RegisterNeuron(0, 3),)).to_json()))
    words = ("--neurons", hand, "--out", tmp_path / "out.onnx")
    assert regraft("patch", place / "plain.onnx", *words)[0] == 0
    code, _, err = find(tmp_path / "out.onnx", *COLOURS, *GEOMETRY)
    assert code == 1
    assert "is patched already; take the file it was made from" in err


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_positions_in_attention_are_refused(name: str, find: Regraft, tmp_path: Path) -> None:
    import timm

    size = 32 if name.startswith("beit") else 56
    module = models.livened(
        timm.create_model(name, depth=2, embed_dim=48, num_heads=3, num_classes=0, img_size=size)
    )
    dynamo(module, (size, size), tmp_path / "in.onnx", 18)
    code, _, err = find(tmp_path / "in.onnx", *COLOURS, *GEOMETRY)
    assert (code, err.count("\n")) == (1, 1)
    assert "a constant with one entry per token" in err


def test_what_onnx_runtime_cannot_load_is_said(find: Regraft, place: Path, tmp_path: Path) -> None:
    model = onnx.load(place / "plain.onnx")
    model.ir_version = 99
    onnx.save(model, tmp_path / "in.onnx")
    code, _, err = find(tmp_path / "in.onnx", *COLOURS, *GEOMETRY)
    assert (code, err.count("\n")) == (1, 1)
    assert "in.onnx: ONNX Runtime cannot load it: " in err


def test_without_onnx_runtime(find: Regraft, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = find(place / "plain.onnx", *COLOURS, *GEOMETRY)
    assert (code, err.count("\n")) == (1, 1)
    assert "runs by ONNX Runtime, and onnxruntime " in err
    assert "pip install 'regraft-runtime[cpu]'" in err
