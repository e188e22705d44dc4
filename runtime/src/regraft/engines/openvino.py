"""OpenVINO on the CPU: fast where the processor has AVX512_BF16 or AMX, in bf16 if asked to.

It compiles the bundle's portable graph once (`regraft build`) and runs the compiled blob. The batch
stays free: compiled for a fixed batch, a CLIP ViT of 16 million parameters at 224 pixels was no
faster, only the small ViT that ships along was (by a quarter at batch 1).

OpenVINO computes in bf16 by itself where the processor can. Here fp32 is what a float32 bundle
gets, and bf16 only what asks for it and passes bf16's parity gate.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.engines.base import Engine
from regraft.engines.cores import usable_cores
from regraft.engines.options import BuildOptions, BuildProgress, EngineOptions, Shape
from regraft.errors import EngineError, how_to_install
from regraft.manifest import INPUT

BLOB = "model.blob"
_DEVICE = "CPU"


class OpenVinoEngine(Engine):
    """Runs a graph with OpenVINO's CPU plugin."""

    name = "openvino"
    is_built = True
    _request: Any = None
    _model: Any = None
    _threads: int

    @classmethod
    def unavailable(cls, precision: str) -> str | None:
        """Why it cannot run here: no openvino, or bf16 on a processor without it."""
        try:
            core = _core()
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError)
            reason = "is not installed" if missing else f"cannot be imported ({error})"
            return f"openvino {reason}; {how_to_install('regraft-runtime', 'openvino')}"
        capabilities = _capabilities(core)
        if precision == "bf16" and "BF16" not in capabilities:
            return (
                "this processor has no bf16 arithmetic (AVX512_BF16 or AMX), it has "
                f"{', '.join(capabilities)}; use --precision fp32, of a bundle exported in it"
            )
        return None

    @classmethod
    def arithmetic(cls, precision: str, asked: str | None) -> str:
        """The bundle's; a float32 bundle may be computed in bf16."""
        if (precision, asked) == ("fp32", "bf16"):
            return "bf16"
        return super().arithmetic(precision, asked)

    @classmethod
    def environment(cls) -> tuple[str, str]:
        """OpenVINO's version; the processor and what it can compute in."""
        core = _core()
        processor = core.get_property(_DEVICE, "FULL_DEVICE_NAME")
        return str(_openvino().get_version()), f"{processor} ({', '.join(_capabilities(core))})"

    @classmethod
    def build(
        cls,
        graph: Path,
        precision: str,
        options: BuildOptions,
        folder: Path,
        progress: BuildProgress,
    ) -> dict[str, Any]:
        """Compiles the graph and writes the blob; see :meth:`Engine.build`."""
        progress(f"compiling {graph.name}", 0, 1)
        with cls._failures(f"cannot compile {graph.name}"):
            core = _core()
            compiled = core.compile_model(core.read_model(graph), _DEVICE, _config(precision))
            blob = compiled.export_model().getvalue()
            kinds = _layer_precisions(compiled)
        (folder / BLOB).write_bytes(blob)
        progress(f"compiling {graph.name}", 1, 1)
        version, device = cls.environment()
        return {
            "graph": graph.name,
            "precision": precision,
            "version": version,
            "device": device,
            "bytes": len(blob),
            "layers": kinds,
        }

    def _open(
        self, graph: Path, options: EngineOptions
    ) -> tuple[tuple[int, int], dict[str, Shape]]:
        if self.built is None:
            raise EngineError(f"{self.name}: {graph.name} is opened without what was built of it")
        self._threads = options.threads or usable_cores()
        try:
            blob = io.BytesIO((self.built / BLOB).read_bytes())
        except OSError as error:
            raise EngineError(
                f"{self.built / BLOB}: cannot be read ({error.strerror}); build again"
            ) from None
        self._model = _core().import_model(blob, _DEVICE, _config(self.precision, self._threads))
        self._request = self._model.create_infer_request()
        inputs = {name: port.partial_shape for port in self._model.inputs for name in port.names}
        shape = inputs.get(INPUT)
        if len(self._model.inputs) != 1 or shape is None or len(shape) != 4:
            raise EngineError(
                f"{self.name}: {graph.name} takes {', '.join(inputs)}; expected one input {INPUT} "
                "of shape (batch, 3, H, W)"
            )
        outputs = {port.get_any_name(): _shape(port) for port in self._model.outputs}
        return (shape[2].get_length(), shape[3].get_length()), outputs

    def _run(
        self, pixels: NDArray[np.float32], outputs: Sequence[str]
    ) -> Sequence[NDArray[np.float32]]:
        self._request.set_tensor(INPUT, _openvino().Tensor(pixels, shared_memory=True))
        self._request.infer()
        # Copies: the next run writes into the same memory.
        return [np.array(self._request.get_tensor(name).data, np.float32) for name in outputs]

    def details(self) -> dict[str, str]:
        """Version of OpenVINO, threads inside one run, and precision of the arithmetic."""
        version, device = self.environment()
        return {
            "openvino": version,
            "device": device,
            "threads": str(self._threads),
            "precision": self.precision,
        }

    def _close(self) -> None:
        self._request = self._model = None

    @classmethod
    def _reason(cls, error: Exception) -> str:
        # "Exception from FILE:LINE:" comes first, and again for every layer that passed it on.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        telling = [line for line in lines if not line.startswith("Exception from ")]
        return telling[-1] if telling else super()._reason(error)


def _openvino() -> Any:
    """The library, imported without the package by which it reports every import to its maker."""
    reports = "openvino_telemetry"
    if "openvino" not in sys.modules and reports not in sys.modules:
        sys.modules[reports] = None  # type: ignore[assignment] # refuses its import, for a while
        try:
            import openvino
        finally:
            del sys.modules[reports]
    import openvino

    return openvino


def _core() -> Any:
    return _openvino().Core()


def _capabilities(core: Any) -> list[str]:
    return sorted(str(c) for c in core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"))


def _config(precision: str, threads: int | None = None) -> dict[str, Any]:
    """Everything that is not left to OpenVINO's own choice.

    fp16 bundles are computed in float32 from float16 weights, which every processor can.
    """
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "EXECUTION_MODE_HINT": "PERFORMANCE",  # ACCURACY would overrule the precision
        "PERFORMANCE_HINT": "LATENCY",  # one stream: runs are serialised anyway
        # Pinned threads wait for their core while others use it; containers share cores.
        "ENABLE_CPU_PINNING": False,
    }
    return config if threads is None else {**config, "INFERENCE_NUM_THREADS": threads}


def _layer_precisions(compiled: Any) -> dict[str, int]:
    """Runtime precision -> how many executed layers have it: what was really compiled."""
    counts: dict[str, int] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind = info["layerType"].astype(str) if "layerType" in info else ""
        if kind in ("FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttention"):
            precision = info["runtimePrecision"].astype(str)
            counts[precision] = counts.get(precision, 0) + 1
    return counts


def _shape(port: Any) -> Shape:
    return tuple(d.get_length() if d.is_static else "batch" for d in port.partial_shape)
