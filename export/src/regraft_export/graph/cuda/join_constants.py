"""Rewrite: a MultiHeadAttention sees, beside its tokens, R constant keys and values (variant kv).

The form for ``ort-cuda`` of :mod:`regraft_export.graph.add_constants`: the constants are expanded
over the images beside the card's main work, and one Concat copies the keys, another the values.

Before::  q, k, v -> attention            After::  q, Concat(k, key), Concat(v, value) -> attention

The constants hold what the projections' biases add. A rewrite that takes such a bias out of keys or
values takes it out of the constants as well, by :func:`without_bias`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.errors import RewriteError
from regraft_export.graph.cuda.fuse_attention import OP
from regraft_export.graph.cuda.known_shapes import images_shape
from regraft_export.graph.document import Editor, consumers, dtype_of, maker
from regraft_export.register_constants import RegisterConstants

KEY, VALUE = 1, 2
_TOKENS = 1  # their axis


@dataclass(frozen=True)
class Joined:
    """Keys or values with constants behind them.

    Attributes:
        node: the Concat.
        tokens: (B, T, H * d), what was there before.
        constant: (1, R, H * d).
    """

    node: gs.Node
    tokens: gs.Variable
    constant: gs.Constant


def join_constants(graph: gs.Graph, constants: RegisterConstants) -> int:
    """Joins constants to the attentions of the blocks that have some.

    Args:
        graph: changed in place; every block's attention is fused, and no other is.
        constants: of the variant kv.

    Returns:
        How many attentions have constants.

    Raises:
        RewriteError: the constants do not fit.
    """
    graph.toposort()
    attentions = [node for node in graph.nodes if node.op == OP]
    for layer in constants.layers:
        node = attentions[layer]
        heads = node.attrs["num_heads"]
        for slot, made in ((KEY, constants.keys[layer]), (VALUE, constants.values[layer])):
            if made.shape[0] != heads:
                raise RewriteError(
                    f"block {layer}: the constants have {made.shape[0]} heads; expected {heads}"
                )
            old = node.inputs[slot]
            row = made.transpose(1, 0, 2).reshape(1, made.shape[1], -1)
            stem = f"regraft.constant.{layer}.{'key' if slot == KEY else 'value'}"
            joined = _join(graph, old, row.astype(dtype_of(old)), stem)
            # Probabilities that leave the graph are computed from the same keys, by Reshape first.
            beside = [n for n in consumers(old) if slot == KEY and n.op == "Reshape"]
            for reader in (node, *beside):
                reader.inputs = [joined if t is old else t for t in reader.inputs]
    return len(constants.layers)


def joined(value: gs.Tensor) -> Joined | None:
    """What :func:`join_constants` made; None for anything else."""
    node = maker(value)
    if node is None or node.op != "Concat" or node.attrs["axis"] != _TOKENS:
        return None
    tokens, *rest = node.inputs
    made_by = maker(rest[0]) if len(rest) == 1 else None
    if made_by is None or made_by.op != "Expand" or not isinstance(made_by.inputs[0], gs.Constant):
        return None
    return Joined(node, tokens, made_by.inputs[0])


def without_bias(
    graph: gs.Graph, found: Joined, tokens: gs.Variable, bias: NDArray[np.generic]
) -> gs.Variable:
    """The same with other tokens, to which a bias (H * d,) is no longer added; nor to constants."""
    old = found.constant.values
    row = (old.astype(np.float64) - bias.astype(np.float64)).astype(old.dtype)
    return _join(graph, tokens, row, found.node.name)


def _join(graph: gs.Graph, tokens: gs.Variable, row: NDArray[np.generic], stem: str) -> gs.Variable:
    editor = Editor(graph)
    constant = editor.constant(stem, row)
    expanded = editor.node("Expand", f"{stem}.expand", [constant, images_shape(graph)])
    return editor.node("Concat", stem, [tokens, expanded], {"axis": _TOKENS})
