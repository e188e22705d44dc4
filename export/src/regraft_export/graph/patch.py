"""All rewrites in order: from a traced graph to the four graphs of a bundle.

A traced graph has the tensors of :class:`Anchors` by name. ``build`` makes one graph of it:
patched or not, with the user's outputs or as a probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.errors import RewriteError
from regraft.manifest import Sites
from regraft.neurons import Neurons
from regraft.redirect import RedirectOptions
from regraft.tokens import TokenLayout
from regraft_export.graph import anchors as places
from regraft_export.graph.anchors import Anchors
from regraft_export.graph.append_register import append_register
from regraft_export.graph.attention_outputs import cls_to_patches, to_every_token
from regraft_export.graph.document import read, tensor, write
from regraft_export.graph.norm_outputs import token_norms
from regraft_export.graph.redirect_neurons import redirect_neurons
from regraft_export.graph.remove_register import REGISTERS, remove_register, set_outputs

LAST, POOLED = "last_hidden_state", "pooler_output"


@dataclass(frozen=True)
class Traced:
    """A model as the exporter wrote it, with what is known of it.

    Attributes:
        proto: the graph; outputs ``last_hidden_state``, ``pooler_output`` (if any) and the anchors.
        anchors: its places.
        layout: of the unpatched model.
        pooled: shape of ``pooler_output`` without the batch, or None.
        down: {layer: (hidden, D)}, weights of the down-projections in the graph's dtype.
        opset: of the default domain.
    """

    proto: onnx.ModelProto
    anchors: Anchors
    layout: TokenLayout
    pooled: tuple[int, ...] | None
    down: Mapping[int, NDArray[np.generic]]
    opset: int


@dataclass(frozen=True)
class Patch:
    """What to patch in: neurons and options."""

    neurons: Neurons
    options: RedirectOptions


@dataclass(frozen=True)
class Wanted:
    """Which outputs a graph gets beside ``last_hidden_state`` and ``pooler_output``.

    Attributes:
        layers: raw block outputs ``hidden.L``.
        attentions: ``attentions.L``, CLS to patches.
        probe: instead of both, ``norms.L`` and ``attentions.L`` to every token, for every layer.
    """

    layers: Sequence[int] = ()
    attentions: Sequence[int] = ()
    probe: bool = False


@dataclass(frozen=True)
class Built:
    """One graph of a bundle.

    Attributes:
        proto: the graph.
        outputs: name -> shape.
        sites: what was touched; None for a baseline.
        nodes_added: {layer: nodes the redirect added}.
    """

    proto: onnx.ModelProto
    outputs: dict[str, tuple[int | str, ...]]
    sites: Sites | None
    nodes_added: dict[int, int]


def build(traced: Traced, patch: Patch | None, wanted: Wanted) -> Built:
    """Makes one graph.

    Args:
        traced: the model; its proto is not changed.
        patch: None for a baseline.
        wanted: outputs.

    Raises:
        RewriteError: the graph lacks a form that a rewrite needs, or the site counts are wrong.
    """
    graph = read(traced.proto)
    anchors, layout = traced.anchors, traced.layout
    spans = {i: places.block_span(graph, anchors, i) for i in range(layout.depth)}
    attended = range(layout.depth) if wanted.probe else wanted.attentions
    probabilities = {i: places.attention_probabilities(spans[i], i) for i in attended}
    values = {name: tensor(graph, name) for name in (anchors.final, *anchors.hidden)}
    final = values[anchors.final]
    pooled = None
    if traced.pooled is not None:
        pooled = next(t for t in graph.outputs if t.name == POOLED)
    mended: list[str] = []
    added: dict[int, int] = {}
    cut: dict[str, gs.Variable] = {}
    registers: gs.Variable | None = None
    if patch is not None:
        layout = replace(layout, test_time_registers=patch.options.registers)
        downs = {
            layer: places.down_projection(spans[layer], traced.down[layer], layer)
            for layer in patch.neurons.layers
        }
        shape = (layout.count, layout.width)
        mended = append_register(graph, anchors, shape, patch.options.registers)
        for layer, down in downs.items():
            before = len(graph.nodes)
            redirect_neurons(graph, down, patch.neurons.of(layer), patch.options, layout)
            added[layer] = len(graph.nodes) - before
        # A redirect may end a block itself; the tensor that leaves the block keeps its place.
        names = [anchors.hidden[i] for i in wanted.layers]
        cut, registers = remove_register(
            graph, anchors.final, names, layout.count, patch.options.registers
        )
    outputs = _outputs(graph, traced, layout, wanted, values, cut, probabilities)
    outputs = {LAST: (cut.get(anchors.final, final), _tokens_shape(layout)), **outputs}
    if pooled is not None:
        outputs[POOLED] = (pooled, ("batch", *(traced.pooled or ())))
    if registers is not None and not wanted.probe:
        outputs[REGISTERS] = (registers, ("batch", layout.test_time_registers, layout.width))
    set_outputs(graph, outputs)
    proto = write(graph, shapes_changed=patch is not None)
    sites = _count(graph, patch, wanted, mended) if patch is not None else None
    return Built(proto, {k: tuple(v[1]) for k, v in outputs.items()}, sites, added)


_Outputs = dict[str, tuple[gs.Variable, tuple[int | str, ...]]]


def _tokens_shape(layout: TokenLayout) -> tuple[int | str, ...]:
    return ("batch", layout.count, layout.width)


def _outputs(
    graph: gs.Graph,
    traced: Traced,
    layout: TokenLayout,
    wanted: Wanted,
    values: Mapping[str, gs.Variable],
    cut: Mapping[str, gs.Variable],
    probabilities: Mapping[int, gs.Variable],
) -> _Outputs:
    hidden, heads = traced.anchors.hidden, layout.heads
    outputs: _Outputs = {}
    if wanted.probe:
        every = layout.count + layout.test_time_registers
        for i in range(layout.depth):
            norms = token_norms(graph, values[hidden[i]], i)
            outputs[f"norms.{i}"] = (norms, ("batch", every))
        for i in range(layout.depth):
            attention = to_every_token(graph, probabilities[i], layout, i)
            outputs[f"attentions.{i}"] = (attention, ("batch", heads, every))
        return outputs
    for i in wanted.layers:
        value = cut.get(hidden[i], values[hidden[i]])
        outputs[f"hidden.{i}"] = (value, _tokens_shape(layout))
    for i in wanted.attentions:
        attention = cls_to_patches(graph, probabilities[i], layout, i)
        outputs[f"attentions.{i}"] = (attention, ("batch", heads, *layout.grid))
    return outputs


def _count(graph: gs.Graph, patch: Patch, wanted: Wanted, mended: list[str]) -> Sites:
    """Counts the sites in the finished graph, and checks that none was lost."""
    names = [node.name for node in graph.nodes]
    weights = {t.name for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    layers = patch.neurons.layers
    sites = Sites(
        token=sum(name.startswith("regraft.append_register") for name in names),
        redirect=sum(f"regraft.redirect.{layer}.weight" in weights for layer in layers),
        output=sum(name.startswith("regraft.cut.") for name in names),
        mended=tuple(mended),
    )
    cuts = 1 if wanted.probe else 2 + len({*wanted.layers})
    expected = (1, len(layers), cuts)
    if (sites.token, sites.redirect) != expected[:2] or not 1 <= sites.output <= cuts:
        raise RewriteError(
            f"the patched graph has {sites.token} token, {sites.redirect} redirect and "
            f"{sites.output} output sites; expected {expected[0]}, {expected[1]} and at most "
            f"{expected[2]}: a rewrite was lost"
        )
    return sites
