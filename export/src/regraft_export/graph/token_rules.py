"""What each operator does to the token axis; one small function an operator.

A rule takes the analysis and a node and returns the dimensions of its outputs, before and after.
It asks the analysis to mend a baked count (``expect``), or refuses what cannot be decided.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd, prod
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from regraft_export.graph.dims import Dims, from_pairs
from regraft_export.graph.shape_values import elements_of

if TYPE_CHECKING:
    from regraft_export.graph.token_axis import TokenAxis

_SAME_SHAPE = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Min",
        "Max",
        "Where",
        "Equal",
        "Less",
        "Greater",
        "LessOrEqual",
        "GreaterOrEqual",
        "And",
        "Or",
        "Not",
        "Gelu",
        "Erf",
        "Tanh",
        "Sigmoid",
        "Relu",
        "Sqrt",
        "Reciprocal",
        "Exp",
        "Log",
        "Neg",
        "Abs",
        "IsNaN",
        "Cast",
        "Identity",
        "Clip",
        "Softmax",
        "LogSoftmax",
        "LayerNormalization",
        "RMSNormalization",
        "HardSwish",
        "Mish",
        "Elu",
        "LeakyRelu",
        "Swish",
        "HardSigmoid",
        "Softplus",
        "Softsign",
        "Selu",
        "Celu",
        "PRelu",
        "Sin",
        "Cos",
        "Floor",
        "Ceil",
        "Round",
        "Sign",
        "Mod",
        "Sum",
        "Xor",
        "IsInf",
        "SimplifiedLayerNormalization",
    ]
)


def _slots(node: gs.Node) -> range:
    return range(len(node.inputs))


def _broadcast(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    shapes = [axis.need(node, i) for i in _slots(node) if node.inputs[i].name != ""]
    if any(axis.differs(value) for value in node.inputs):
        raise axis.undecided(node, "a number computed from the token count")
    try:
        before = np.broadcast_shapes(*(d.before for d in shapes))
        after = np.broadcast_shapes(*(d.after for d in shapes))
    except ValueError:
        raise axis.undecided(node, "a constant with one entry per token") from None
    if node.op in ("LayerNormalization", "RMSNormalization"):
        first = int(node.attrs.get("axis", -1)) % len(before)
        if before[first:] != after[first:]:
            raise axis.undecided(node, "a norm over the token axis")
    return [Dims(before, after)]


def _matmul(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    a, b = axis.need(node, 0), axis.need(node, 1)
    results: list[tuple[int, ...]] = []
    for left, right in ((a.before, b.before), (a.after, b.after)):
        if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
            raise axis.undecided(node, f"a product of {left} and {right}")
        results.append((*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1]))
    return [Dims(*results)]


def _transpose(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    pairs = axis.need(node, 0).pairs()
    order = node.attrs.get("perm") or list(range(len(pairs)))[::-1]
    return [from_pairs([pairs[i] for i in order])]


def _reshape(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    source = axis.need(node, 0)
    target = elements_of(axis.values(node, 1, "target shape"))
    keep_zero = bool(node.attrs.get("allowzero", 0))
    sizes = [
        source.before[i] if e.before == 0 and not keep_zero else e.before
        for i, e in enumerate(target)
    ]
    if -1 in sizes:
        known = prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = prod(source.before) // known
    wanted = _regrouped(axis, node, source, sizes)
    for place, (element, pair) in enumerate(zip(target, wanted, strict=True)):
        axis.expect(node, place, element, pair)
    return [from_pairs(wanted)]


def _regrouped(
    axis: TokenAxis, node: gs.Node, source: Dims, sizes: list[int]
) -> list[tuple[int, int]]:
    """Which target axes carry the tokens: axes are matched in groups of equal element counts."""
    wanted: list[tuple[int, int]] = []
    taken: list[tuple[int, int]]
    made: list[int]
    pairs, i, j = source.pairs(), 0, 0
    while i < len(pairs) or j < len(sizes):
        taken, made = [], []
        have = want = 1
        while (not taken and not made) or have != want:
            if i < len(pairs) and (have <= want or j >= len(sizes)):
                taken.append(pairs[i])
                have, i = have * pairs[i][0], i + 1
            elif j < len(sizes):
                made.append(sizes[j])
                want, j = want * sizes[j], j + 1
            else:
                raise axis.undecided(node, f"a reshape of {source.before} to {tuple(sizes)}")
        wanted.extend(_group(axis, node, taken, made))
    return wanted


def _group(
    axis: TokenAxis, node: gs.Node, taken: list[tuple[int, int]], made: list[int]
) -> list[tuple[int, int]]:
    before, after = prod(b for b, _ in taken), prod(a for _, a in taken)
    if before == after:
        return [(m, m) for m in made]
    # An axis of tokens by itself tells how many there are: all, or (rotary positions) the patches.
    T = next((b for b, a in taken if a - b == axis.registers), axis.shape[0])
    carriers = [k for k, m in enumerate(made) if m % T == 0]
    if len(carriers) != 1 or not _aligned(T, taken, made, carriers[0]):
        raise axis.undecided(node, f"which of the dimensions {tuple(made)} holds the tokens")
    return [(m, m * after // before if k == carriers[0] else m) for k, m in enumerate(made)]


def _aligned(tokens: int, taken: list[tuple[int, int]], made: list[int], carrier: int) -> bool:
    """Whether a dimension holds whole tokens: nothing in front or behind cuts through them."""
    holders = [k for k, (before, after) in enumerate(taken) if before != after]
    sizes = [before for before, _ in taken]
    front, behind = prod(sizes[: holders[0]]), prod(sizes[holders[-1] + 1 :])
    # What was merged with the tokens before may lie on either side of them.
    spare = prod(sizes[holders[0] : holders[-1] + 1]) // tokens ** len(holders)
    first, last = prod(made[:carrier]), prod(made[carrier + 1 :])
    cut = first // gcd(first, front) * (last // gcd(last, behind))
    return bool(spare % cut == 0)


def _expand(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    source = axis.need(node, 0)
    target = elements_of(axis.values(node, 1, "target shape"))
    rank = max(len(target), len(source.before))
    pairs = [(1, 1)] * (rank - len(source.before)) + source.pairs()
    wanted = []
    for place, element in enumerate(target):
        k = rank - len(target) + place
        pair = pairs[k] if pairs[k][0] != 1 else (element.before, element.after)
        if pairs[k][0] != 1 and element.before != 1:
            axis.expect(node, place, element, pair)
        wanted.append(pair)
    return [from_pairs(pairs[: rank - len(target)] + wanted)]


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


def _gather(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    dims = axis.need(node, 0)
    k = int(node.attrs.get("axis", 0)) % len(dims.before)
    indices = axis.values(node, 1, "indices")
    if dims.carries(k) and any(i < 0 for i in axis.numbers(node, 1, "indices")):
        raise axis.undecided(node, "an index counted from the end of the token axis")
    pairs = dims.pairs()
    return [from_pairs([*pairs[:k], *((n, n) for n in indices.shape), *pairs[k + 1 :]])]


def _concat(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    shapes = [axis.need(node, i).pairs() for i in _slots(node)]
    k = int(node.attrs["axis"]) % len(shapes[0])
    if any(before != after for before, after in (s[k] for s in shapes[:-1])):
        raise axis.undecided(node, "a concatenation that puts something behind the register")
    joined = (sum(s[k][0] for s in shapes), sum(s[k][1] for s in shapes))
    if any([*s[:k], *s[k + 1 :]] != [*shapes[0][:k], *shapes[0][k + 1 :]] for s in shapes):
        raise axis.undecided(node, "a concatenation with something that has one entry per token")
    return [from_pairs([*shapes[0][:k], joined, *shapes[0][k + 1 :]])]


def _reduce(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    dims = axis.need(node, 0)
    rank = len(dims.before)
    listed = node.attrs.get("axes")
    if listed is None and len(node.inputs) > 1:
        listed = axis.numbers(node, 1, "axes")
    axes = {a % rank for a in listed} if listed is not None else set(range(rank))
    if any(dims.carries(k) for k in axes):
        raise axis.undecided(node, "a reduction over tokens, which would see the register,")
    keep = bool(node.attrs.get("keepdims", 1))
    pairs = [(1, 1) if k in axes else pair for k, pair in enumerate(dims.pairs())]
    return [from_pairs([pair for k, pair in enumerate(pairs) if keep or k not in axes])]


Rule = Callable[["TokenAxis", gs.Node], list[Dims]]


def _gemm(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    a, b = axis.need(node, 0).pairs(), axis.need(node, 1).pairs()
    rows, inner = a[::-1] if node.attrs.get("transA", 0) else a
    across, columns = b[::-1] if node.attrs.get("transB", 0) else b
    if inner != across or inner[0] != inner[1]:  # a sum over tokens would count the register
        raise axis.undecided(node, f"a product over {inner} and {across}")
    if len(node.inputs) > 2 and node.inputs[2].name != "":
        bias = axis.need(node, 2).pairs()
        if len(bias) > 1 and rows[0] != rows[1] and bias[0] != (1, 1):
            raise axis.undecided(node, "a bias with one entry per token")
    return [from_pairs([rows, columns])]


def _attention(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    """Attention of opset 23 and later: (B, heads, T, d), or (B, T, heads * d)."""
    q, k, v = (axis.need(node, i).pairs() for i in range(3))
    rest = [i for i in range(3, len(node.inputs)) if node.inputs[i].name != ""]
    if node.attrs.get("is_causal", 0):
        raise axis.undecided(node, "a causal attention, in which no token sees the register,")
    if any(i != 3 for i in rest):
        raise axis.undecided(node, "an attention with a past or with lengths")
    rows = 2 if len(q) == 4 else 1
    if k[rows] != v[rows] or q[rows][0] != k[rows][0]:
        raise axis.undecided(node, f"an attention of {q[rows]} queries to {k[rows]} keys")
    heads = q[1] if len(q) == 4 else (int(node.attrs["q_num_heads"]),) * 2
    scores = [q[0], heads, q[rows], k[rows]]
    if rest:
        mask = axis.need(node, 3).pairs()
        if any(m not in ((1, 1), s) for m, s in zip(mask[::-1], scores[::-1], strict=False)):
            raise axis.undecided(node, "an attention mask with one entry per token")
    if len(q) == 4:
        out = [q[0], q[1], q[2], v[3]]
    else:
        size = v[2][0] // int(node.attrs["kv_num_heads"]) * heads[0]
        out = [q[0], q[1], (size, size)]
    grown = [k[0], k[1], k[2], k[3]] if len(k) == 4 else k
    return [from_pairs(out), from_pairs(grown), from_pairs(v), from_pairs(scores)]


def _like_first(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    return [axis.need(node, 0)] * len(node.outputs)


def _flatten(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    pairs = axis.need(node, 0).pairs()
    at = int(node.attrs.get("axis", 1)) % (len(pairs) + 1)
    halves = (pairs[:at], pairs[at:])
    return [from_pairs([(prod(b for b, _ in h), prod(a for _, a in h)) for h in halves])]


def _split_to_sequence(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    """A sequence of equal parts, known by the dimensions of one."""
    dims = axis.need(node, 0)
    k = int(node.attrs.get("axis", 0)) % len(dims.before)
    sizes = axis.numbers(node, 1, "split sizes") if len(node.inputs) > 1 else [1]
    if dims.carries(k) or len(set(sizes)) != 1 or dims.before[k] % sizes[0]:
        raise axis.undecided(node, f"a split into {sizes} along axis {k}")
    pairs = dims.pairs()
    return [from_pairs([*pairs[:k], (sizes[0], sizes[0]), *pairs[k + 1 :]])]


RULES: dict[str, Rule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Attention": _attention,
    "Dropout": _like_first,
    "CastLike": _like_first,
    "Flatten": _flatten,
    "SplitToSequence": _split_to_sequence,
    "SequenceAt": _like_first,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Expand": _expand,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Gather": _gather,
    "Concat": _concat,
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"), _reduce),
    **dict.fromkeys(_SAME_SHAPE, _broadcast),
}

STANDARD_DOMAINS = (None, "", "ai.onnx")

# Operators of other domains that leave the tokens as they are.
CONTRIBUTED_RULES: dict[str, Rule] = dict.fromkeys(
    ("Gelu", "QuickGelu", "FastGelu", "BiasGelu"), _like_first
)
