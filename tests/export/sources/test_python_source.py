"""python: models from own code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch

from regraft.errors import ModelError
from regraft_export.sources import PreprocessingOverrides, load

CODE = """
from dataclasses import dataclass
from torch import nn
from neighbour import WIDTH

CONFIG = dict(input_size=(3, 8, 12), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear",
              crop_pct=1.0, crop_mode="squash")

@dataclass
class NeedsItsModule:
    x: "int" = 0

def pair(): return nn.Linear(WIDTH, 2), CONFIG
def alone(): return nn.Linear(WIDTH, 2)
def partly(): return nn.Linear(WIDTH, 2), {"mean": (0, 0, 0), "std": (1, 1, 1)}
def number(): return 3
def three(): return 1, 2, 3
def swapped(): return CONFIG, nn.Linear(1, 1)
def fails(): raise OSError("no\\nweights")
def needs(x): return nn.Linear(1, 1)
constant = 3
"""
ALL = PreprocessingOverrides(
    image_size=(4, 4),
    mean=(0.1, 0.2, 0.3),
    std=(1.0, 1.0, 1.0),
    interpolation="box",
    crop_pct=0.5,
    crop_mode="center",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    path = tmp_path / "own_model.py"
    path.write_text(CODE)
    return path


@pytest.fixture(autouse=True)
def _forget_neighbours() -> None:
    for name in ("neighbour", "own_model", "broken"):
        sys.modules.pop(name, None)


def test_file_with_a_neighbour(file: Path) -> None:
    before = list(sys.path)
    loaded = load(f"python:{file}:pair")
    assert loaded.architecture == "Linear"
    assert loaded.module.in_features == 5
    assert loaded.preprocessing.image_size == (8, 12)
    assert loaded.preprocessing.interpolation == "bilinear"
    assert sys.path == before


def test_module_by_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert load("python:own_model:pair").module.in_features == 5


def test_overrides_replace_and_complete(file: Path) -> None:
    replaced = load(f"python:{file}:pair", overrides=PreprocessingOverrides(image_size=(4, 4)))
    assert replaced.preprocessing.image_size == (4, 4)
    completed = load(f"python:{file}:alone", overrides=ALL).preprocessing
    assert (completed.resize, completed.resize_size) == ("shortest-edge", (8, 8))
    assert completed.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        (
            "alone",
            "input_size, mean, std, interpolation, crop_pct, crop_mode; give --image-size --mean "
            "--std --interpolation --crop-pct --crop-mode",
        ),
        (
            "partly",
            "input_size, interpolation, crop_pct, crop_mode; give --image-size --interpolation "
            "--crop-pct --crop-mode",
        ),
    ],
)
def test_incomplete_preprocessing_names_the_options(
    file: Path, function: str, missing: str
) -> None:
    with pytest.raises(ModelError) as caught:
        load(f"python:{file}:{function}")
    assert str(caught.value) == (
        f"python:{file}:{function}: the preprocessing lacks {missing}, or return (module, {{...}}) "
        "with input_size, mean, std, interpolation, crop_pct, crop_mode"
    )


def test_incomplete_preprocessing_is_said_before_the_weights_are_read(file: Path) -> None:
    with pytest.raises(ModelError, match="the preprocessing lacks input_size"):
        load(f"python:{file}:alone", weights=file.parent / "none.pth")


TIMM = """
import timm

def build(**options): return timm.create_model(
    "vit_tiny_patch16_224", embed_dim=12, depth=1, num_heads=1, num_classes=0, **options)
def alone(): return build()
def small(): return build(img_size=(32, 48))
def partly(): return build(), {"mean": (0.1, 0.2, 0.3), "std": None, "crop_pct": 0.5}
def unrecorded():
    module = build()
    module.pretrained_cfg = {}
    return module
"""


@pytest.fixture
def timm_file(tmp_path: Path) -> Path:
    path = tmp_path / "own_timm.py"
    path.write_text(TIMM)
    return path


def test_a_timm_model_brings_its_own_preprocessing(timm_file: Path) -> None:
    by_name = load("timm:vit_tiny_patch16_224", weights=published(timm_file.parent))
    assert load(f"python:{timm_file}:alone").preprocessing == by_name.preprocessing


def published(folder: Path) -> Path:
    """A weights file for the architecture by name, which otherwise would be downloaded."""
    module = timm.create_model("vit_tiny_patch16_224")
    torch.save(module.state_dict(), folder / "tiny.pth")
    return folder / "tiny.pth"


def test_a_timm_model_is_preprocessed_for_the_size_it_was_built_with(timm_file: Path) -> None:
    assert load(f"python:{timm_file}:small").preprocessing.image_size == (32, 48)


def test_the_dict_and_the_options_go_before_what_timm_recorded(timm_file: Path) -> None:
    overrides = PreprocessingOverrides(interpolation="box", mean=(0.0, 0.0, 0.0))
    got = load(f"python:{timm_file}:partly").preprocessing
    assert (got.mean, got.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert (got.resize_size, got.interpolation) == ((448, 448), "bicubic")
    got = load(f"python:{timm_file}:partly", overrides=overrides).preprocessing
    assert (got.mean, got.interpolation) == ((0.0, 0.0, 0.0), "box")


def test_a_timm_model_without_a_record_asks_for_everything(timm_file: Path) -> None:
    with pytest.raises(ModelError, match="the preprocessing lacks input_size, mean, std, "):
        load(f"python:{timm_file}:unrecorded")


RECORD = """
from torch import nn
def build():
    module = nn.Linear(1, 1)
    module.pretrained_cfg = {"input_size": (3, 8, 8)}
    return module
"""


def test_timm_is_imported_for_a_record_alone(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    load(f"python:{file}:pair")
    path = tmp_path / "record.py"
    path.write_text(RECORD)
    with pytest.raises(ModelError, match="the preprocessing lacks input_size"):
        load(f"python:{path}:build")


def test_weights_from_a_file(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"weight": torch.ones(2, 5), "bias": torch.zeros(2)}, path)
    assert load(f"python:{file}:pair", weights=path).module.weight.sum() == 10


EXPECTED = (
    "expected an nn.Module, or a pair of it and a dict with input_size, mean, std, interpolation, "
    "crop_pct, crop_mode"
)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("number", f"returned an int; {EXPECTED}"),
        ("three", f"returned a tuple of int, int, int; {EXPECTED}"),
        ("swapped", f"returned a tuple of dict, Linear; {EXPECTED}"),
        ("fails", "fails() failed (OSError: no weights)"),
        (
            "needs",
            "needs() failed (TypeError: needs() missing 1 required positional argument: 'x')",
        ),
        (
            "constant",
            "own_model.py has no function 'constant'; expected one without "
            "arguments that returns an nn.Module",
        ),
        (
            "absent",
            "own_model.py has no function 'absent'; expected one without "
            "arguments that returns an nn.Module",
        ),
    ],
)
def test_functions_that_do_not_fit(file: Path, function: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(f"python:{file}:{function}")
    assert str(caught.value) == f"python:{file}:{function}: {message}"


def test_targets_that_do_not_exist(tmp_path: Path) -> None:
    missing = tmp_path / "none.py"
    with pytest.raises(ModelError) as caught:
        load(f"python:{missing}:f")
    assert str(caught.value) == f"python:{missing}:f: no such file {missing}"
    with pytest.raises(ModelError, match=r"importing no\.such failed \(ModuleNotFoundError: "):
        load("python:no.such:f")
    with pytest.raises(ModelError, match=r"python:nofunction: expected python:FILE\.py:FUNCTION"):
        load("python:nofunction")


def test_broken_code(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def f(:\n")
    with pytest.raises(ModelError, match=r"importing .*broken\.py failed \(SyntaxError: "):
        load(f"python:{path}:f")
