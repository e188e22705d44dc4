"""Virtual environments for packages that may not meet those of development, made once and kept."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

WORKSPACE = Path(__file__).resolve().parents[2]
ROOT = WORKSPACE / ".rig"
# What regraft's runtime needs; its source comes by PYTHONPATH.
RUNTIME = ("numpy==2.4.6", "pillow==13.0.0", "onnxruntime==1.32.0", "pyarrow==26.0.1")


def environment(name: str, requirements: Sequence[str], python: str = sys.executable) -> Path:
    """The Python of an environment with exactly these packages and what they need.

    Made on the first call, in ``.rig/`` of the workspace; the test is skipped where the packages
    cannot be had (a failure where REGRAFT_NO_SKIP=1).
    """
    digest = hashlib.sha256("\0".join([python, sys.version, *requirements]).encode()).hexdigest()
    place = ROOT / f"{name}-{digest[:12]}"
    executable = place / "bin" / "python"
    ROOT.mkdir(exist_ok=True)
    with (ROOT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "complete").exists():
            shutil.rmtree(place, ignore_errors=True)
            for command in (
                [python, "-m", "venv", str(place)],
                [str(executable), "-m", "pip", "install", "--quiet", *requirements],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    last = (done.stderr.strip() or "no reason given").splitlines()[-1]
                    pytest.skip(f"the environment {name} cannot be made: {last}")
            (place / "complete").touch()
    return executable


def variables(**more: str) -> dict[str, str]:
    """Environment variables of a process there that is to see regraft's runtime."""
    source = str(WORKSPACE / "runtime" / "src")
    return {**os.environ, "PYTHONPATH": source, **more}
