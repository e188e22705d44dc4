"""Rules of operators that turn, cut, pick from or join tensors along whole axes.

The registers stand behind all tokens and must stay there: a cut that counts from the end, or
anything that is put behind them, is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from regraft_export.graph.dims import Dims, from_pairs
from regraft_export.graph.shape_values import elements_of

if TYPE_CHECKING:
    from regraft_export.graph.token_axis import Rule, TokenAxis


def _transpose(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    pairs = axis.need(node, 0).pairs()
    order = node.attrs.get("perm") or list(range(len(pairs)))[::-1]
    return [from_pairs([pairs[i] for i in order])]


def _squeeze(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    pairs = axis.need(node, 0).pairs()
    if len(node.inputs) > 1:
        axes = {a % len(pairs) for a in axis.numbers(node, 1, "axes")}
    else:
        axes = {k for k, pair in enumerate(pairs) if pair == (1, 1)}
    return [from_pairs([pair for k, pair in enumerate(pairs) if k not in axes])]


def _unsqueeze(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    pairs = axis.need(node, 0).pairs()
    axes = axis.numbers(node, 1, "axes")
    rank = len(pairs) + len(axes)
    for k in sorted(a % rank for a in axes):
        pairs.insert(k, (1, 1))
    return [from_pairs(pairs)]


def _slice(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    pairs = axis.need(node, 0).pairs()
    starts = axis.numbers(node, 1, "starts")
    ends = axis.numbers(node, 2, "ends")
    has_axes = len(node.inputs) > 3 and node.inputs[3].name != ""
    axes = axis.numbers(node, 3, "axes") if has_axes else list(range(len(starts)))
    has_steps = len(node.inputs) > 4
    steps = axis.numbers(node, 4, "steps") if has_steps else [1] * len(starts)
    for start, end, k, step in zip(starts, ends, axes, steps, strict=True):
        before, after = pairs[k]
        cut = slice(start, end, step)
        fixed = step == 1 and start >= 0 and 0 <= end < before
        to_the_end = step == 1 and start >= 0 and end > after
        if before != after and not fixed and not to_the_end:
            raise axis.undecided(node, f"a slice [{start}:{end}:{step}] of the token axis")
        pairs[k] = (len(range(before)[cut]), len(range(after)[cut]))
    return [from_pairs(pairs)]


def _split(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    dims = axis.need(node, 0)
    k = int(node.attrs.get("axis", 0)) % len(dims.before)
    if dims.carries(k):
        return _split_tokens(axis, node, dims, k)
    if len(node.inputs) > 1:
        sizes = axis.numbers(node, 1, "split sizes")
    else:
        parts = int(node.attrs.get("num_outputs", len(node.outputs)))
        size = -(-dims.before[k] // parts)
        sizes = [size] * (parts - 1) + [dims.before[k] - size * (parts - 1)]
    pairs = dims.pairs()
    return [from_pairs([*pairs[:k], (size, size), *pairs[k + 1 :]]) for size in sizes]


def _split_tokens(axis: TokenAxis, node: gs.Node, dims: Dims, k: int) -> list[Dims]:
    """The registers stand last, so the last part takes them."""
    if len(node.inputs) < 2:
        raise axis.undecided(node, "a split of the token axis into equal parts")
    sizes = elements_of(axis.values(node, 1, "split sizes"))
    more = dims.after[k] - dims.before[k]
    if sum(e.before for e in sizes) != dims.before[k]:
        raise axis.undecided(node, "a split of the token axis")
    wanted = [(e.before, e.before) for e in sizes[:-1]]
    wanted.append((sizes[-1].before, sizes[-1].before + more))
    for place, (element, pair) in enumerate(zip(sizes, wanted, strict=True)):
        axis.expect(node, place, element, pair)
    pairs = dims.pairs()
    return [from_pairs([*pairs[:k], pair, *pairs[k + 1 :]]) for pair in wanted]


def _split_to_sequence(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    """A sequence of equal parts, known by the dimensions of one."""
    dims = axis.need(node, 0)
    k = int(node.attrs.get("axis", 0)) % len(dims.before)
    sizes = axis.numbers(node, 1, "split sizes") if len(node.inputs) > 1 else [1]
    if dims.carries(k) or len(set(sizes)) != 1 or dims.before[k] % sizes[0]:
        raise axis.undecided(node, f"a split into {sizes} along axis {k}")
    pairs = dims.pairs()
    return [from_pairs([*pairs[:k], (sizes[0], sizes[0]), *pairs[k + 1 :]])]


def _gather(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    dims = axis.need(node, 0)
    k = int(node.attrs.get("axis", 0)) % len(dims.before)
    indices = axis.values(node, 1, "indices")
    if dims.carries(k) and any(i < 0 for i in axis.numbers(node, 1, "indices")):
        raise axis.undecided(node, "an index counted from the end of the token axis")
    pairs = dims.pairs()
    return [from_pairs([*pairs[:k], *((n, n) for n in indices.shape), *pairs[k + 1 :]])]


def _concat(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    shapes = [axis.need(node, i).pairs() for i in range(len(node.inputs))]
    k = int(node.attrs["axis"]) % len(shapes[0])
    if any(before != after for before, after in (s[k] for s in shapes[:-1])):
        raise axis.undecided(node, "a concatenation that puts something behind the register")
    joined = (sum(s[k][0] for s in shapes), sum(s[k][1] for s in shapes))
    if any([*s[:k], *s[k + 1 :]] != [*shapes[0][:k], *shapes[0][k + 1 :]] for s in shapes):
        raise axis.undecided(node, "a concatenation with something that has one entry per token")
    return [from_pairs([*shapes[0][:k], joined, *shapes[0][k + 1 :]])]


MOVES: dict[str, Rule] = {
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Gather": _gather,
    "Concat": _concat,
}
