"""Ctrl-C and a full disk, in every command that writes: nothing half-written stays behind."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regraft.cli.main import main
from regraft_export.demo import sample_images_folder

MODEL = "python:regraft_export.demo:shipped_vit"
REGRAFT = [sys.executable, "-m", "regraft"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with neurons.json and a bundle of the shipped ViT."""
    folder = tmp_path_factory.mktemp("made")
    images = str(sample_images_folder())
    neurons, bundle = str(folder / "neurons.json"), str(folder / "bundle")
    assert main(["find", MODEL, "--images", images, "--out", neurons]) == 0
    export = ["export", MODEL, "--neurons", neurons, "--images", images, "--out", bundle]
    assert main(export) == 0
    return folder


def words(name: str, made: Path, out: Path) -> list[str]:
    images, bundle = str(sample_images_folder()), str(made / "bundle")
    return {
        "find": ["find", MODEL, "--images", images, "--out", str(out / "n.json")],
        "export": [
            *["export", MODEL, "--neurons", str(made / "neurons.json")],
            *["--images", images, "--out", str(out / "bundle")],
        ],
        "verify": ["verify", bundle, "--images", *[images] * 20],
        "extract": ["extract", bundle, *[images] * 200, "--out", str(out / "f.npz")],
        "report": [
            *["report", bundle, "--images", *[images] * 10],
            *["--max-images", "640", "--out", str(out / "r.html")],
        ],
        "bench": ["bench", bundle, "--seconds", "60"],
        "demo": ["demo", "--out", str(out / "demo")],
    }[name]


@pytest.mark.parametrize("delay", [0.5, 3.0])
@pytest.mark.parametrize("name", ["find", "export", "verify", "extract", "report", "bench", "demo"])
def test_ctrl_c_leaves_nothing_behind(name: str, delay: float, made: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*REGRAFT, *words(name, made, tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    time.sleep(delay)
    assert process.poll() is None, f"{name} was done in {delay} s, before Ctrl-C"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:  # it had just finished
        return
    # Python itself answers while it is still starting up, and then dies by the signal.
    assert process.returncode in (130, -signal.SIGINT), err
    assert "Traceback" not in err or process.returncode == -signal.SIGINT, err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["find", "export", "extract", "report"])
def test_a_full_disk_is_one_message_and_leaves_nothing_behind(
    name: str, made: Path, tmp_path: Path
) -> None:
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    done = subprocess.run(
        [*REGRAFT, *words(name, made, tmp_path)],
        capture_output=True,
        text=True,
        preexec_fn=small_disk,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("regraft: ")]
    assert lines, done.stderr
    assert "cannot be written (File too large)" in lines[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
