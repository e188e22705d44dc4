"""Small ONNX graphs written as text, and running a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from numpy.typing import NDArray

from regraft.engines import parts
from regraft_export.graph.anchors import Anchors
from regraft_export.graph.append_register import append_register
from regraft_export.graph.document import read, write

END = 9223372036854775807
ANCHORS = Anchors("tokens", ("final",), "final")


def network(
    nodes: str,
    *,
    count: int = 17,
    width: int = 12,
    initializers: str = "",
    inputs: str = "",
    final: str = "float[batch, n, d] final",
    more: str = "",
) -> onnx.ModelProto:
    """A graph from ``tokens`` (B, T, D) to ``final``.

    Args:
        nodes: in the syntax of ``onnx.parser``.
        count: T.
        width: D.
        initializers: in the same syntax.
        inputs: further inputs.
        final: the output.
        more: further outputs.
    """
    listed = ", ".join(part for part in (f"float[batch, {count}, {width}] tokens", inputs) if part)
    outputs = ", ".join(part for part in (final, more) if part)
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        network ({listed}) => ({outputs}) <{initializers}> {{ {nodes} }}"""
    )


def appended(
    model: onnx.ModelProto, registers: int = 1, anchors: Anchors = ANCHORS
) -> tuple[onnx.ModelProto, list[str]]:
    """The graph with registers appended, checked, and what was mended."""
    shape = model.graph.input[0].type.tensor_type.shape
    T, D = (d.dim_value for d in shape.dim[1:3])
    graph = read(model)
    for output in graph.outputs:  # sizes that were inferred no longer hold
        output.shape = [f"{output.name}_{i}" for i in range(len(output.shape))]
    mended = append_register(graph, anchors, (T, D), registers)
    proto = write(graph, shapes_changed=True)
    onnx.checker.check_model(proto, full_check=True)
    return proto, mended


def run(
    model: onnx.ModelProto | bytes,
    inputs: Mapping[str, NDArray[np.generic]],
    *,
    optimize: bool = True,
) -> dict[str, NDArray[np.generic]]:
    """All outputs of a graph by name, from ONNX Runtime on the CPU."""
    session = open_session(model, optimize=optimize)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def run_whole(
    model: onnx.ModelProto, inputs: Mapping[str, NDArray[np.generic]], *, optimize: bool = True
) -> dict[str, NDArray[np.generic]]:
    """As :func:`run`, of a graph for ``ort-cuda``: wholes are cut into their parts."""
    found = run(model, inputs, optimize=optimize)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    shapes = {name: value.shape for name, value in found.items()}
    cuts = parts.parts_of(metadata, shapes)
    return {name: parts.cut(name, found, cuts) for name in parts.shapes_of(shapes, cuts)}


def open_session(model: onnx.ModelProto | bytes, *, optimize: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def floats(values: Sequence[float]) -> str:
    """Numbers as the parser reads them."""
    return "{" + ", ".join(f"{float(v)!r}" for v in values) + "}"
