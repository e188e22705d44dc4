"""The rig, a process that sees it, and graphs as bundles hold them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import shared, traces
from tests.tensorrt_rig import rig

from regraft.neurons import Neurons, RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft_export.demo import shipped_vit
from regraft_export.graph.patch import Patch, Traced, Wanted, build
from regraft_export.trace import trace
from regraft_export.vit.structure import from_module
from regraft_export.weights_file import WeightsFile

WORKER = Path(__file__).with_name("worker.py")


class Worker:
    """Sends tasks to ``worker.py``; a process that dies fails the test, and the next is new."""

    def __init__(self, folder: Path) -> None:
        self._environment = rig.environment(folder)
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, task: str, **arguments: Any) -> dict[str, Any]:
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            self._process = None
            self._errors.seek(0)
            pytest.fail(f"{task}: the process ended with {code}: {self._errors.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> None:
        reading, writing = os.pipe()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=self._environment,
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        self._answers = os.fdopen(reading)

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def compiler() -> Iterator[Worker]:
    """``compiler("build", graph=..., max_batch=4)``: the real builder, over the rig."""
    try:
        folder = rig.set_up()
    except rig.NoRigError as reason:
        pytest.skip(f"no rig to compile with: {reason}")
    worker = Worker(folder)
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Traced]:
    """``traced(family, precision="fp32")``; the family ``shipped`` is the ViT that ships along."""

    def get(family: str, precision: str = "fp32") -> Traced:
        if family != "shipped":
            return traces.traced(tmp_path_factory, family, precision)

        def make(_: Path) -> Traced:
            module, config = shipped_vit()
            size = (config["input_size"][1], config["input_size"][2])
            return trace(from_module(module, size), size, precision)

        result: Traced = shared.once(tmp_path_factory, f"trace-shipped-{precision}", make)
        return result

    return get


@pytest.fixture
def graph(traced: Callable[..., Traced], tmp_path: Path) -> Callable[..., Path]:
    """``graph(family, redirect, precision)``: an ONNX file as in a bundle; redirect None: baseline.

    With every kind of output that the family has.
    """

    def write(
        family: str = "shipped",
        redirect: RedirectOptions | None = RedirectOptions(),  # noqa: B008 - frozen
        precision: str = "fp32",
    ) -> Path:
        found = traced(family, precision)
        middle = found.layout.depth // 2
        neurons = (
            RegisterNeuron(layer, index, 1.0, sign, 2.0 * sign)
            for layer in (0, middle)
            for index, sign in ((1, 1), (5, -1), (7, 1))
        )
        patch = None if redirect is None else Patch(Neurons(tuple(neurons)), redirect)
        attentions = (middle,) if found.layout.class_token else ()
        built = build(found, patch, Wanted(layers=(0, middle), attentions=attentions))
        with WeightsFile(tmp_path) as weights:
            weights.save(built.proto, "model.onnx")
        return tmp_path / "model.onnx"

    return write
