"""All rewrites for ONNX Runtime on CUDA, in order: from a trace to the graph of ``ort-cuda``.

LayerScale is folded before the patch, so that the redirect takes its rows from the new weights, and
images come before tokens; the rest comes after, so that a baseline and a patched graph go through
the same rewrites.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import onnx
import onnx_graphsurgeon as gs

from regraft.engines.parts import METADATA, Part
from regraft.rewrite_counts import CudaFusions
from regraft_export.graph.cuda.bf16_kernels import float32_for_missing_kernels
from regraft_export.graph.cuda.choices import Choices, enter, redirect
from regraft_export.graph.cuda.drop_key_bias import drop_key_bias
from regraft_export.graph.cuda.fold_layer_scale import fold_layer_scale
from regraft_export.graph.cuda.fuse_attention import DOMAIN, fuse_attention
from regraft_export.graph.cuda.fuse_bias_gelu import fuse_bias_gelu
from regraft_export.graph.cuda.fuse_skip_norm import fuse_skip_norm
from regraft_export.graph.cuda.gate_operator import gate_by_operator
from regraft_export.graph.cuda.images_first import images_first
from regraft_export.graph.cuda.inferred_shapes import Shapes, inferred_shapes
from regraft_export.graph.cuda.join_constants import join_constants
from regraft_export.graph.cuda.join_products import join_products
from regraft_export.graph.cuda.join_writes import join_writes
from regraft_export.graph.cuda.known_shapes import fix_shapes
from regraft_export.graph.cuda.leave_whole import leave_whole
from regraft_export.graph.cuda.move_value_bias import move_value_bias
from regraft_export.graph.cuda.product_operator import gelus_by_operator, products_by_operator
from regraft_export.graph.cuda.quick_gelu_operator import quick_gelus_by_operator
from regraft_export.graph.cuda.redirect_operator import DOMAIN as OWN_DOMAIN
from regraft_export.graph.cuda.redirect_operator import redirect_by_operator
from regraft_export.graph.document import read, write
from regraft_export.graph.patch import Patch, Traced, Wanted, build
from regraft_export.register_constants import RegisterConstants


@dataclass(frozen=True)
class Fused:
    """One graph for ``ort-cuda``.

    Attributes:
        proto: the graph.
        fusions: what was fused, counted.
        left: one line for each attention that was not fused, with the reason.
    """

    proto: onnx.ModelProto
    fusions: CudaFusions
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """A trace with LayerScale folded, and how many were; images come before tokens everywhere."""

    traced: Traced
    folded: int


def prepare(traced: Traced, choices: Choices | None = None) -> Prepared:
    """What all graphs of a bundle have in common, done once."""
    choices = choices or Choices()
    graph, folded, down = read(traced.proto), 0, traced.down
    exchanged = images_first(graph, traced.layout)
    if choices.layer_scale:
        folded, down = fold_layer_scale(graph, down)
    if not folded and not exchanged:
        return Prepared(traced, 0)
    proto = write(graph, shapes_changed=False)
    return Prepared(replace(traced, proto=proto, down=down), folded)


def why_not_fused(fused: Fused, blocks: int) -> str:
    """Why a graph is not worth having, in one line; empty if every block's attention is fused."""
    count = fused.fusions.attentions
    if count == blocks:
        return ""
    reasons = "; ".join(fused.left) or "there are no further softmax nodes"
    return f"{count} of {blocks} attentions have a known form: {reasons}"


def fuse(
    prepared: Prepared, patch: Patch | None, wanted: Wanted, choices: Choices | None = None
) -> Fused:
    """Makes one graph for ``ort-cuda``.

    Args:
        prepared: what :func:`prepare` returned.
        patch: None for a baseline.
        wanted: outputs; not a probe.
        choices: which forms; the same as for :func:`prepare`.

    Raises:
        RewriteError: the graph cannot be patched; see :func:`regraft_export.graph.patch.build`.
    """
    constants = None if patch is None else patch.constants
    if patch is not None and constants is not None:
        # They are joined to the fused attentions; up to there, the neurons are silent and no more.
        patch = replace(patch, constants=RegisterConstants({}, {}))
    built = build(prepared.traced, patch, wanted)
    registers = patch.options.registers if patch is not None and constants is None else 0
    return fuse_built(prepared, built.proto, registers, choices, constants)


def fuse_built(
    prepared: Prepared,
    proto: onnx.ModelProto,
    registers: int,
    choices: Choices | None = None,
    constants: RegisterConstants | None = None,
) -> Fused:
    """As :func:`fuse`, for a graph that was made of ``prepared`` before.

    Args:
        prepared: what :func:`prepare` returned.
        proto: the graph, patched or not.
        registers: test-time registers in it.
        choices: which forms; the same as for :func:`prepare`.
        constants: of the variant kv, which ``proto`` does not have yet.
    """
    choices, traced = choices or Choices(), prepared.traced
    layout = traced.layout
    tokens = layout.count + registers
    shapes = inferred_shapes(proto)
    graph = read(proto)
    patches, entered = enter(graph, traced, choices)
    attentions, left = fuse_attention(graph, layout.heads, tokens, shapes)
    fix_shapes(graph, partial(inferred_shapes, proto))
    seen = 0
    if constants is not None and attentions == layout.depth:  # else the graph is not used
        seen = join_constants(graph, constants)
    keys = drop_key_bias(graph) if choices.biases else 0
    values = move_value_bias(graph) if choices.biases else 0
    placed = 0
    if choices.operators:
        gate_by_operator(graph, tokens, shapes)
        placed = redirect_by_operator(graph, tokens, layout.width)
    graph.cleanup()
    placed += redirect(graph, choices, (tokens, layout.width), shapes)
    parts = leave_whole(graph, tokens) if choices.whole else {}
    gelus = fuse_bias_gelu(graph)
    graph.cleanup()  # what the rewrites above left unread must not count as a reader
    norms = fuse_skip_norm(graph, shapes)
    if choices.operators:
        gelus += _take_operators(graph, shapes)
    float32_for_missing_kernels(graph)
    own = sum(node.domain == OWN_DOMAIN for node in graph.nodes)
    proto = _written(graph, [DOMAIN, OWN_DOMAIN] if own else [DOMAIN], parts)
    fusions = CudaFusions(
        attentions=attentions,
        norms=norms,
        gelus=gelus,
        key_biases=keys,
        value_biases=values,
        layer_scales=prepared.folded,
        patches=patches,
        tokens=entered,
        redirects=placed,
        constants=seen,
        shape_nodes=_shape_nodes(proto),
        operators=own,
    )
    return Fused(proto, fusions, left)


def _take_operators(graph: gs.Graph, shapes: Shapes) -> int:
    """Products and activations become regraft's own; returns the GELUs that were none before."""
    gelus = quick_gelus_by_operator(graph, shapes)
    graph.cleanup()  # a bias that went along is not the product's any more
    products_by_operator(graph, shapes)
    gelus_by_operator(graph, shapes)
    join_writes(graph)
    join_products(graph)
    return gelus


def _written(graph: gs.Graph, domains: list[str], parts: Mapping[str, Part]) -> onnx.ModelProto:
    """The graph as a file's content, with the domains it uses and the outputs it leaves whole."""
    imports = [onnx.helper.make_opsetid(domain, 1) for domain in domains]
    graph.import_domains = [*(graph.import_domains or []), *imports]
    # Shapes that are known are kept: without them ONNX Runtime does not reuse a buffer in place.
    proto = write(graph, shapes_changed=False)
    if parts:
        entry = proto.metadata_props.add()
        entry.key = METADATA
        entry.value = json.dumps({n: [p.whole, p.start, p.stop] for n, p in parts.items()})
    return proto


def _shape_nodes(proto: onnx.ModelProto) -> int:
    """Shape nodes, but for those whose result goes where a kernel of CUDA wants it in the host."""
    readers: dict[str, set[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    shapes = [node.output[0] for node in proto.graph.node if node.op_type == "Shape"]
    return sum(not readers.get(name, set()) <= {"Range", "Expand"} for name in shapes)
