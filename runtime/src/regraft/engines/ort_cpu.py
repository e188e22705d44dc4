"""ONNX Runtime on the CPU: float32, everywhere, the reference the other engines are held to."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.engines.base import Engine
from regraft.engines.cores import usable_cores
from regraft.engines.options import EngineOptions, Shape
from regraft.engines.parts import Part, cut, needed, parts_of, shapes_of
from regraft.errors import EngineError, how_to_install
from regraft.manifest import INPUT

_log = logging.getLogger("regraft")


class OrtCpuEngine(Engine):
    """Runs a graph with onnxruntime's CPUExecutionProvider."""

    name = "ort-cpu"
    preferred_batch = 8  # measured: benchmarks/results/serve.md
    _session: Any = None
    _parts: Mapping[str, Part]
    _threads: int

    @classmethod
    def unavailable(cls, precision: str) -> str | None:
        """Why it cannot run here: bf16, or no onnxruntime."""
        if precision == "bf16":
            return (
                "cannot run bf16, which ONNX Runtime's CPU provider does not implement; "
                "use openvino or tensorrt, or export with --precision fp32"
            )
        try:
            import onnxruntime  # noqa: F401 - asked for here, used in _open
        except ImportError as error:
            # A broken installation fails with an ImportError too, and then says more.
            missing = isinstance(error, ModuleNotFoundError)
            reason = "is not installed" if missing else f"cannot be imported ({error})"
            return f"onnxruntime {reason}; {how_to_install('regraft-runtime', 'cpu')}"
        return None

    def _open(
        self, graph: Path, options: EngineOptions
    ) -> tuple[tuple[int, int], dict[str, Shape]]:
        import onnxruntime as ort

        ort.disable_telemetry_events()  # nobody asked for any
        if self.precision == "fp16" and options.optimize:  # else a gate's graph: not to be fast
            _log.warning(
                "ort-cpu: the bundle is fp16, which a CPU computes by converting to and fro, "
                "slower than fp32; export with --precision fp32 for CPUs"
            )
        session_options = ort.SessionOptions()
        session_options.log_severity_level = 3  # errors; its warnings are about its own optimiser
        self._threads = options.threads or usable_cores()
        session_options.intra_op_num_threads = self._threads
        session_options.add_session_config_entry(
            "session.intra_op.allow_spinning", "1" if options.spinning else "0"
        )
        level = ort.GraphOptimizationLevel
        session_options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if options.optimize else level.ORT_DISABLE_ALL
        )
        self._session = ort.InferenceSession(
            str(graph),
            session_options,
            providers=["CPUExecutionProvider"],
            # It crashes the process on some fp16 graphs (OpenCLIP's, onnxruntime 1.32), and has one
            # convolution to gain from.
            disabled_optimizers=["NchwcTransformer"] if self.precision == "fp16" else None,
        )
        pixels = next((i for i in self._session.get_inputs() if i.name == INPUT), None)
        if pixels is None or len(pixels.shape) != 4:
            names = ", ".join(i.name for i in self._session.get_inputs())
            raise EngineError(
                f"{self.name}: {graph.name} takes {names}; expected one input {INPUT} "
                "of shape (batch, 3, H, W)"
            )
        outputs: dict[str, Shape] = {o.name: tuple(o.shape) for o in self._session.get_outputs()}
        self._parts = parts_of(self._session.get_modelmeta().custom_metadata_map, outputs)
        return (int(pixels.shape[2]), int(pixels.shape[3])), shapes_of(outputs, self._parts)

    def _run(
        self, pixels: NDArray[np.float32], outputs: Sequence[str]
    ) -> Sequence[NDArray[np.float32]]:
        names = needed(outputs, self._parts)
        arrays: list[NDArray[np.float32]] = self._session.run(names, {INPUT: pixels})
        values = dict(zip(names, arrays, strict=True))
        return [cut(name, values, self._parts) for name in outputs]

    def details(self) -> dict[str, str]:
        """Version of onnxruntime, and threads inside one run."""
        import onnxruntime as ort

        return {"onnxruntime": str(ort.__version__), "threads": str(self._threads)}

    def _close(self) -> None:
        self._session = None

    @classmethod
    def _foreign_errors(cls) -> tuple[type[Exception], ...]:
        return ort_errors()


def ort_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises; its exceptions have no common base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (kind for kind in vars(state).values() if isinstance(kind, type))
    own = tuple(kind for kind in kinds if issubclass(kind, Exception))
    return (*own, RuntimeError)
