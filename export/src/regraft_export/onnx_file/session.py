"""Parts of one ONNX file, run by ONNX Runtime on the CPU.

The large tensors are read once and shared by all parts, whatever their number: ONNX Runtime is
handed them instead of reading them, and told not to pack copies of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from regraft.engines.cores import usable_cores
from regraft.engines.ort_cpu import OrtCpuEngine, ort_errors
from regraft.errors import ModelError
from regraft_export.onnx_file.read import OnnxFile


class Weights:
    """The large tensors of a file, each read when it is first asked for.

    Args:
        file: the file.
        wide: whether bfloat16 becomes float32, as in the file's twin.
    """

    def __init__(self, file: OnnxFile, *, wide: bool) -> None:
        self._stored, self._wide = file.stored, wide
        self._tensors = {t.name: t for t in file.skeleton.graph.initializer}
        self._values: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def value(self, name: str) -> Any:
        """One of them, as ONNX Runtime takes it."""
        import onnxruntime as ort

        if name not in self._values:
            values = self._stored[name].array(self._tensors[name])
            if self._wide and self._tensors[name].data_type == TensorProto.BFLOAT16:
                values = values.astype(np.float32)
            self._values[name] = ort.OrtValue.ortvalue_from_numpy(values)
        return self._values[name]


class Session:
    """One part of a file.

    Attributes:
        inputs: {name: numpy type} of what it takes.
    """

    def __init__(self, model: onnx.ModelProto, weights: Weights, path: object) -> None:
        """Loads it.

        Args:
            model: its initializers that ``weights`` has are without values.
            weights: of the file.
            path: the file's, for messages.

        Raises:
            ModelError: ONNX Runtime is not installed, or cannot load it.
        """
        reason = OrtCpuEngine.unavailable("fp32")
        if reason is not None:
            raise ModelError(f"{path}: runs by ONNX Runtime, and {reason}")
        import onnxruntime as ort

        self._path = path
        ort.disable_telemetry_events()  # nobody asked for any
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = usable_cores()
        # A session would keep its largest activations, and a packed copy of every weight.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.disable_prepacking", "1")
        names = [t.name for t in model.graph.initializer if t.name in weights]
        values = [weights.value(name) for name in names]
        # The optimiser reads the first, of which it makes copies, and running reads the second,
        # which are shared; with one of them alone every session kept a copy, or none could load.
        options.add_external_initializers(names, values)
        for name, value in zip(names, values, strict=True):
            options.add_initializer(name, value)
        half = any(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer)
        try:
            self._session = ort.InferenceSession(
                _outside(model, weights).SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                # As in engines/ort_cpu.py: it crashes on some fp16 graphs.
                disabled_optimizers=["NchwcTransformer"] if half else None,
            )
        except ort_errors() as error:
            raise ModelError(f"{path}: ONNX Runtime cannot load it: {_line(error)}") from None
        kinds = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
        self.inputs: dict[str, np.dtype[Any]] = {
            i.name: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kinds[i.name]))
            for i in self._session.get_inputs()
        }

    def run(self, outputs: Sequence[str], given: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Computes outputs.

        Raises:
            ModelError: ONNX Runtime fails.
        """
        fed = {name: given[name].astype(kind, copy=False) for name, kind in self.inputs.items()}
        try:
            arrays: list[NDArray[Any]] = self._session.run(list(outputs), fed)
        except ort_errors() as error:
            raise ModelError(f"{self._path}: ONNX Runtime cannot run it: {_line(error)}") from None
        return arrays


def _outside(model: onnx.ModelProto, weights: Weights) -> onnx.ModelProto:
    """The model with every shared tensor declared as external data, which is never read."""
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.data_location = TensorProto.EXTERNAL
            del tensor.external_data[:]
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", "handed over"
    return model


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
