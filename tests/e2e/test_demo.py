"""`regraft demo`: the whole path, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from regraft.cli.main import main
from regraft_export.commands.demo import STEPS


def test_demo_leaves_a_verified_bundle_features_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for step in STEPS:
        assert f"$ regraft {step}" in printed
    verify = json.loads((out / "bundle" / "verify.json").read_text())
    assert verify["passed"]
    assert verify["images"] == 32
    effect = verify["effect"]
    assert effect["before"]["outliers"] > 32
    assert effect["removed"] >= 0.95
    assert effect["after"]["largest"] < 2 * effect["after"]["median"]
    assert np.load(out / "features.npz")["patches"].shape[0] == 64
    assert (out / "report.html").stat().st_size > 50_000
    assert not [p for p in tmp_path.iterdir() if p != out]


def test_demo_does_not_overwrite_without_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "report.html").write_text("mine")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "exists already; give --force" in capsys.readouterr().err
    assert (tmp_path / "demo" / "report.html").read_text() == "mine"


def test_a_failing_step_stops_the_demo_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("regraft_export.commands.demo.STEPS", ("inspect bundle",))
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "the demo stopped at `regraft inspect bundle`" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
