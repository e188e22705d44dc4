"""Nodes of a file between tensors, run by ONNX Runtime's CPU provider.

A piece holds the weights that its nodes read, no others, and is closed after use: a file of any
size is run with a few weights in memory. What a graph asks of shapes (its Shape and Size nodes) is
asked once, of the whole graph, and constant in the pieces, so that none reaches back for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from regraft.engines.cores import usable_cores
from regraft.errors import EngineError, RewriteError, how_to_install
from regraft_export.onnx_file.read import OnnxFile
from regraft_export.onnx_file.view import reads
from regraft_export.onnx_file.widen import NARROW, widen_nodes

Arrays = dict[str, NDArray[Any]]
ASKS_SHAPE = frozenset(["Shape", "Size"])


@dataclass(frozen=True)
class Span:
    """What computes some tensors.

    Attributes:
        nodes: positions in the file, ascending.
        met: the given tensors among those read.
        inputs: the graph's inputs among those read.
    """

    nodes: tuple[int, ...]
    met: frozenset[str]
    inputs: frozenset[str]


class Cutter:
    """Cuts pieces from a file.

    Args:
        file: as read, or as it would be written.
        widen: whether float16 and bfloat16 become float32, in weights and arithmetic.
    """

    def __init__(self, file: OnnxFile, *, widen: bool) -> None:
        graph = file.skeleton.graph
        self.file, self.widen = file, widen
        self.weights = {t.name: t for t in graph.initializer}
        self.inputs = {i.name: i for i in graph.input if i.name not in self.weights}
        self.outputs = {o.name: o for o in graph.output}
        self.maker = {o: i for i, node in enumerate(graph.node) for o in node.output if o}
        self.shapes: Arrays = {}  # what Shape and Size nodes give, once asked

    def node(self, position: int) -> onnx.NodeProto:
        """A node by its position."""
        found: onnx.NodeProto = self.file.skeleton.graph.node[position]
        return found

    def span(self, outputs: Sequence[str], given: Sequence[str] = ()) -> Span:
        """The nodes between given tensors (and the graph's inputs) and outputs."""
        stops = frozenset(given)
        nodes, met, inputs, seen = set[int](), set[str](), set[str](), set[str]()
        pending = list(outputs)
        while pending:
            name = pending.pop()
            if name in seen or name in self.shapes or name in self.weights:
                continue
            seen.add(name)
            if name in stops:
                met.add(name)
            elif name in self.inputs:
                inputs.add(name)
            elif name in self.maker:
                position = self.maker[name]
                if position not in nodes:
                    nodes.add(position)
                    pending += reads(self.node(position))
        return Span(tuple(sorted(nodes)), frozenset(met), frozenset(inputs))

    def cut(self, outputs: Sequence[str], given: Sequence[str] = ()) -> Piece:
        """A piece from given tensors (and the graph's inputs) to outputs."""
        return Piece(self, tuple(outputs), self.span(outputs, given))

    def array(self, name: str) -> NDArray[Any]:
        """A weight's values."""
        tensor, place = self.weights[name], self.file.stored.get(name)
        values = numpy_helper.to_array(tensor) if place is None else place.array(tensor)
        narrow = self.widen and tensor.data_type in NARROW
        return np.array(values, np.float32 if narrow else None, order="C")


class Piece:
    """Nodes to run. The session is made at the first run, whose arrays decide the inputs' types."""

    def __init__(self, cutter: Cutter, outputs: tuple[str, ...], span: Span) -> None:
        self.cutter, self.outputs, self.span = cutter, outputs, span
        self._session: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None

    @property
    def reads(self) -> frozenset[str]:
        """Names of what must be fed."""
        return self.span.met | self.span.inputs

    def __str__(self) -> str:
        if not self.span.nodes:
            return f"the piece to {self.outputs[0]!r}"
        first, last = (self.cutter.node(i) for i in (self.span.nodes[0], self.span.nodes[-1]))
        return (
            f"the nodes from {first.name or first.output[0]!r} to {last.name or last.output[0]!r}"
        )

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """The outputs by name.

        Args:
            feeds: at least what the piece reads.

        Raises:
            EngineError: ONNX Runtime is missing, or cannot run the piece.
        """
        # What is fed as it is, a weight, or known as a shape, needs no session.
        known = {n: feeds[n] for n in self.outputs if n in self.span.met}
        known |= {n: self.cutter.shapes[n] for n in self.outputs if n in self.cutter.shapes}
        known |= {n: self.cutter.array(n) for n in self.outputs if n in self.cutter.weights}
        wanted = [name for name in self.outputs if name not in known]
        if not wanted:
            return known
        read = {name: feeds[name] for name in sorted(self.reads)}
        try:
            if self._session is None:
                self._session = _session(self.cutter, self.span, wanted, read)
            results = self._session.run(wanted, read)
        except EngineError:
            raise
        # onnxruntime's exceptions have no common base, and any of them means that it cannot run.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise EngineError(
                f"{self.cutter.file.path}: ONNX Runtime cannot run {self}: {reason}"
            ) from error
        if not all(isinstance(value, np.ndarray) for value in results):
            raise RewriteError(
                f"{self.cutter.file.path}: an output among {', '.join(wanted)} is no tensor; "
                "expected tensors alone"
            )
        return known | dict(zip(wanted, results, strict=True))


def _session(
    cutter: Cutter, span: Span, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]
) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        reason = "is not installed" if missing else f"cannot be imported ({error})"
        cure = how_to_install("regraft-runtime", "cpu")
        raise EngineError(
            f"--check runs the file with onnxruntime, which {reason}; {cure}"
        ) from None
    ort.disable_telemetry_events()  # nobody asked for any
    model, large = _model(cutter, span, outputs, feeds)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well
    options.intra_op_num_threads = usable_cores()
    # As the file says it, node by node: what an optimiser makes of it is not checked here.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    values = [ort.OrtValue.ortvalue_from_numpy(large[name]) for name in large]
    if large:
        options.add_external_initializers(list(large), values)
    data = model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _model(
    cutter: Cutter, span: Span, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]
) -> tuple[onnx.ModelProto, Arrays]:
    """The piece as a model, and the values of its large weights, which are handed in beside it."""
    skeleton, large = cutter.file.skeleton, Arrays()
    model = onnx.ModelProto()
    model.ir_version = skeleton.ir_version
    model.opset_import.extend(skeleton.opset_import)
    model.functions.extend(skeleton.functions)
    graph = model.graph
    graph.name = "piece"
    for position in span.nodes:
        node = graph.node.add()
        node.CopyFrom(cutter.node(position))
    if cutter.widen:
        widen_nodes(graph.node, NARROW)
        widen_nodes((node for function in model.functions for node in function.node), NARROW)
    read = {name for i in span.nodes for name in reads(cutter.node(i))}
    for name in sorted(read & cutter.weights.keys()):
        values = cutter.array(name)
        if name in cutter.file.stored:
            graph.initializer.append(_placeholder(name, values))
            large[name] = values
        else:
            graph.initializer.append(numpy_helper.from_array(values, name))
    for name in sorted(read & cutter.shapes.keys()):
        graph.initializer.append(numpy_helper.from_array(cutter.shapes[name], name))
    for name, values in feeds.items():
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        graph.input.append(helper.make_tensor_value_info(name, kind, None))
    for name in outputs:
        graph.output.add().name = name  # its type is inferred
    return model, large


def _placeholder(name: str, values: NDArray[Any]) -> TensorProto:
    tensor = TensorProto()
    tensor.name, tensor.data_type = name, helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor.dims.extend(values.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "memory"), ("offset", "0"), ("length", str(values.nbytes))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor
