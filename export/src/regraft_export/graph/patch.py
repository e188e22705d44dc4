"""All rewrites in order: from a traced graph to the four graphs of a bundle.

A traced graph has the tensors of :class:`Anchors` by name. ``build`` makes one graph of it:
patched or not, with the user's outputs or as a probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.neurons import Neurons
from regraft.redirect import RedirectOptions
from regraft.rewrite_counts import Sites
from regraft.tokens import TokenLayout
from regraft_export.graph import anchors as places
from regraft_export.graph.add_constants import NODES, add_constants
from regraft_export.graph.anchors import Anchors
from regraft_export.graph.append_register import append_register
from regraft_export.graph.attention_outputs import cls_to_patches, to_every_token
from regraft_export.graph.attention_sites import attention_site
from regraft_export.graph.count_sites import Rewritten, count_sites
from regraft_export.graph.document import read, tensor, write
from regraft_export.graph.norm_outputs import token_norms
from regraft_export.graph.redirect_neurons import redirect_neurons
from regraft_export.graph.remove_register import REGISTERS, remove_register, set_outputs
from regraft_export.graph.rotary_tables import RotaryTable, bind_rotary_tables
from regraft_export.graph.silence_neurons import silence_neurons, weight_name
from regraft_export.register_constants import RegisterConstants

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
        tables: of rotary positions, by name of the proto's input; none in most models.
    """

    proto: onnx.ModelProto
    anchors: Anchors
    layout: TokenLayout
    pooled: tuple[int, ...] | None
    down: Mapping[int, NDArray[np.generic]]
    opset: int
    tables: Mapping[str, RotaryTable] = field(default_factory=dict)


@dataclass(frozen=True)
class Patch:
    """What to patch in: neurons and options; with constants, the variant kv."""

    neurons: Neurons
    options: RedirectOptions
    constants: RegisterConstants | None = None


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
    # Every place is found before anything changes; tensors keep their identity through rewrites.
    values = {name: tensor(graph, name) for name in (anchors.final, *anchors.hidden)}
    pooled = next((t for t in graph.outputs if t.name == POOLED), None)
    spans = {i: places.block_span(graph, anchors, i) for i in range(layout.depth)}
    attended = range(layout.depth) if wanted.probe else wanted.attentions
    probabilities = {i: places.attention_probabilities(spans[i], i) for i in attended}
    rewritten = None
    if patch is not None and patch.constants is not None:
        rewritten = _patch_constants(graph, traced, patch, patch.constants, spans)
    elif patch is not None:
        layout = replace(layout, test_time_registers=patch.options.registers)
        rewritten = _patch(graph, traced, patch, wanted, layout, spans)
        values |= rewritten.cut
    else:
        bind_rotary_tables(graph, traced.tables, 0)
    outputs: _Outputs = {LAST: (values[anchors.final], _tokens_shape(layout))}
    # A probe measures the block's raw output, registers included, not what was cut from it.
    raw = {name: tensor(graph, name) for name in anchors.hidden}
    seen = dict.fromkeys(range(layout.depth), layout.count + layout.test_time_registers)
    seen |= {} if rewritten is None else rewritten.seen
    outputs |= _more_outputs(
        graph, traced, layout, wanted, raw if wanted.probe else values, probabilities, seen
    )
    if pooled is not None:
        outputs[POOLED] = (pooled, ("batch", *(traced.pooled or ())))
    if rewritten is not None and rewritten.registers is not None and not wanted.probe:
        shape = ("batch", layout.test_time_registers, layout.width)
        outputs[REGISTERS] = (rewritten.registers, shape)
    set_outputs(graph, outputs)
    proto = write(graph, shapes_changed=patch is not None)
    return Built(
        proto=proto,
        outputs={name: shape for name, (_, shape) in outputs.items()},
        sites=None if rewritten is None else count_sites(graph, rewritten, probe=wanted.probe),
        nodes_added={} if rewritten is None else rewritten.nodes_added,
    )


def _patch(
    graph: gs.Graph,
    traced: Traced,
    patch: Patch,
    wanted: Wanted,
    layout: TokenLayout,
    spans: Mapping[int, Sequence[gs.Node]],
) -> Rewritten:
    anchors, options, layers = traced.anchors, patch.options, patch.neurons.layers
    downs = {i: places.down_projection(spans[i], traced.down[i], i) for i in layers}
    shape = (layout.count, layout.width)
    mended = append_register(graph, anchors, shape, options.registers, traced.tables)
    added = {
        i: redirect_neurons(graph, down, patch.neurons.of(i), options, layout)
        for i, down in downs.items()
    }
    leaving = [anchors.hidden[i] for i in wanted.layers]
    cut, registers = remove_register(graph, anchors.final, leaving, layout.count, options.registers)
    weights = [f"regraft.redirect.{i}.weight" for i in layers]
    return Rewritten(weights, mended, added, cut, registers, {})


def _patch_constants(
    graph: gs.Graph,
    traced: Traced,
    patch: Patch,
    constants: RegisterConstants,
    spans: Mapping[int, Sequence[gs.Node]],
) -> Rewritten:
    """The variant kv: neurons silenced by weight, constants in the attentions that have some."""
    layout, neurons = traced.layout, patch.neurons
    downs = {i: places.down_projection(spans[i], traced.down[i], i) for i in neurons.layers}
    sites = {i: attention_site(spans[i], layout, i) for i in constants.layers}
    for i, down in downs.items():
        silence_neurons(graph, down, neurons.of(i))
    mended, seen = list[str](), dict[int, int]()
    for i, site in sites.items():
        key, value = constants.keys[i], constants.values[i]
        mended += add_constants(graph, site, (key, value), layout)
        seen[i] = layout.count + key.shape[1]
    bind_rotary_tables(graph, traced.tables, 0)
    weights = [weight_name(i) for i in downs]
    return Rewritten(weights, mended, dict.fromkeys(sites, NODES), {}, None, seen)


_Outputs = dict[str, tuple[gs.Variable, tuple[int | str, ...]]]


def _tokens_shape(layout: TokenLayout) -> tuple[int | str, ...]:
    return ("batch", layout.count, layout.width)


def _more_outputs(
    graph: gs.Graph,
    traced: Traced,
    layout: TokenLayout,
    wanted: Wanted,
    values: Mapping[str, gs.Variable],
    probabilities: Mapping[int, gs.Variable],
    seen: Mapping[int, int],
) -> _Outputs:
    hidden, heads = traced.anchors.hidden, layout.heads
    outputs: _Outputs = {}
    if wanted.probe:
        for i in range(layout.depth):
            norms = token_norms(graph, values[hidden[i]], i)
            outputs[f"norms.{i}"] = (norms, ("batch", layout.count + layout.test_time_registers))
        for i, p in probabilities.items():
            outputs[f"attentions.{i}"] = (
                to_every_token(graph, p, layout, i),
                ("batch", heads, seen[i]),
            )
        return outputs
    for i in wanted.layers:
        outputs[f"hidden.{i}"] = (values[hidden[i]], _tokens_shape(layout))
    for i, p in probabilities.items():
        outputs[f"attentions.{i}"] = (
            cls_to_patches(graph, p, layout, i),
            ("batch", heads, *layout.grid),
        )
    return outputs
