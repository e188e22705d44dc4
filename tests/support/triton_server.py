"""A real Triton server: the one inside the nvidia-pytriton wheel.

It has the Python backend alone, so the network itself is stood in for by a Python model of the same
configuration that runs onnxruntime; preprocessing and ensemble are as `regraft triton` writes them.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support import environments

from regraft.cli.main import main

# Debian's Python: the backend is linked against its libpython.
PYTHON = "/usr/bin/python3"
PACKAGES = (
    "nvidia-pytriton==0.7.0",
    "tritonclient[http,grpc]==2.73.0",
    "numpy<2",
    "pillow==13.0.0",
    "onnxruntime",
)
STAND_IN = """
import numpy as np
import onnxruntime
import triton_python_backend_utils as backend
from pathlib import Path


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"], args["model_version"])
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        self.names = [output.name for output in self.session.get_outputs()]

    def execute(self, requests):
        answers = []
        for request in requests:
            pixels = backend.get_input_tensor_by_name(request, "pixel_values").as_numpy()
            arrays = self.session.run(self.names, {"pixel_values": pixels})
            tensors = [backend.Tensor(n, a) for n, a in zip(self.names, arrays)]
            answers.append(backend.InferenceResponse(tensors))
        return answers
"""


@dataclass(frozen=True)
class Triton:
    """Where a running server listens."""

    http: int
    grpc: int


def environment() -> Path:
    """The Python of the environment that has server and client."""
    if not Path(PYTHON).exists():
        pytest.skip(f"{PYTHON} is not installed: apt-get install python3-venv libpython3-dev")
    python = environments.environment("triton", PACKAGES, PYTHON)
    # The backend's Python looks at its site-packages, not at PYTHONPATH.
    (site,) = (python.parents[1] / "lib").glob("python3*/site-packages")
    (site / "regraft.pth").write_text(str(environments.WORKSPACE / "runtime" / "src") + "\n")
    return python


def write_repository(bundle: Path, out: Path, name: str = "vit") -> Path:
    """What `regraft triton` writes, with the stand-in."""
    assert main(["triton", str(bundle), "--out", str(out), "--name", name]) == 0
    config = out / name / "config.pbtxt"
    text = config.read_text()
    assert text.count('backend: "onnxruntime"') == 1
    config.write_text(text.replace('backend: "onnxruntime"', 'backend: "python"'))
    (out / name / "1" / "model.py").write_text(STAND_IN)
    return out


@contextmanager
def running(python: Path, repository: Path, place: Path) -> Iterator[Triton]:
    """A server of a repository, ready; ``place`` is a folder for it."""
    wheel = next((python.parents[1] / "lib").glob("python3*/site-packages/pytriton/tritonserver"))
    version = wheel.parents[2].name.removeprefix("python")
    shutil.copytree(wheel / "backends", place / "backends")
    stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, place / "backends" / "python")
    log = (place / "log").open("w+")
    http, grpc, metrics = _free_ports(3)
    process = subprocess.Popen(
        [
            *(str(wheel / "bin" / "tritonserver"), f"--model-repository={repository}"),
            *(f"--backend-directory={place / 'backends'}", f"--http-port={http}"),
            *(f"--grpc-port={grpc}", f"--metrics-port={metrics}"),
            *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1"),
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environments.variables(
            PATH=f"{python.parent}:{os.environ['PATH']}",
            LD_LIBRARY_PATH=str(wheel.parents[1] / "nvidia_pytriton.libs"),
        ),
    )

    def said() -> str:
        log.seek(0)
        return log.read()[-12000:]

    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/health/ready", timeout=5)
                break
            except OSError:
                assert process.poll() is None, said()
                assert time.monotonic() < until, said()
                time.sleep(0.3)
        yield Triton(http, grpc)
    finally:
        process.terminate()
        process.wait(timeout=60)
        log.close()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        made = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in made]
