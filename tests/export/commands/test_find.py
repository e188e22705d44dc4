"""`regraft find` through the command line: what it writes, prints and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.pictures import warned
from torch import Tensor

from regraft.cli.main import main
from regraft.neurons import Neurons

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = [(2, 5), (2, 60)]
MODEL_FILE = """
import timm, torch

CONFIG = dict(input_size=(3, 64, 64), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
              interpolation="bicubic", crop_pct=1.0, crop_mode="center")

def build():
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=48, depth=5, num_heads=3, num_classes=0).eval()

def vit():
    return build(), CONFIG

def bare():
    return build()
"""


def grey_levels(pixels: Tensor) -> np.ndarray:
    """uint8 (N, H, W, 3), which mean 0.5 and std 0.2 turn back into about ``pixels``."""
    levels = ((pixels * 0.2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    planter: Callable[..., Any],
    pictures: Callable[..., Tensor],
) -> Path:
    """A folder with model.py, planted.pt and 24 pictures in images/."""
    folder = tmp_path_factory.mktemp("find")
    (folder / "model.py").write_text(MODEL_FILE)
    space: dict[str, Any] = {}
    exec(MODEL_FILE, space)
    pixels = (torch.from_numpy(grey_levels(pictures(16, 1))).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
    planted = planter(space["build"](), pixels, UNITS)
    torch.save(planted.vit.module.state_dict(), folder / "planted.pt")
    (folder / "images").mkdir()
    for number, levels in enumerate(grey_levels(pictures(24, 2))):
        Image.fromarray(levels).save(folder / "images" / f"{number:02}.png")
    return folder


@pytest.fixture
def find(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `regraft find` on the planted ViT; returns exit code, stdout and stderr."""

    def call(
        *words: object,
        weights: str | None = "planted.pt",
        images: object = None,
        model: str = "vit",
    ) -> tuple[int, str, str]:
        argv = ["find", f"python:{place / 'model.py'}:{model}"]
        folders = images if isinstance(images, list) else [images or place / "images"]
        argv += ["--images", *map(str, folders), "--out", str(tmp_path / "n.json")]
        argv += [] if weights is None else ["--weights", str(place / weights)]
        code = main([*argv, *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_finds_the_units_and_says_so(
    find: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = find()
    assert (code, err) == (0, warned(24))
    neurons = Neurons.load(tmp_path / "n.json")
    assert {(n.layer, n.index) for n in neurons.neurons} == set(UNITS)
    about = neurons.about
    assert about["model"].endswith("model.py:vit")
    assert about["architecture"] == "VisionTransformer"
    assert len(about["weights_sha256"]) == 64
    assert about["image_size"] == [64, 64]
    assert about["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert about["images"] == {"given": 24, "score": 12, "select": 6, "report": 6, "skipped": 0}
    assert "2 register neurons (2 in layer 2)" in out
    assert "outlier tokens: patch norm above" in out
    assert "3.12% of the patches" in out
    rows = {line[:30].strip(): line[30:].split() for line in out.splitlines()}
    assert rows["as it is"][0] == "12"
    assert rows["redirected"][0] == "0"
    assert rows["control: random neurons"][0] == "12"
    assert rows["control: zero token alone"][0] == "12"
    assert rows["control: zeroed, no register"][0] == "0"
    assert f"written: {tmp_path / 'n.json'}" in out


def test_same_seed_same_file_byte_for_byte(
    find: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    texts = []
    for _ in range(2):
        assert find("--seed", 3, "--force")[0] == 0
        texts.append((tmp_path / "n.json").read_bytes())
    assert texts[0] == texts[1]
    assert str(tmp_path).encode() not in texts[0]


def test_json(find: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, _ = find("--json", "--batch-size", 5, "--workers", 1)
    assert code == 0
    figures = json.loads(out)
    assert sorted(map(tuple, figures["neurons"])) == UNITS
    assert figures["report"]["after"]["removed"] == 1
    assert set(figures["seconds"]) == {"detection", "scoring", "selection", "report"}
    assert figures["out"] == str(tmp_path / "n.json")


def test_paper_score_and_values_set_by_hand(
    find: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    words = ["--score", "activation", "--max-layer", 2, "--detection-layer", 3, "--threshold", 20]
    code, _, err = find(*words, "--max-neurons", 8)
    assert (code, err) == (0, warned(24))
    about = Neurons.load(tmp_path / "n.json").about
    assert (about["score"], about["detection_layer"], about["threshold"]) == ("activation", 3, 20.0)


def test_enough_images_bring_no_warning(
    find: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft_export.commands.find.ENOUGH", 24)
    code, _, err = find()
    assert (code, err) == (0, "")


def test_no_outlier_tokens(find: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = find(weights=None)
    assert (code, out) == (1, "")
    assert err.startswith("regraft: no outlier tokens: at layer ")
    assert "of 768 patches in 0 of 12 images" in err
    assert "there is nothing to patch" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_failed_gate_writes_nothing(
    find: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft_export.finding.report.MIN_COSINE", 1.1)
    code, _, err = find()
    assert code == 1
    assert "expected at least 1.1; nothing was written" in err
    assert list(tmp_path.iterdir()) == []


def test_images_of_several_folders(
    find: Callable[..., tuple[int, str, str]], place: Path, tmp_path: Path
) -> None:
    halves = [tmp_path / "first", tmp_path / "second"]
    for number, path in enumerate(sorted((place / "images").iterdir())):
        halves[number // 12].mkdir(exist_ok=True)
        shutil.copy(path, halves[number // 12])
    code, _, err = find(images=halves)
    assert (code, err) == (0, warned(24))
    neurons = Neurons.load(tmp_path / "n.json")
    assert neurons.about["images"]["given"] == 24
    assert {(n.layer, n.index) for n in neurons.neurons} == set(UNITS)


def test_bad_images_are_named_and_skipped(
    find: Callable[..., tuple[int, str, str]], place: Path, tmp_path: Path
) -> None:
    images = tmp_path / "mixed"
    shutil.copytree(place / "images", images)
    for name in ("00.png", "05.png", "11.png"):
        (images / name).write_bytes(b"")
    code, _, err = find(images=images)
    assert code == 0
    for name in ("00.png", "05.png", "11.png"):
        assert err.count(f"{name}: is empty (0 bytes)") == 1
    about = Neurons.load(tmp_path / "n.json").about
    assert about["images"]["skipped"] == 3
    assert sum(about["images"][part] for part in ("score", "select", "report")) == 21
    code, _, err = find("--strict", "--force", images=images)
    assert code == 1
    assert "3 of 24 images could not be read (named above)" in err


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "the folder holds no images"),
        (5, "5 images came; finding needs at least 6"),
    ],
)
def test_too_few_images(
    find: Callable[..., tuple[int, str, str]],
    place: Path,
    tmp_path: Path,
    count: int,
    message: str,
) -> None:
    images = tmp_path / "few"
    images.mkdir()
    for path in sorted((place / "images").iterdir())[:count]:
        shutil.copy(path, images)
    code, _, err = find(images=images)
    assert code == 1
    assert message in err
    assert not (tmp_path / "n.json").exists()


def test_all_images_bad(find: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    images = tmp_path / "bad"
    images.mkdir()
    for number in range(8):
        (images / f"{number}.jpg").write_text("no picture")
    code, _, err = find(images=images)
    assert code == 1
    assert "no image could be used for detection; expected at least one" in err


def test_existing_output_needs_force(
    find: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "n.json").write_text("precious")
    code, _, err = find()
    assert code == 1
    assert "exists already; give --force" in err
    assert (tmp_path / "n.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--detection-layer", "9"], "detection layer is 9; the model has 5 blocks"),
        (["--threshold", "1e9"], "no outlier tokens above the threshold 1e+09 that was set"),
        (["--max-layer", "4"], "max layer is 4; expected 0 to 2, the detection layer"),
        (["--device", "cuda:99"], "--device is 'cuda:99'; torch sees "),
    ],
)
def test_bad_values(
    find: Callable[..., tuple[int, str, str]], tmp_path: Path, words: list[str], message: str
) -> None:
    code, _, err = find(*words)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "n.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--score", "magic"], "--score: invalid choice: 'magic'"),
        (["--batch-size", "0"], "--batch-size: '0' is not an integer from 1"),
        (["--seed", "-1"], "--seed: '-1' is not an integer from 0"),
        (["--mean", "1"], "--mean: expected 3 arguments"),
        (["--mean", "1", "x", "0"], "--mean: 'x' is not a finite number"),
        (["--std", "1", "0", "1"], "--std: '0' is not a finite number above 0"),
        (["--crop-pct", "1.5"], "--crop-pct: '1.5' is not a finite number above 0, at most 1"),
        (["--threshold", "0"], "--threshold: '0' is not a finite number above 0"),
        (["--threshold", "inf"], "--threshold: 'inf' is not a finite number above 0"),
        (["--detection-layer", "-1"], "--detection-layer: '-1' is not an integer from 0"),
        (["--max-layer", "-1"], "--max-layer: '-1' is not an integer from 0"),
        (["--device", "toaster"], "--device: 'toaster' is no device; expected cpu, cuda or"),
        (["--device", "meta"], "--device: 'meta' is no device; expected cpu, cuda or cuda:N"),
        (["--image-size", "64,64,64"], "--image-size: '64,64,64' has 3 numbers; expected one"),
        (["--image-size", "20000"], "--image-size: '20000' is not an integer from 1 to 16384"),
        (["--out", "n.txt"], "--out: n.txt: ends in '.txt'; expected .json"),
        (["--out", "n"], "--out: n: has no suffix; expected .json"),
        (["--out", "n.json/"], "--out: n.json/: ends in '/', as a folder does; expected .json"),
    ],
)
def test_wrong_usage(
    find: Callable[..., tuple[int, str, str]],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        find(*words)
    assert caught.value.code == 2
    assert f"error: argument {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--detection-layer", "2", "--max-layer", "3"],
            "--max-layer is 3 and --detection-layer 2; expected at most that layer",
        ),
        (["--trust-repo"], "--trust-repo is for models of hub:REPO:ENTRY alone; MODEL is "),
    ],
)
def test_options_that_do_not_go_together(
    find: Callable[..., tuple[int, str, str]], tmp_path: Path, words: list[str], message: str
) -> None:
    code, _, err = find(*words)
    assert code == 2
    assert err.startswith(f"regraft: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "n.json").exists()


def test_what_is_no_model_is_told_all_forms(
    regraft: Callable[..., tuple[int, str, str]], place: Path, tmp_path: Path
) -> None:
    words = ("--images", place / "images", "--out", tmp_path / "n.json")
    code, out, err = regraft("find", "nonsense", *words)
    assert (code, out) == (2, "")
    assert err.startswith("regraft: 'nonsense' is not a model; expected one of timm:NAME, ")
    assert err.endswith("python:FILE.py:FUNCTION, or a file IN.onnx\n")


def test_preprocessing_by_hand(find: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, err = find(model="bare")
    assert code == 1
    assert "the preprocessing lacks" in err
    words = ["--image-size", 64, "--mean", 0.5, 0.5, 0.5, "--std", 0.2, 0.2, 0.2]
    words += ["--interpolation", "bicubic", "--crop-pct", 1, "--crop-mode", "center"]
    code, _, _ = find(*words, model="bare")
    assert code == 0
    about = Neurons.load(tmp_path / "n.json").about
    assert about["preprocessing"]["std"] == [0.2, 0.2, 0.2]


def test_interrupt_leaves_nothing_behind(
    find: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("regraft_export.finding.find.make_report", interrupt)
    code, _, err = find()
    assert (code, err) == (130, "regraft: interrupted\n")
    assert list(tmp_path.iterdir()) == []
