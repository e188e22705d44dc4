"""Rewrite: an attention sees, beside its tokens, R constant keys and values per head.

1. Keys and values (B, heads, T, head size) are concatenated with a constant (1, heads, R, head
   size), expanded over the batch: four nodes an attention, two a graph for the batch size.
2. Every baked token count along the key axis, from there to the product with the values, becomes
   T + R. The queries, and with them all tokens outside this attention, stay T.

Before::  q, k, v -> attention            After::  q, Concat(k, key), Concat(v, value) -> attention

For who rewrites further: the constants contain what the projections' biases add. A graph that drops
the bias of the keys (the softmax cancels it), or takes that of the values behind the attention
(whose rows sum to 1), must take the same biases from these constants: key - b_k, value - b_v.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.errors import RewriteError
from regraft.tokens import TokenLayout
from regraft_export.graph.append_register import mend
from regraft_export.graph.attention_sites import AttentionSite
from regraft_export.graph.dims import Dims
from regraft_export.graph.document import Editor
from regraft_export.graph.token_axis import TRIAL_BATCH, TokenAxis

_Floats = NDArray[np.float32]
NODES = 4  # added per attention


def add_constants(
    graph: gs.Graph,
    site: AttentionSite,
    constants: tuple[_Floats, _Floats],
    layout: TokenLayout,
) -> list[str]:
    """Adds constants to one attention.

    Args:
        graph: changed in place; its first input has the batch size as its first dimension.
        site: the attention.
        constants: key and value, each (heads, R, head size).
        layout: of the unpatched model.

    Returns:
        The mended token counts, as ``node: before -> after``.

    Raises:
        RewriteError: a token count along the key axis cannot be decided, or the constants do not
            fit the attention.
    """
    graph.toposort()
    mended = _follow(graph, site, layout, constants[0].shape[1])
    editor = Editor(graph)
    for what, tokens, constant in zip(
        ("key", "value"), (site.keys, site.values), constants, strict=True
    ):
        stem = f"regraft.constant.{site.layer}.{what}"
        laid_out = _as(tokens, constant, stem)
        expanded = editor.node(
            "Expand",
            f"{stem}.expand",
            [editor.constant(stem, laid_out), _shape(graph, editor, laid_out.shape[1:])],
        )
        joined = editor.node(
            "Concat", f"{stem}.join", [tokens, expanded], {"axis": laid_out.ndim - 2}
        )
        for node in site.nodes:
            node.inputs = [joined if t is tokens else t for t in node.inputs]
    return mended


def _as(tokens: gs.Variable, constant: _Floats, stem: str) -> NDArray[np.generic]:
    """The constant laid out like the tokens it joins, in their dtype, for one image."""
    heads, registers, size = constant.shape
    if len(tokens.shape) == 4:
        fits, laid_out = (heads, size) == (tokens.shape[1], tokens.shape[3]), constant
    else:
        fits = heads * size == tokens.shape[2]
        laid_out = constant.transpose(1, 0, 2).reshape(registers, -1)
    if not fits:
        raise RewriteError(
            f"{stem}: {heads} heads of size {size} do not fit {tokens.name!r}, {tokens.shape}"
        )
    dtype = tokens.dtype  # of bfloat16, graphsurgeon keeps ONNX's number
    known = onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else dtype
    return np.asarray(laid_out[None].astype(known))


def _shape(graph: gs.Graph, editor: Editor, rest: tuple[int, ...]) -> gs.Variable:
    """(batch size, *rest) as a tensor, made once for each ``rest``."""
    name = f"regraft.batch.{'x'.join(map(str, rest))}"
    made = graph.tensors().get(f"{name}.out")
    if made is None:
        axis = {"start": 0, "end": 1}
        size = graph.tensors().get("regraft.batch.out") or editor.node(
            "Shape", "regraft.batch", [graph.inputs[0]], axis, dtype=np.dtype(np.int64)
        )
        dims = editor.constant(f"{name}.dims", np.array(rest, dtype=np.int64))
        made = editor.node("Concat", name, [size, dims], {"axis": 0})
    return made


def _follow(graph: gs.Graph, site: AttentionSite, layout: TokenLayout, registers: int) -> list[str]:
    """Mends token counts on the way from keys and values to the attention's result."""
    if any(node.op == "Attention" for node in site.nodes):
        return []  # which takes any number of keys
    axis = TokenAxis(site.keys, (layout.count, layout.width), registers)
    for tokens in (site.keys, site.values):
        front, size = (TRIAL_BATCH, layout.heads), tokens.shape[3]
        axis.dims[id(tokens)] = Dims(
            (*front, layout.count, size), (*front, layout.count + registers, size)
        )
    inside = {id(node) for node in site.nodes}
    for node in graph.nodes:
        if id(node) in inside:
            axis.visit(node)
    result = axis.dims[id(site.result)]
    if result.before != result.after:
        raise RewriteError(
            f"layer {site.layer}: the result of the attention {site.result.name!r} would change "
            f"its shape from {result.before} to {result.after}; expected the product with the "
            "values to take the keys' axis away"
        )
    return mend(graph, axis)
