"""Where the rig cannot be set up it says why; once it is set up it is kept."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tensorrt_rig import rig


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace without a rig."""
    monkeypatch.setattr(rig, "ROOT", tmp_path / ".rig")
    return tmp_path / ".rig"


def test_without_gcc(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(rig.NoRigError, match=r"^gcc is not installed; "):
        rig.set_up()


def test_on_another_processor(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(rig.NoRigError, match=r"^the wheels are for Linux on x86-64$"):
        rig.set_up()


def test_without_the_wheels(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        rig.NoRigError, match=r"^the wheel tensorrt-cu13-bindings [\d.]+ cannot be had: "
    ):
        rig.set_up()
    assert [path.name for path in bare.iterdir()] == ["lock"]


def test_it_is_kept(compiler: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = rig.set_up()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("set up again")

    monkeypatch.setattr(subprocess, "run", never)
    assert rig.set_up() == folder
