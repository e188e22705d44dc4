"""A `tensorrt` whose parser and builder work on a machine without a card, for tests alone.

Its Python bindings are the real ones (`tensorrt-cu13-bindings`). The libraries that they want are
in no package registry, but those of TensorRT for RTX are (`onnxruntime-ep-nv-tensorrt-rtx-cu13`),
with the same API and a builder that compiles ahead of time. Three small C libraries stand in for
TensorRT's and forward the nine entry points that the bindings use. Nothing that it compiles is
executed, nor is the RTX library's choice of cards touched.

The rig lies in `.rig/` of the workspace, never in an environment, and enters subprocesses only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1] / ".rig"
BINDINGS = ("tensorrt-cu13-bindings", "11.4.0.106")
LIBRARIES = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "0.5.0")
# Of the second wheel's 300 MB, as their names in it and in the rig.
TAKEN = {
    "onnxruntime_ep_nv_tensorrt_rtx/libtensorrt_rtx.so.1.7.1": "libtensorrt_rtx.so.1",
    "onnxruntime_ep_nv_tensorrt_rtx/libtensorrt_onnxparser_rtx.so.1.7.1": (
        "libtensorrt_onnxparser_rtx.so.1"
    ),
}
STAND_INS = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# What the package `tensorrt` itself does, in short.
PACKAGE = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"


class NoRigError(Exception):
    """The rig cannot be set up here; the message says why."""


def set_up() -> Path:
    """The folder to put on PYTHONPATH; made on the first call and kept.

    Raises:
        NoRigError: gcc, the platform or the wheels are missing.
    """
    folder = ROOT / _digest()
    if (folder / "tensorrt").is_dir():
        return folder
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NoRigError("the wheels are for Linux on x86-64")
    if shutil.which("gcc") is None:
        raise NoRigError("gcc is not installed; the rig compiles three small C files")
    ROOT.mkdir(exist_ok=True)
    with (ROOT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "tensorrt").is_dir():
            with tempfile.TemporaryDirectory(dir=ROOT) as scratch:
                _make(Path(scratch))
                (Path(scratch) / "site").rename(folder)
    return folder


def _digest() -> str:
    sources = sorted([*HERE.glob("*.c"), *HERE.glob("*.h"), HERE / "rig.py"])
    tag = f"{BINDINGS}{LIBRARIES}{sys.version_info[:2]}".encode()
    return hashlib.sha256(tag + b"".join(s.read_bytes() for s in sources)).hexdigest()[:16]


def _make(scratch: Path) -> None:
    site = scratch / "site"
    bindings = site / "tensorrt_bindings"
    with zipfile.ZipFile(_download(scratch, *BINDINGS)) as wheel:
        wheel.extractall(site)
    with zipfile.ZipFile(_download(scratch, *LIBRARIES)) as wheel:
        for name, to in TAKEN.items():
            with wheel.open(name) as source, (bindings / to).open("wb") as target:
                shutil.copyfileobj(source, target)
    for name in STAND_INS:
        library = f"lib{name}.so.11"
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
        command += [f"-Wl,-soname,{library}", "-o", str(bindings / library)]
        done = subprocess.run(
            [*command, str(HERE / f"{name}.c"), "-ldl"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NoRigError(f"gcc cannot compile {name}.c: {done.stderr.strip()}")
    (site / "tensorrt").mkdir()
    (site / "tensorrt" / "__init__.py").write_text(PACKAGE)


def _download(scratch: Path, name: str, version: str) -> Path:
    place = scratch / name
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(place), f"{name}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise NoRigError(f"the wheel {name} {version} cannot be had: {last}")
    return next(place.glob("*.whl"))


def environment(folder: Path) -> dict[str, str]:
    """The environment of a subprocess that is to see the rig's `tensorrt`."""
    more = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *([more] if more else [])])}
