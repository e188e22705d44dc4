"""load(): schemes, what comes out of it, and the seam for later ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regraft.errors import ModelError, UsageError
from regraft.preprocessing import Preprocessing
from regraft_export import sources
from regraft_export.sources import PreprocessingOverrides, load
from regraft_export.sources.reasons import kind_and_reason, reason
from regraft_export.sources.weights import weights_sha256

MODEL = """
import torch
from torch import nn

CONFIG = dict(input_size=(3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear",
              crop_pct=1.0, crop_mode="squash")

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0, dtype=torch.float16))
        self.drop = nn.Dropout()

def build():
    return Tiny().train(), CONFIG

def bare():
    return Tiny()

def spoiled():
    module = Tiny()
    module.weight.data[2] = float("nan")
    return module, CONFIG
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(MODEL)
    return f"python:{tmp_path / 'own.py'}"


def test_what_comes_out(source: str) -> None:
    loaded = load(f"{source}:build")
    assert loaded.source == f"{source}:build"
    assert loaded.architecture == "Tiny"
    assert loaded.preprocessing.image_size == (8, 8)
    assert not loaded.module.training
    assert not loaded.module.drop.training
    weight = loaded.module.weight
    assert (weight.dtype, weight.requires_grad, weight.device.type) == (torch.float32, False, "cpu")
    assert loaded.weights_sha256 == weights_sha256(loaded.module)


def test_a_complete_preprocessing_replaces_the_models_own(source: str) -> None:
    ours = Preprocessing((4, 6), (0.5,) * 3, (0.5,) * 3, "none", (1, 1), crop_offset="floor")
    ignored = PreprocessingOverrides(image_size=(2, 2))
    for function in ("build", "bare"):
        loaded = load(f"{source}:{function}", overrides=ignored, preprocessing=ours)
        assert loaded.preprocessing is ours


def test_spoiled_weights_are_refused(source: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(f"{source}:spoiled")
    assert str(caught.value) == (
        f"{source}:spoiled: the weight weight has 1 NaN or infinite values of 4; expected finite "
        "weights"
    )


FORMS = (
    "timm:NAME, hf:REPO_OR_FOLDER, open_clip:ARCH/PRETRAINED, hub:REPO:ENTRY, "
    "python:FILE.py:FUNCTION"
)


@pytest.mark.parametrize("model", ["vit_base_patch16_224", "tf:x", "timm:", "hub:", ":x", ""])
def test_other_forms_are_refused(model: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(model)
    assert str(caught.value) == f"{model!r} is not a model; expected one of {FORMS}"


@pytest.mark.parametrize(
    ("model", "blocked", "extra"),
    [
        ("timm:vit_tiny_patch16_224", "timm", "timm"),
        ("hf:some/repo", "transformers", "hf"),
        ("open_clip:ViT-B-16/openai", "open_clip", "open-clip"),
        ("hub:a/b:f", "torch", "torch"),
        ("python:a.py:f", "torch", "torch"),
        ("timm:vit_tiny_patch16_224", "torch", "timm"),
    ],
)
def test_missing_packages_say_what_to_install(
    model: str, blocked: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = ("timm_source", "hf_source", "open_clip_source", "hub_source", "python_source")
    for name in (*modules, "weights"):
        monkeypatch.delitem(sys.modules, f"{sources.__name__}.{name}", raising=False)
        monkeypatch.delattr(sources, name, raising=False)
    monkeypatch.setitem(sys.modules, blocked, None)
    with pytest.raises(ModelError) as caught:
        load(model)
    assert str(caught.value) == (
        f"{model}: the package '{blocked}' is not installed; "
        f"pip install 'regraft-export[{extra}]', or in a checkout of regraft "
        f"pip install './export[{extra}]'"
    )


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, regraft_export.sources; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_reasons_are_one_short_line() -> None:
    assert reason(ValueError("a\n  b\tc")) == "a b c"
    assert reason(ValueError("x" * 300)) == "x" * 237 + "..."
    assert reason(EOFError()) == kind_and_reason(EOFError()) == "EOFError"
    assert kind_and_reason(ValueError("no\nway")) == "ValueError: no way"
