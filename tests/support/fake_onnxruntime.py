"""An ``onnxruntime`` with a CUDA provider whose card is ordinary memory.

Graphs are computed by the real CPU provider; the fake keeps the rules that the CUDA provider has:
addresses lie in the card's memory, and a CUDA graph, which belongs to a thread and a number, is
replayed with the addresses and shapes of its recording. A recording disturbs other threads and is
disturbed by them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as real
from tests.support.fake_tensorrt import Cudart

CUDA = "CUDAExecutionProvider"


class Binding:
    """An ``IOBinding`` by addresses."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[tuple[int, ...], int]] = {}
        self.outputs: dict[str, tuple[tuple[int, ...], int]] = {}

    def bind_input(
        self, name: str, device: str, number: int, kind: Any, shape: list[int], address: int
    ) -> None:
        assert (device, number, kind) == ("cuda", 0, np.float32)
        self.inputs[name] = (tuple(shape), address)

    def bind_output(
        self, name: str, device: str, number: int, kind: Any, shape: list[int], address: int
    ) -> None:
        assert (device, number, kind) == ("cuda", 0, np.float32)
        self.outputs[name] = (tuple(shape), address)


class Settings(real.SessionOptions):  # type: ignore[misc]
    """``SessionOptions`` that remember which libraries of operators they were given."""

    libraries: tuple[str, ...] = ()

    def register_custom_ops_library(self, path: str) -> None:
        if not Path(path).read_bytes():
            raise RuntimeError(f"Failed to load library {path}")
        self.libraries = (*self.libraries, path)


class Session:
    """An ``InferenceSession`` on the fake card."""

    def __init__(self, module: Module, path: str, settings: Any, provider: dict[str, str]) -> None:
        self._module, self._cudart = module, module.cudart
        self.provider, self.settings = provider, settings
        assert settings.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        self._stream = int(provider["user_compute_stream"])
        if module.refusal:
            raise RuntimeError(module.refusal)
        self._session = real.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.recorded: dict[tuple[int, int], Any] = {}
        self.runs: list[tuple[int, int]] = []

    def get_providers(self) -> list[str]:
        return [CUDA] if self._module.libraries else ["CPUExecutionProvider"]

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def get_modelmeta(self) -> Any:
        return self._session.get_modelmeta()

    def io_binding(self) -> Binding:
        return Binding()

    def _record(self) -> None:
        if self._module.full_at and len(self.recorded) >= self._module.full_at:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 99")
        if self._cudart.recorder is not None:
            self._cudart.forbidden.append("a recording")
        self._cudart.recorder = threading.get_ident()
        time.sleep(self._module.recording_takes)
        self._cudart.recorder = None

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        if self._module.failure:
            raise RuntimeError(self._module.failure)
        number = int(options.get_run_config_entry("gpu_graph_id"))
        key = (threading.get_ident(), number)
        self.runs.append(key)
        if number >= 0:
            assert self.provider["enable_cuda_graph"] == "1"
            places = (dict(binding.inputs), dict(binding.outputs))
            if key not in self.recorded:
                self._record()
            assert self.recorded.setdefault(key, places) == places

        def work() -> None:
            fed = {
                name: self._cudart.floats(address, shape)
                for name, (shape, address) in binding.inputs.items()
            }
            names = list(binding.outputs)
            for name, value in zip(names, self._session.run(names, fed), strict=True):
                shape, address = binding.outputs[name]
                assert value.shape == shape
                self._cudart.floats(address, shape)[...] = value

        self._cudart.submit(self._stream, work)


class Module(ModuleType):
    """The module ``onnxruntime``.

    Attributes:
        cudart: the card.
        libraries: whether CUDA's libraries can be loaded.
        providers: what this build has.
        refusal: what opening a session fails with.
        failure: what a run fails with.
        full_at: after how many recordings of a session it finds no memory; 0 for never.
        recording_takes: seconds.
        sessions: those opened on the card.
    """

    def __init__(self, cudart: Cudart) -> None:
        super().__init__("onnxruntime")
        self.__dict__.update({k: v for k, v in vars(real).items() if not k.startswith("__")})
        self.__version__, self.__path__ = "1.31.1", real.__path__
        self.cudart, self.libraries = cudart, True
        self.available = [CUDA, "CPUExecutionProvider"]
        self.refusal = self.failure = ""
        self.full_at, self.recording_takes = 0, 0.0
        self.sessions: list[Session] = []
        self.InferenceSession, self.SessionOptions = self._open, Settings
        self.get_available_providers = lambda: self.available
        self.preload_dlls = self._preload

    def _preload(self) -> None:
        if not self.libraries:
            print("Failed to load libcublasLt.so.13: cannot open shared object file")

    def _open(
        self,
        path: str,
        settings: Any,
        providers: list[Any],
        disabled_optimizers: Sequence[str] = (),
        enable_fallback: int = 1,
        **more: Any,
    ) -> Any:
        if not isinstance(providers[0], tuple):
            return real.InferenceSession(path, settings, providers=providers, **more)
        assert not more
        assert enable_fallback == 0
        assert [name for name, _ in providers] == [CUDA]
        session = Session(self, path, settings, providers[0][1])
        self.sessions.append(session)
        return session
