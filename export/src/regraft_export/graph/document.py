"""Reading and writing graphs, unique names, and which nodes lie between two tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.logger import G_LOGGER

from regraft.errors import RewriteError

AXES_AS_INPUT = 18  # the opset from which on every reduction takes its axes as an input


def read(model: onnx.ModelProto) -> gs.Graph:
    """A graph to rewrite; the proto is not changed. Nodes get names where they have none."""
    with quiet():
        graph = gs.import_onnx(model)
    _load_bfloat16(graph, model)
    for i, node in enumerate(graph.nodes):
        node.name = node.name or f"{node.op}_{i}"
    return graph


def _load_bfloat16(graph: gs.Graph, model: onnx.ModelProto) -> None:
    # graphsurgeon gives such constants no numpy type until their values are read, and then warns.
    tensors = graph.tensors()
    for initializer in model.graph.initializer:
        constant = tensors.get(initializer.name)
        if initializer.data_type == onnx.TensorProto.BFLOAT16 and constant is not None:
            constant.values = np.array(onnx.numpy_helper.to_array(initializer))


@contextmanager
def quiet() -> Iterator[None]:
    """graphsurgeon prints to stdout, where answers for machines go."""
    severity = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.severity = severity


def write(graph: gs.Graph, *, shapes_changed: bool) -> onnx.ModelProto:
    """The graph as a checked ONNX model without unused nodes.

    Args:
        graph: the rewritten graph.
        shapes_changed: drop the recorded shapes of intermediate tensors, which no longer hold.
    """
    outputs = {id(t) for t in graph.outputs}
    if shapes_changed:
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Variable) and tensor.inputs and id(tensor) not in outputs:
                tensor.shape = None
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    model: onnx.ModelProto = gs.export_onnx(graph)
    return model


class Names:
    """Hands out names that no tensor or node of a graph has yet."""

    def __init__(self, graph: gs.Graph) -> None:
        self.taken = set(graph.tensors()) | {node.name for node in graph.nodes}

    def new(self, stem: str) -> str:
        """``stem``, or ``stem_2``, ``stem_3``, ... if it is taken."""
        name, n = stem, 1
        while name in self.taken:
            n += 1
            name = f"{stem}_{n}"
        self.taken.add(name)
        return name


class Editor:
    """Adds constants and nodes to a graph under unique names."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.names = Names(graph)
        self.added: list[gs.Node] = []

    def constant(self, stem: str, values: NDArray[np.generic]) -> gs.Constant:
        """A new initializer."""
        return gs.Constant(self.names.new(stem), np.ascontiguousarray(values))

    def reduce(
        self, op: str, stem: str, value: gs.Tensor, axes: Sequence[int], *, keepdims: bool = True
    ) -> gs.Variable:
        """Appends a reduction, with its axes as the graph's opset wants them."""
        attrs: dict[str, object] = {"keepdims": int(keepdims)}
        if (self.graph.opset or 0) < AXES_AS_INPUT:
            return self.node(op, stem, [value], {**attrs, "axes": list(axes)})
        listed = self.constant(f"{stem}.axes", np.array(axes, dtype=np.int64))
        return self.node(op, stem, [value, listed], attrs)

    def node(
        self,
        op: str,
        stem: str,
        inputs: Sequence[gs.Tensor],
        attrs: Mapping[str, object] | None = None,
        dtype: object = None,
        domain: str | None = None,
    ) -> gs.Variable:
        """Appends a node, of a domain other than ONNX's if given; returns its one output."""
        name = self.names.new(stem)
        output = gs.Variable(self.names.new(f"{stem}.out"), dtype=dtype or inputs[0].dtype)
        node = gs.Node(op, name, dict(attrs or {}), list(inputs), [output], domain=domain)
        self.graph.nodes.append(node)
        self.added.append(node)
        return output


def dtype_of(value: gs.Tensor) -> np.dtype[np.generic]:
    """The numpy type of a tensor; graphsurgeon gives bf16 variables ONNX's number for it."""
    known = value.dtype
    if isinstance(known, int):
        known = onnx.helper.tensor_dtype_to_np_dtype(known)
    dtype: np.dtype[np.generic] = np.dtype(known)
    return dtype


def tensor(graph: gs.Graph, name: str) -> gs.Variable:
    """The variable of that name.

    Raises:
        RewriteError: there is none.
    """
    found = graph.tensors().get(name)
    if not isinstance(found, gs.Variable):
        raise RewriteError(f"the graph has no tensor {name!r}")
    return found


def consumers(value: gs.Tensor) -> list[gs.Node]:
    """The nodes that read a tensor, each once."""
    return list({id(node): node for node in value.outputs}.values())


def maker(value: gs.Tensor) -> gs.Node | None:
    """The node that computes a tensor; None for the graph's inputs and constants."""
    return value.inputs[0] if value.inputs else None


def replace_uses(
    graph: gs.Graph, old: gs.Tensor, new: gs.Tensor, *, keep: Iterable[gs.Node] = ()
) -> None:
    """Lets every reader of ``old`` read ``new``, graph outputs included, but for ``keep``."""
    kept = {id(node) for node in keep}
    for node in consumers(old):
        if id(node) not in kept:
            node.inputs = [new if t is old else t for t in node.inputs]
    graph.outputs = [new if t is old else t for t in graph.outputs]


def ancestors(target: gs.Tensor, stop: Iterable[gs.Tensor] = ()) -> list[gs.Node]:
    """The nodes that compute ``target``, not going behind the tensors in ``stop``."""
    stopped = {id(t) for t in stop}
    found: dict[int, gs.Node] = {}
    pending = [target]
    while pending:
        current = pending.pop()
        if id(current) in stopped:
            continue
        for node in current.inputs:
            if id(node) not in found:
                found[id(node)] = node
                pending.extend(node.inputs)
    return list(found.values())
