"""Rewrites for ONNX Runtime on CUDA that have several forms, and which of them is taken.

:func:`enter` is the way from pixels to tokens, :func:`redirect` what writes the registers' rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from regraft_export.graph.cuda.add_to_residual import add_to_residual
from regraft_export.graph.cuda.embed_tokens import embed_tokens
from regraft_export.graph.cuda.inferred_shapes import Shapes
from regraft_export.graph.cuda.maximum import maximum_by_topk
from regraft_export.graph.cuda.patch_matmul import patch_matmul
from regraft_export.graph.cuda.place_register_row import place_register_row
from regraft_export.graph.cuda.widen_hidden import widen_hidden
from regraft_export.graph.patch import Traced


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Forms that only a card can decide between; the benchmark runs them all.

    Attributes:
        write: how a register's row gets what is redirected: ``residual`` (in place, no pass),
            ``row`` (one pass, by Where), ``wide`` (hidden units of its own, no pass), ``added``
            (the portable Mul and Add).
        constants: with ``value = constant`` and ``write = residual``: ``residual`` or ``added``,
            a bias of tokens in a pass of its own, which is faster for small batches.
        maximum: ``topk`` or ``reduce``.
        patches: patch embedding as one product.
        tokens: token entry as one Pad and one constant.
        biases: key and value biases out of the attention.
        layer_scale: LayerScale folded into weights.
        whole: registers cut off by the copy back, see :mod:`regraft.engines.parts`.
        operators: regraft's own operators where they fit; the forms above where they do not. The
            graph then needs their library.
    """

    write: str = "residual"
    constants: str = "added"
    maximum: str = "topk"
    patches: bool = True
    tokens: bool = True
    biases: bool = True
    layer_scale: bool = True
    whole: bool = True
    operators: bool = False


def enter(graph: gs.Graph, traced: Traced, choices: Choices) -> tuple[bool, bool]:
    """The way from pixels to tokens; which of its two rewrites took place."""
    size = graph.inputs[0].shape[2:]
    patches = patch_matmul(graph, (int(size[0]), int(size[1]))) if choices.patches else None
    if patches is None or not choices.tokens:
        return patches is not None, False
    pads = [n for n in graph.nodes if n.name == "regraft.append_register"]
    found = pads[0].outputs[0] if pads else graph.tensors().get(traced.anchors.tokens)
    if not isinstance(found, gs.Variable):
        return True, False
    layout = traced.layout
    count = layout.grid[0] * layout.grid[1]
    return True, embed_tokens(graph, patches, found, (count, layout.width))


def redirect(
    graph: gs.Graph,
    choices: Choices,
    size: tuple[int, int],
    shapes: Shapes,
) -> int:
    """Gives the registers' rows their form; returns how many touched layers have it.

    Args:
        graph: changed in place.
        choices: which form.
        size: tokens with the registers, and their width.
        shapes: of all tensors, as far as known.
    """
    tokens = size[0]
    if choices.maximum == "topk":
        maximum_by_topk(graph, tokens)
    done = 0
    if choices.write == "wide":
        done = widen_hidden(graph, tokens)
    if choices.write == "residual":
        constants = choices.constants == "residual"
        done = add_to_residual(graph, *size, shapes, constants=constants)
    graph.cleanup()  # sums that were replaced are no sums any more
    # What does not fit, a gated MLP's hidden units for example, takes the form with one pass.
    return done + (place_register_row(graph, tokens) if choices.write != "added" else 0)
