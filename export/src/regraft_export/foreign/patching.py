"""From a foreign ONNX file and register neurons to a patched one.

The result has the inputs and outputs of the file, name for name and shape for shape, and everything
else of it that the patch does not touch: metadata, functions, weights in their places.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from regraft import __version__
from regraft.errors import RewriteError
from regraft.neurons import Neurons
from regraft.redirect import RedirectOptions
from regraft.rewrite_counts import Sites
from regraft_export.foreign.exits import cut_exits
from regraft_export.foreign.mlp import Mlp
from regraft_export.foreign.registers import along, append, follow, grown
from regraft_export.foreign.shapes import Conflict, Shape, measure
from regraft_export.foreign.survey import MARK, Survey
from regraft_export.graph.anchors import DownProjection
from regraft_export.graph.append_register import mend
from regraft_export.graph.open_count import OpenCount
from regraft_export.graph.redirect_neurons import redirect_neurons
from regraft_export.graph.token_axis import TokenAxis
from regraft_export.onnx_file.read import OnnxFile
from regraft_export.onnx_file.stored import Stored
from regraft_export.onnx_file.view import View, rewritten, view


@dataclass(frozen=True)
class Patched:
    """A patched model, not yet written.

    Attributes:
        proto: the model; large tensors have no values.
        stored: where their values lie.
        sites: what was touched.
        token: where the registers enter: tensor name.
        redirects: {layer: name of the down-projection's node}.
        exits: where they are cut off, as ``tensor (reader, ...)``.
        nodes_added: {layer: nodes the redirect added}.
    """

    proto: onnx.ModelProto
    stored: dict[str, Stored]
    sites: Sites
    token: str
    redirects: dict[int, str]
    exits: tuple[str, ...]
    nodes_added: dict[int, int]


def patch(found: Survey, neurons: Neurons, options: RedirectOptions) -> Patched:
    """Rewrites a surveyed file's graph; the survey is used up.

    Args:
        found: the file's places.
        neurons: they must fit.
        options: of the redirect.

    Raises:
        RewriteError: a token count cannot be decided, or the patched graph does not hold together.
        ModelError: an option needs to know which tokens are patches, and the graph does not show.
    """
    exact = options.cls == "keep" or options.patches != "zero"
    layout = found.layout(options.registers, exact=exact)
    graph, entry = found.view.graph, found.entry
    token = entry.tokens.name
    walks = [(given, _output_shapes(found.view, given)) for given in _sizes(found)]
    axis = follow(found, options.registers)
    downs = {i: _down(graph, found, axis, i) for i in neurons.layers}
    redirects = {i: d.matmul.name for i, d in downs.items()}
    open_count = found.image.open_size
    mended = mend(graph, axis)
    exits = cut_exits(graph, axis, found.inside, open_count=open_count)
    padded = append(found, options.registers)
    counts = OpenCount(padded, entry.axis) if open_count else None
    added = {
        i: redirect_neurons(graph, down, neurons.of(i), options, layout, counts)
        for i, down in downs.items()
    }
    proto, stored = rewritten(found.view, grown(found, axis))
    _mark(proto, neurons, options)
    sites = Sites(token=1, redirect=len(downs), output=len(exits), mended=tuple(mended))
    _check(found, proto, stored, sites, walks)
    return Patched(proto, stored, sites, token, redirects, tuple(exits), added)


def _down(graph: gs.Graph, found: Survey, axis: TokenAxis, layer: int) -> DownProjection:
    """One down-projection as the redirect takes it, its weight and bias constants of its own."""
    m = found.stack.mlps[layer]
    weight, _ = found.weights(layer)
    own = gs.Constant(f"{m.weight.source.name}.plain", np.ascontiguousarray(weight))
    at = along(found, axis, m.activation, f"layer {layer}: the activation")
    output = m.matmul.outputs[0] if m.bias_add is None else m.bias_add.outputs[0]
    return DownProjection(
        matmul=m.matmul,
        activation=m.activation,
        weight=own,
        bias_add=m.bias_add,
        bias=_own_bias(m),
        output=output,
        transposed=m.transposed,
        axis=at.axis,
        flat=at.flat,
    )


def _own_bias(m: Mlp) -> gs.Constant | None:
    if m.bias_add is None or m.bias is None:
        return None
    read = next(t for t in m.bias_add.inputs if t is not m.matmul.outputs[0])
    if isinstance(read, gs.Constant):
        return read
    own = gs.Constant(f"{read.name}.plain", np.ascontiguousarray(m.bias.values))
    m.bias_add.inputs = [own if t is read else t for t in m.bias_add.inputs]
    return own


def _mark(proto: onnx.ModelProto, neurons: Neurons, options: RedirectOptions) -> None:
    entry = proto.metadata_props.add()
    entry.key = MARK
    about: dict[str, Any] = {
        "version": __version__,
        "redirect": options.to_json(),
        "neurons": [[n.layer, n.index] for n in neurons.neurons],
    }
    entry.value = json.dumps(about, allow_nan=False)


def _check(
    found: Survey,
    proto: onnx.ModelProto,
    stored: dict[str, Stored],
    sites: Sites,
    walks: Sequence[tuple[Mapping[str, Shape], Mapping[str, Shape | None]]],
) -> None:
    """Walks the patched graph: it must hold together, and give the shapes the file gave."""
    onnx.checker.check_model(_without_weights(proto, stored))
    after = view(OnnxFile(found.file.path, proto, stored, found.file.external))
    after.graph.toposort()
    for given, before in walks:
        try:
            shapes = _output_shapes(after, given)
        except Conflict as error:
            raise RewriteError(f"the patched graph does not hold together: {error}") from None
        for name, shape in shapes.items():
            if shape != before[name]:
                raise RewriteError(
                    f"the output {name!r} would change its shape from {before[name]} to {shape}"
                )
    names = [n.name for n in proto.graph.node]
    cuts = sum(name.startswith("regraft.cut.") for name in names)
    weights = sum(
        t.name.startswith("regraft.redirect.") and t.name.endswith(".weight")
        for t in proto.graph.initializer
    )
    counted = (names.count("regraft.append_register"), weights, cuts)
    if counted != (sites.token, sites.redirect, sites.output) or not sites.output:
        raise RewriteError(
            f"the patched graph has {counted[0]} token, {counted[1]} redirect and {counted[2]} "
            f"output sites; expected 1, {sites.redirect} and {max(1, sites.output)}"
        )


def _sizes(found: Survey) -> list[Mapping[str, Shape]]:
    """Sizes of the inputs at which the graph is walked: where they are open, a larger one too."""
    larger = found.image.larger
    return [found.shapes.inputs] if larger is None else [found.shapes.inputs, larger]


def _output_shapes(seen: View, given: Mapping[str, Shape]) -> dict[str, Shape | None]:
    shapes = measure(seen, given)
    return {t.name: shapes.of(t) for t in seen.graph.outputs}


def _without_weights(proto: onnx.ModelProto, stored: dict[str, Stored]) -> onnx.ModelProto:
    """A copy in which large tensors are inputs: the checker would look for their values."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.initializer[:]
    declared = {i.name for i in bare.graph.input}
    for tensor in proto.graph.initializer:
        if tensor.name not in stored:
            bare.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in declared:
            info = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, list(tensor.dims)
            )
            bare.graph.input.append(info)
    return bare
