"""Graphs in which neurons are set from outside, for trying many sets of them without rewriting.

Every down-projection reads ``h'`` in place of ``h``, and the graph gets an input ``sign`` (hidden,)
by layer, +1 or -1 for a register neuron and 0 for the others::

    without a register:  h' = h * (1 - |sign|)
    with one:            h' = h * (1 - |sign|) + onehot(register) * sign * max over tokens(h * sign)

This is Algorithm 2 of arXiv 2506.08010 on the whole activation, as the PyTorch hooks state it; what
``regraft patch`` writes is the folded form, which needs its neurons beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from regraft_export.foreign.exits import cut_exits
from regraft_export.foreign.registers import Along, along, append, follow, grown
from regraft_export.foreign.survey import Survey
from regraft_export.graph.append_register import mend
from regraft_export.graph.document import AXES_AS_INPUT
from regraft_export.onnx_file.view import rewritten
from regraft_export.onnx_file.widen import widened


@dataclass(frozen=True)
class Place:
    """A tensor with a vector for each token.

    Attributes:
        name: in the graph.
        along: how the tokens lie.
        kind: ONNX element type.
    """

    name: str
    along: Along
    kind: int

    def by_image(self, values: NDArray[Any], count: int) -> NDArray[Any]:
        """Its values (B, T, n), of how the graph lays them; ``count`` is T."""
        if self.along.flat:
            return values.reshape(-1, count, values.shape[-1])
        return values if self.along.axis == 1 else values.swapaxes(0, 1)

    def as_stored(self, values: NDArray[Any]) -> NDArray[Any]:
        """The reverse: (B, T, n) as the graph lays them."""
        if self.along.flat:
            return values.reshape(-1, values.shape[-1])
        return values if self.along.axis == 1 else np.ascontiguousarray(values.swapaxes(0, 1))


@dataclass(frozen=True)
class Instrumented:
    """One graph of a file.

    Attributes:
        model: large tensors have no values.
        count: tokens inside the network.
        blocks: every block's output.
        neurons: what every down-projection reads.
    """

    model: onnx.ModelProto
    count: int
    blocks: tuple[Place, ...]
    neurons: tuple[Place, ...]


Kind = Literal["plain", "silenced", "redirected"]
"""The file as it is, with neurons that can be silenced, with a register to redirect them to."""


def sign_of(layer: int) -> str:
    """Name of the input that says which neurons of a layer are set."""
    return f"regraft.find.{layer}.sign"


def instrument(found: Survey) -> dict[Kind, Instrumented]:
    """Makes all three; the survey is used up.

    Raises:
        RewriteError: a register cannot be appended; see ``registers.py``.
    """
    entry, mlps = found.entry, found.stack.mlps
    axis = follow(found, 1)
    at_blocks = [along(found, axis, m.out, f"layer {i}: the tokens") for i, m in enumerate(mlps)]
    at_neurons = [
        along(found, axis, m.activation, f"layer {i}: the activation") for i, m in enumerate(mlps)
    ]

    def described(model: onnx.ModelProto, count: int) -> Instrumented:
        # Names are read now: outputs from which a register is cut get others.
        blocks = [m.out for m in mlps], at_blocks
        neurons = [m.activation for m in mlps], at_neurons
        return Instrumented(
            widened(model), count, _places(found, *blocks), _places(found, *neurons)
        )

    products = [m.matmul.outputs[0].name for m in mlps]
    hidden = [m.hidden for m in mlps]
    plain = described(found.file.skeleton, entry.count)
    silenced = _with_signs(plain, products, hidden, found.file.opset, register=False)
    mend(found.view.graph, axis)
    cut_exits(found.view.graph, axis, found.inside, open_count=False)
    append(found, 1)
    model, _ = rewritten(found.view, grown(found, axis))
    # Of a size other than the one that was walked nothing is run.
    del model.graph.value_info[:]
    bare = described(model, entry.count + 1)
    redirected = _with_signs(bare, products, hidden, found.file.opset, register=True)
    return {"plain": plain, "silenced": silenced, "redirected": redirected}


def _places(found: Survey, values: Sequence[gs.Tensor], lie: Sequence[Along]) -> tuple[Place, ...]:
    return tuple(Place(t.name, at, _kind(found, t)) for t, at in zip(values, lie, strict=True))


def _kind(found: Survey, value: gs.Tensor) -> int:
    kind = found.shapes.kind(value) or TensorProto.FLOAT
    return int(TensorProto.FLOAT if kind == TensorProto.BFLOAT16 else kind)


def _with_signs(
    graph: Instrumented,
    products: Sequence[str],
    hidden: Sequence[int],
    opset: int,
    *,
    register: bool,
) -> Instrumented:
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    body = model.graph
    nodes: list[onnx.NodeProto] = []
    layers = {name: layer for layer, name in enumerate(products)}
    changed: list[Place] = list(graph.neurons)
    for node in body.node:
        layer = layers.get(node.output[0]) if node.output else None
        if layer is not None:
            place = graph.neurons[layer]
            added = _Redirect(layer, place, hidden[layer], graph.count, opset)
            nodes += added.nodes(register)
            body.initializer.extend(added.constants())
            body.input.append(helper.make_tensor_value_info(sign_of(layer), place.kind, [None]))
            changed[layer] = Place(added.name("new"), place.along, place.kind)
            own = onnx.NodeProto()
            own.CopyFrom(node)
            own.input[0] = changed[layer].name
            node = own
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del body.node[:]
    body.node.extend(copies)
    return Instrumented(model, graph.count, graph.blocks, tuple(changed))


@dataclass(frozen=True)
class _Redirect:
    """The nodes of one layer."""

    layer: int
    place: Place
    hidden: int
    count: int
    opset: int

    def name(self, what: str) -> str:
        return f"regraft.find.{self.layer}.{what}"

    def constants(self) -> Iterator[TensorProto]:
        dtype = helper.tensor_dtype_to_np_dtype(self.place.kind)
        onehot = np.zeros(self.count, dtype)
        onehot[-1] = 1
        ends = (1, -1, 1) if self.place.along.axis == 1 else (-1, 1, 1)
        values: Mapping[str, NDArray[np.generic]] = {
            "one": np.ones(1, dtype),
            "onehot": onehot.reshape(ends),
            "axes": np.array([self.place.along.axis], np.int64),
            "tokens": np.array([-1, self.count, self.hidden], np.int64),
            "rows": np.array([-1, self.hidden], np.int64),
        }
        for what, value in values.items():
            yield numpy_helper.from_array(value, self.name(what))

    def nodes(self, register: bool) -> Iterator[onnx.NodeProto]:
        h, sign = self.place.name, sign_of(self.layer)
        yield self._node("Abs", [sign], "chosen")
        yield self._node("Sub", [self.name("one"), self.name("chosen")], "kept")
        if not register:
            yield self._node("Mul", [h, self.name("kept")], "new")
            return
        flat = self.place.along.flat
        if flat:
            yield self._node("Reshape", [h, self.name("tokens")], "h")
            h = self.name("h")
        yield self._node("Mul", [h, self.name("kept")], "rest")
        yield self._node("Mul", [h, sign], "signed")
        if self.opset < AXES_AS_INPUT:
            yield self._node(
                "ReduceMax", [self.name("signed")], "max", axes=[self.place.along.axis]
            )
        else:
            yield self._node("ReduceMax", [self.name("signed"), self.name("axes")], "max")
        yield self._node("Mul", [self.name("max"), sign], "value")
        yield self._node("Mul", [self.name("value"), self.name("onehot")], "placed")
        result = "sum" if flat else "new"
        yield self._node("Add", [self.name("rest"), self.name("placed")], result)
        if flat:
            yield self._node("Reshape", [self.name("sum"), self.name("rows")], "new")

    def _node(self, op: str, inputs: list[str], what: str, **attributes: Any) -> onnx.NodeProto:
        name = self.name(what)
        return helper.make_node(op, inputs, [name], name=name, **attributes)
