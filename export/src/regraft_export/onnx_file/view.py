"""A model as a graphsurgeon graph to rewrite, and the rewritten graph as a model again.

graphsurgeon is a good hand for rewriting and a poor one for keeping: metadata, value infos and
what it does not know are lost on its way. So the model stays what it is, and only what a rewrite
changed is carried over: names of inputs and outputs of its nodes, new nodes, new constants.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues

from regraft_export.graph.dims import Dims
from regraft_export.graph.document import quiet
from regraft_export.onnx_file.read import OnnxFile
from regraft_export.onnx_file.stored import Stored


class _Values(LazyValues):  # type: ignore[misc]  # graphsurgeon is untyped
    """Values that are read when they are asked for, bfloat16 among them."""

    def __init__(self, tensor: onnx.TensorProto, place: Stored | None) -> None:
        self.tensor, self.place = tensor, place
        self.shape = list(tensor.dims)
        self.dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def load(self) -> NDArray[Any]:
        if self.place is not None:
            return self.place.array(self.tensor)
        return np.array(numpy_helper.to_array(self.tensor))


@dataclass
class View:
    """A model as a graph.

    Attributes:
        file: what it is a view of.
        graph: for rewrites. Constant nodes are constants here.
        origin: position of each node in the model, by id.
        read: these nodes, held so that no new one gets the id of one that a rewrite removed.
    """

    file: OnnxFile
    graph: gs.Graph
    origin: dict[int, int]
    read: tuple[gs.Node, ...]


def view(file: OnnxFile) -> View:
    """The graph of a file; constants are read when their values are asked for."""
    proto = file.skeleton
    with quiet(), redirect_stdout(StringIO()):
        graph = gs.import_onnx(proto)
    tensors = graph.tensors()
    for initializer in proto.graph.initializer:
        constant = tensors.get(initializer.name)
        if isinstance(constant, gs.Constant):
            constant.values = _Values(initializer, file.stored.get(initializer.name))
    origin: dict[int, int] = {}
    taken: set[str] = set()
    kept = []
    for i, (node, original) in enumerate(zip(graph.nodes, proto.graph.node, strict=True)):
        # In messages and for new names every node has one of its own; the file keeps what it has.
        name = node.name or f"{node.op}_{i}"
        node.name = name if name not in taken else f"{name}_{i}"
        taken.add(node.name)
        values = _constant(original)
        if values is None or any(node.outputs[0] is t for t in graph.outputs):
            origin[id(node)] = i
            kept.append(node)
            continue
        variable = node.outputs[0]
        constant = gs.Constant(variable.name, values)
        node.outputs = []
        for reader in list({id(n): n for n in variable.outputs}.values()):
            reader.inputs = [constant if t is variable else t for t in reader.inputs]
    graph.nodes = kept
    return View(file, graph, origin, tuple(kept))


def _constant(node: onnx.NodeProto) -> NDArray[Any] | None:
    """The value of a Constant node; None for any other node or kind."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or not node.attribute:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        return np.array(numpy_helper.to_array(attribute.t))
    kinds: dict[str, Any] = {"value_int": np.int64, "value_ints": np.int64}
    kinds |= {"value_float": np.float32, "value_floats": np.float32}
    if attribute.name not in kinds:
        return None
    return np.array(onnx.helper.get_attribute_value(attribute), dtype=kinds[attribute.name])


def rewritten(changed: View, dims: Mapping[int, Dims]) -> tuple[onnx.ModelProto, dict[str, Stored]]:
    """The model with what a rewrite changed, and where its large tensors are.

    Args:
        changed: the view after the rewrite.
        dims: dimensions of tensors before and after, by id; recorded shapes follow them.
    """
    file, graph = changed.file, changed.graph
    proto = onnx.ModelProto()
    proto.CopyFrom(file.skeleton)
    body = proto.graph
    before = set(_used(body))
    nodes = [_node(changed, node, file.skeleton) for node in graph.nodes]
    # Constant nodes are not in the view.
    seen = set(changed.origin.values())
    nodes += [(i, node) for i, node in enumerate(file.skeleton.graph.node) if i not in seen]
    del body.node[:]
    body.node.extend(_ordered(nodes))
    _drop_unused(body, before)
    known = {t.name for t in body.initializer} | {o for node in body.node for o in node.output}
    for name, tensor in graph.tensors().items():
        if isinstance(tensor, gs.Constant) and name not in known:
            body.initializer.append(numpy_helper.from_array(tensor.values, name))
            if proto.ir_version < 4:  # then every initializer is declared as an input
                body.input.append(_declared(body.initializer[-1]))
    _update_shapes(body, {t.name: t for t in graph.tensors().values()}, dims)
    names = {t.name for t in body.initializer}
    return proto, {name: place for name, place in file.stored.items() if name in names}


def _node(changed: View, node: gs.Node, skeleton: onnx.ModelProto) -> tuple[int, onnx.NodeProto]:
    """Where a node belongs, and what it is: as it was, but for the names it reads and writes."""
    position = changed.origin.get(id(node))
    if position is None:
        return -1, OnnxExporter.export_node(node)
    proto = onnx.NodeProto()
    proto.CopyFrom(skeleton.graph.node[position])
    del proto.input[:], proto.output[:]
    proto.input.extend(t.name for t in node.inputs)
    proto.output.extend(t.name for t in node.outputs)
    return position, proto


def _ordered(nodes: list[tuple[int, onnx.NodeProto]]) -> list[onnx.NodeProto]:
    """Nodes in the order they had, each new one as soon as what it reads is there."""
    producer = {name: i for i, (_, node) in enumerate(nodes) for name in node.output if name}
    waits: list[set[int]] = [
        {producer[name] for name in reads(node) if name in producer} for _, node in nodes
    ]
    readers: dict[int, list[int]] = {}
    for i, sources in enumerate(waits):
        for source in sources:
            readers.setdefault(source, []).append(i)
    ready = [(nodes[i][0], i) for i, sources in enumerate(waits) if not sources]
    heapq.heapify(ready)
    ordered = []
    while ready:
        _, i = heapq.heappop(ready)
        ordered.append(nodes[i][1])
        for reader in readers.get(i, ()):
            waits[reader].discard(i)
            if not waits[reader]:
                heapq.heappush(ready, (nodes[reader][0], reader))
    assert len(ordered) == len(nodes), "the rewritten graph has a cycle"
    return ordered


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names a node reads, in its subgraphs too."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from _used(graph)


def _used(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from reads(node)
    yield from (output.name for output in graph.output)


def _drop_unused(body: onnx.GraphProto, before: set[str]) -> None:
    """Removes nodes and initializers that were used before and are not now."""
    while True:
        used = set(_used(body))

        def idle(names: list[str], used: set[str] = used) -> bool:
            return not any(n in used for n in names) and any(n in before for n in names)

        live = [node for node in body.node if not idle(list(node.output))]
        weights = [t for t in body.initializer if not idle([t.name])]
        if len(live) == len(body.node) and len(weights) == len(body.initializer):
            return
        gone = {t.name for t in body.initializer} - {t.name for t in weights}
        inputs = [i for i in body.input if i.name not in gone]
        for field, kept in ((body.node, live), (body.initializer, weights), (body.input, inputs)):
            copies = [type(item).FromString(item.SerializeToString()) for item in kept]
            del field[:]
            field.extend(copies)


def _declared(tensor: onnx.TensorProto) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))


def _update_shapes(
    body: onnx.GraphProto, tensors: Mapping[str, gs.Tensor], dims: Mapping[int, Dims]
) -> None:
    """Recorded shapes of intermediate tensors follow the tokens."""
    for info in body.value_info:
        tensor = tensors.get(info.name)
        known = None if tensor is None else dims.get(id(tensor))
        shape = info.type.tensor_type.shape
        if known is None or len(shape.dim) != len(known.before):
            continue
        for k, dim in enumerate(shape.dim):
            if known.carries(k):
                had = dim.dim_value
                dim.Clear()
                if had == known.before[k]:
                    dim.dim_value = known.after[k]
