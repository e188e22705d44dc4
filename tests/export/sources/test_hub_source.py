"""hub: a folder laid out as facebookresearch/dinov2, and torch.hub's questions."""

from __future__ import annotations

import builtins
import io
import re
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from tests.support.families import HUB
from tests.support.models import livened

from regraft.errors import ModelError
from regraft_export.sources import PreprocessingOverrides, load

ALL = PreprocessingOverrides(
    image_size=(56, 84),
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    interpolation="bicubic",
    crop_pct=1.0,
    crop_mode="squash",
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    module = livened(torch.hub.load(str(HUB), "tiny", source="local"))
    torch.save(module.state_dict(), tmp_path / "hub.pth")
    return tmp_path / "hub.pth"


@pytest.fixture(autouse=True)
def hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's folder: empty, and the network out of reach."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tmp_path / "torch" / "hub"


def test_weights_from_a_file(checkpoint: Path) -> None:
    loaded = load(f"hub:{HUB}:tiny", weights=checkpoint, overrides=ALL)
    assert loaded.architecture == "DinoVisionTransformer"
    assert loaded.preprocessing.image_size == (56, 84)
    assert (loaded.preprocessing.resize, loaded.preprocessing.mean) == ("exact", (0.5,) * 3)
    state = torch.load(checkpoint)
    for name, tensor in loaded.module.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("entry", ["tiny", "tiny_g_reg"])
def test_positions_are_resampled_once_by_the_models_own_rule(entry: str, tmp_path: Path) -> None:
    plain = {} if entry == "tiny" else {"pretrained": False}
    module = livened(torch.hub.load(str(HUB), entry, source="local", **plain))
    torch.save(module.state_dict(), tmp_path / "w.pth")
    loaded = load(f"hub:{HUB}:{entry}", weights=tmp_path / "w.pth", overrides=ALL)
    assert loaded.module.pos_embed.shape == (1, 1 + 4 * 6, 48)
    pixels = torch.randn(2, 3, 56, 84)
    with torch.no_grad():
        assert torch.equal(loaded.module(pixels), module(pixels))


def test_an_entry_may_bring_its_preprocessing() -> None:
    loaded = load(f"hub:{HUB}:with_preprocessing")
    assert loaded.preprocessing.image_size == (56, 56)
    assert loaded.preprocessing.std == (0.25,) * 3


def test_without_preprocessing_the_options_are_asked_for() -> None:
    with pytest.raises(ModelError) as caught:
        load(f"hub:{HUB}:tiny", overrides=PreprocessingOverrides(image_size=(56, 56)))
    assert str(caught.value) == (
        f"hub:{HUB}:tiny: the preprocessing lacks mean, std, interpolation, crop_pct, crop_mode; "
        "give --mean --std --interpolation --crop-pct --crop-mode"
    )


@pytest.mark.parametrize(
    "spec", ["dinov2_vits14", ":tiny", "a/b:", "justaname:entry", "a/b/c:entry"]
)
def test_other_forms_are_refused(spec: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(f"hub:{spec}")
    expected = "expected hub:OWNER/NAME:ENTRY, hub:OWNER/NAME:REF:ENTRY or hub:./FOLDER:ENTRY"
    assert expected in str(caught.value)


def test_a_folder_without_hubconf(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(f"hub:{tmp_path}:tiny")
    assert str(caught.value) == (
        f"hub:{tmp_path}:tiny: no such folder with a hubconf.py: {tmp_path}"
    )


def test_an_unknown_entry() -> None:
    with pytest.raises(ModelError) as caught:
        load(f"hub:{HUB}:dinov2_vitx14", overrides=ALL)
    assert re.fullmatch(
        rf"hub:{HUB}:dinov2_vitx14: dinov2_vitx14\(\) of {HUB} cannot be run \(RuntimeError: "
        r"Cannot find callable dinov2_vitx14 in hubconf\); check the names and the connection, or "
        r"give --weights FILE",
        str(caught.value),
    )


def test_an_entry_that_fails_or_returns_something_else() -> None:
    with pytest.raises(ModelError) as caught:
        load(f"hub:{HUB}:failing", overrides=ALL)
    assert "(ValueError: this entry is broken)" in str(caught.value)
    with pytest.raises(ModelError) as caught:
        load(f"hub:{HUB}:not_a_model", overrides=ALL)
    assert str(caught.value) == (
        f"hub:{HUB}:not_a_model: not_a_model() returned a list; expected an nn.Module, or a pair "
        "of it and a dict with input_size, mean, std, interpolation, crop_pct, crop_mode"
    )


def test_weights_of_another_model(tmp_path: Path) -> None:
    torch.save({"foreign": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"do not fit DinoVisionTransformer: \d+ missing"):
        load(f"hub:{HUB}:tiny", weights=tmp_path / "w.pth", overrides=ALL)


def test_an_image_size_that_patches_do_not_fill(checkpoint: Path) -> None:
    overrides = PreprocessingOverrides(**{**vars(ALL), "image_size": (60, 56)})
    with pytest.raises(ModelError, match=r"the image size \(60, 56\) is no multiple of the patch"):
        load(f"hub:{HUB}:tiny", weights=checkpoint, overrides=overrides)


def test_no_connection() -> None:
    with pytest.raises(ModelError) as caught:
        load("hub:somebody/something:model", overrides=ALL)
    assert re.fullmatch(
        r"hub:somebody/something:model: model\(\) of somebody/something cannot be run "
        r"\(RuntimeError: It looks like there is no internet connection .+\); check the names and "
        r"the connection, or clone the repository and give its folder, or give --weights FILE",
        str(caught.value),
    )


@pytest.fixture
def question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can answer: stdin is empty."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


@pytest.mark.usefixtures("question")
def test_a_repository_that_is_not_trusted_is_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(torch.hub, "_load_local", lambda *_, **__: ran.append("code"))
    with pytest.raises(ModelError) as caught:
        load("hub:somebody/something:main:model", overrides=ALL)
    assert str(caught.value) == (
        "hub:somebody/something:main:model: somebody/something:main is not among the repositories "
        "that torch.hub trusts, and its code would be run; if you trust it, give --trust-repo"
    )
    assert ran == []
    out, err = capsys.readouterr()
    assert out == ""
    assert "Do you trust this repository" in err


@pytest.mark.usefixtures("question")
def test_trust_is_handed_to_torch_hub(hub_home: Path) -> None:
    with pytest.raises(ModelError, match="no network in tests"):
        load("hub:somebody/something:main:model", overrides=ALL, trust_repo=True)
    assert (hub_home / "trusted_list").read_text() == "somebody_something\n"


def test_what_was_downloaded_before_is_run(
    hub_home: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("nothing is to be asked"))
    cached = hub_home / "somebody_something_main"
    cached.mkdir(parents=True)
    for file in HUB.glob("*.py"):
        (cached / file.name).write_text(file.read_text())
    loaded = load("hub:somebody/something:main:tiny", weights=checkpoint, overrides=ALL)
    assert loaded.architecture == "DinoVisionTransformer"


def test_trust_is_for_hub_alone() -> None:
    with pytest.raises(ModelError) as caught:
        load("timm:test_vit", trust_repo=True)
    assert str(caught.value) == (
        "timm:test_vit: --trust-repo is for models of hub:REPO:ENTRY alone"
    )


def test_answers_for_machines_stay_alone_on_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hubconf.py").write_text("print('hello')\ndef entry():\n    return 1\n")
    with pytest.raises(ModelError):
        load(f"hub:{tmp_path}:entry", overrides=ALL)
    assert capsys.readouterr() == ("", "hello\n")
