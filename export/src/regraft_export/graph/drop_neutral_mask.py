"""Rewrite: an attention mask that lets everything through is dropped.

transformers writes one into every vision model it traces, with the token count baked in, and a
guard against rows that are masked whole. Neither does anything, both cost time. What a mask holds
is proven for every batch and image size (``value_bounds.py``), in whichever way it is written.

1. ``scores + 0`` before a softmax becomes ``scores``.
2. ``Attention(q, k, v, all true)``, or with a mask of zeros, becomes ``Attention(q, k, v)``. From
   opset 24 on a mask may be shorter than the keys, and those beyond it are masked: its length must
   be known to be theirs.
3. ``Where(IsNaN(p), 0, p)`` after that softmax becomes ``p``: without a mask no row is NaN unless
   its input is, and then the NaN must show.
4. ``Where(never, 0, attended)``, by which transformers' own exporter zeroes rows without a key,
   becomes ``attended``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from regraft_export.graph.document import consumers, maker, replace_uses
from regraft_export.graph.value_bounds import bounds

_PASSES = frozenset(["Cast", "Identity"])
_PADS_MASKS = 24  # the opset from which on Attention pads a mask that is too short
_ATTENDS = frozenset(["MatMul", "Softmax", "Attention"])


@dataclass(frozen=True)
class Dropped:
    """A node that went, or an ``Attention`` node that lost its mask.

    Attributes:
        node: it reads nothing any more, unless it is an ``Attention`` node.
        inputs: what it read.
        kept: what its readers read now; None for an ``Attention`` node.
    """

    node: gs.Node
    inputs: tuple[gs.Tensor, ...]
    kept: gs.Tensor | None


def drop_neutral_mask(graph: gs.Graph) -> list[Dropped]:
    """Drops the masks and their guards; returns the nodes that were freed of one."""
    dropped = []
    outputs = {id(t) for t in graph.outputs}  # they keep their names, and so their nodes
    for node in list(graph.nodes):
        # A guard that went already reads nothing.
        if node.domain or not node.inputs or id(node.outputs[0]) in outputs:
            continue
        if node.op == "Attention" and _lets_all_through(node, graph.opset or 0):
            dropped.append(Dropped(node, tuple(node.inputs), None))
            node.inputs = list(node.inputs[:3])
        elif node.op == "Add" and _leads_to_softmax(node):
            zeros = [i for i, t in enumerate(node.inputs) if _adds_nothing(t)]
            if zeros:
                scores = node.inputs[1 - zeros[0]]
                dropped.append(_bypass(graph, node, scores))
                dropped += _drop_guards(graph, scores)
        elif node.op == "Where" and _never(node):
            dropped.append(_bypass(graph, node, node.inputs[2]))
    gone = {id(d.node) for d in dropped if d.kept is not None}
    graph.nodes = [n for n in graph.nodes if id(n) not in gone]
    return dropped


def _bypass(graph: gs.Graph, node: gs.Node, kept: gs.Tensor) -> Dropped:
    replace_uses(graph, node.outputs[0], kept)
    dropped = Dropped(node, tuple(node.inputs), kept)
    node.inputs = []
    return dropped


def attentions(dropped: Iterable[Dropped]) -> int:
    """How many attentions were freed of a mask."""
    return sum(d.node.op != "Where" for d in dropped)


def _leads_to_softmax(node: gs.Node) -> bool:
    pending = consumers(node.outputs[0])
    while pending:
        reader = pending.pop()
        if reader.op == "Softmax":
            return True
        if reader.op in _PASSES:
            pending += consumers(reader.outputs[0])
    return False


def _adds_nothing(value: gs.Tensor) -> bool:
    known = bounds(value)
    return known is not None and known.zero


def _neutral(value: gs.Tensor) -> bool:
    known = bounds(value)
    return known is not None and (known.zero or known.true)


def _lets_all_through(attention: gs.Node, opset: int) -> bool:
    if len(attention.inputs) != 4 or not _neutral(attention.inputs[3]):
        return False
    keys, mask = (attention.inputs[i].shape for i in (1, 3))
    if opset < _PADS_MASKS:
        return True
    # Keys are (B, heads, T, d) or (B, T, heads * d).
    return bool(keys and mask and len(keys) > 1 and _equal(mask[-1], keys[-2]))


def _equal(a: object, b: object) -> bool:
    """Lengths that are known and equal: dimensions of one name are."""
    return isinstance(a, int | str) and a != "" and a == b


def _never(where: gs.Node) -> bool:
    """Whether a Where would replace what an attention gave by zeros, and never does."""
    condition, replacement, kept = where.inputs
    if len(kept.inputs) != 1 or kept.inputs[0].op not in _ATTENDS or not _adds_nothing(replacement):
        return False
    known = bounds(condition)
    return known is not None and known.false


def _drop_guards(graph: gs.Graph, scores: gs.Tensor) -> list[Dropped]:
    dropped = []
    for softmax in (n for n in consumers(scores) if n.op == "Softmax"):
        p = softmax.outputs[0]
        for where in (n for n in consumers(p) if n.op == "Where"):
            condition, replacement, kept = where.inputs
            asks = maker(condition)
            guards = asks is not None and asks.op == "IsNaN" and asks.inputs[0] is p
            if kept is p and guards and _adds_nothing(replacement):
                dropped.append(_bypass(graph, where, p))
    return dropped
