"""What finding has to reach on the ViT that ships with the package, with default options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from regraft.cli.main import main
from regraft.neurons import Neurons
from regraft_export.demo import sample_images_folder, shipped_vit
from regraft_export.demo.vit import WEIGHTS_FILE

MODEL = "python:regraft_export.demo:shipped_vit"
Find = Callable[..., int]


@pytest.fixture(scope="module")
def true_units() -> set[tuple[int, int]]:
    file = sample_images_folder().parent / WEIGHTS_FILE
    with safe_open(file, "pt") as weights:
        return {(layer, index) for layer, index in json.loads(weights.metadata()["true_units"])}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Neurons, bytes]:
    """What default options give, and the file's bytes."""
    out = tmp_path_factory.mktemp("shipped") / "neurons.json"
    assert main(["find", MODEL, "--images", str(sample_images_folder()), "--out", str(out)]) == 0
    return Neurons.load(out), out.read_bytes()


def test_selected_units_are_true_ones(
    found: tuple[Neurons, bytes], true_units: set[tuple[int, int]]
) -> None:
    assert len(true_units) == 12
    chosen = {(n.layer, n.index) for n in found[0].neurons}
    assert len(chosen & true_units) >= 0.9 * len(chosen)


def test_outlier_tokens_are_gone_on_images_used_for_nothing_else(
    found: tuple[Neurons, bytes],
) -> None:
    about = found[0].about
    assert about["images"] == {"given": 64, "score": 32, "select": 16, "report": 16, "skipped": 0}
    report: dict[str, Any] = about["report"]
    assert report["before"]["outlier_tokens"] >= 16
    assert report["after"]["removed"] >= 0.95
    assert report["after"]["largest_over_median"] < 2
    assert report["after"]["output_cosine_median"] >= 0.98


def test_controls(found: tuple[Neurons, bytes]) -> None:
    controls = found[0].about["report"]["controls"]
    assert controls["random_neurons"]["removed"] < 0.1
    assert controls["zero_token"]["removed"] < 0.1
    # This ViT was merely trained to write outliers: zeroing does about as well as the redirect.
    assert controls["zeroed_without_register"]["removed"] >= 0.95


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_seeds_give_true_units_too(
    seed: int, true_units: set[tuple[int, int]], tmp_path: Path
) -> None:
    out = tmp_path / "neurons.json"
    words = ["find", MODEL, "--images", str(sample_images_folder()), "--out", str(out)]
    assert main([*words, "--seed", str(seed)]) == 0
    neurons = Neurons.load(out)
    chosen = {(n.layer, n.index) for n in neurons.neurons}
    assert len(chosen & true_units) >= 0.9 * len(chosen)
    assert neurons.about["report"]["after"]["largest_over_median"] < 2


def test_same_seed_same_file(found: tuple[Neurons, bytes], tmp_path: Path) -> None:
    out = tmp_path / "again.json"
    assert main(["find", MODEL, "--images", str(sample_images_folder()), "--out", str(out)]) == 0
    assert out.read_bytes() == found[1]


def test_silenced_vit_has_no_outlier_tokens(
    true_units: set[tuple[int, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _ = shipped_vit()
    with torch.no_grad():
        for layer, index in true_units:
            module.get_submodule(f"blocks.{layer}.mlp.fc2").weight[:, index] = 0
    torch.save(module.state_dict(), tmp_path / "silenced.pt")
    out = tmp_path / "neurons.json"
    words = ["find", MODEL, "--images", str(sample_images_folder()), "--out", str(out)]
    assert main([*words, "--weights", str(tmp_path / "silenced.pt")]) == 1
    assert "no outlier tokens" in capsys.readouterr().err
    assert not out.exists()
