"""Follows the token axis through a graph and finds every baked token count on its way.

Each tensor behind the token entry gets its dimensions twice: before (T tokens) and after (T + R).
Where a node's target shape is baked and says T, the node cannot follow, and the constant must be
mended. What cannot be decided is an error that names the node: a wrong guess would give wrong
features without any message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from regraft.errors import RewriteError
from regraft_export.graph import shape_values
from regraft_export.graph.shape_values import Baked, Elements, plain

TRIAL_BATCH = 5  # any size works; a prime is seldom another dimension by chance

_SAME_SHAPE = frozenset(
    "Add Sub Mul Div Pow Min Max Where Equal Less Greater LessOrEqual GreaterOrEqual And Or Not "
    "Gelu Erf Tanh Sigmoid Relu Sqrt Reciprocal Exp Log Neg Abs IsNaN Cast Identity Clip Softmax "
    "LogSoftmax LayerNormalization RMSNormalization HardSwish Mish Elu LeakyRelu".split()
)


@dataclass(frozen=True)
class Dims:
    """A tensor's dimensions before and after the register is appended."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def carries(self, axis: int) -> bool:
        """Whether tokens lie along an axis."""
        return self.before[axis] != self.after[axis]

    def pairs(self) -> list[tuple[int, int]]:
        """(before, after) by axis."""
        return list(zip(self.before, self.after, strict=True))


def _dims(pairs: Sequence[tuple[int, int]]) -> Dims:
    return Dims(tuple(b for b, _ in pairs), tuple(a for _, a in pairs))


@dataclass
class TokenAxis:
    """The analysis of one graph.

    Attributes:
        dims: dimensions of every tensor that was visited, by id.
        mends: baked element -> what it must become.
    """

    tokens: gs.Variable
    shape: tuple[int, int]
    registers: int
    dims: dict[int, Dims] = field(default_factory=dict)
    elements: dict[int, Elements] = field(default_factory=dict)
    mends: dict[Baked, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        T, D = self.shape
        self.dims[id(self.tokens)] = Dims(
            (TRIAL_BATCH, T, D), (TRIAL_BATCH, T + self.registers, D)
        )

    def visit(self, node: gs.Node) -> None:
        """Works out a node's outputs; nodes must come in topological order.

        Raises:
            RewriteError: the node reads tokens and what becomes of them cannot be decided.
        """
        if node.op == "Shape":
            self._shape(node)
            return
        if any(id(t) in self.dims for t in node.inputs):
            for output, dims in zip(node.outputs, self._outputs(node), strict=False):
                self.dims[id(output)] = dims
            return
        values = shape_values.evaluate(node, [self._elements(node, i) for i in _slots(node)])
        if values is not None:
            self.elements[id(node.outputs[0])] = values

    def _shape(self, node: gs.Node) -> None:
        dims = self._known(node.inputs[0])
        if dims is not None:
            values = shape_values.from_shape(node, dims.before, dims.after)
            self.elements[id(node.outputs[0])] = values

    def _elements(self, node: gs.Node, slot: int) -> Elements | None:
        value = node.inputs[slot]
        if isinstance(value, gs.Constant):
            return shape_values.from_constant(value, node, slot)
        return self.elements.get(id(value))

    def _known(self, value: gs.Tensor) -> Dims | None:
        """Dimensions of any tensor: visited, constant, or declared in the file."""
        if id(value) in self.dims:
            return self.dims[id(value)]
        if value.shape is None:
            return None
        declared = tuple(d if isinstance(d, int) else TRIAL_BATCH for d in value.shape)
        return Dims(declared, declared)

    def need(self, node: gs.Node, slot: int) -> Dims:
        """Dimensions of an input that must be known."""
        dims = self._known(node.inputs[slot])
        if dims is None:
            raise self.undecided(node, f"the shape of its input {node.inputs[slot].name!r}")
        return dims

    def values(self, node: gs.Node, slot: int, what: str) -> Elements:
        """Integer elements of an input that must be known."""
        elements = self._elements(node, slot)
        if elements is None:
            raise self.undecided(node, f"its {what} ({node.inputs[slot].name!r})")
        return elements

    def undecided(self, node: gs.Node, what: str) -> RewriteError:
        """The error for a node that cannot be followed."""
        return RewriteError(
            f"node {node.name!r} ({node.op}) reads tokens and {what} cannot be decided once a "
            "register is appended; export the model again without constants for its token count, "
            "or report this node"
        )

    def _outputs(self, node: gs.Node) -> list[Dims]:
        if node.op in _SAME_SHAPE:
            return [_broadcast(self, node)]
        rule = RULES.get(node.op)
        if rule is None:
            raise self.undecided(node, "what this operator does to them")
        return rule(self, node)

    def expect(
        self, node: gs.Node, element: shape_values.Element, wanted: tuple[int, int]
    ) -> None:
        """Makes a target dimension follow: nothing to do, a mend, or an error."""
        if element.before in (0, -1) or element.after == wanted[1]:
            return
        if element.origin is None:
            raise self.undecided(node, f"its target dimension {element.before}")
        if self.mends.setdefault(element.origin, wanted[1]) != wanted[1]:
            raise self.undecided(node, f"a shared constant, {element.before},")


def _slots(node: gs.Node) -> range:
    return range(len(node.inputs))


def _broadcast(axis: TokenAxis, node: gs.Node) -> Dims:
    shapes = [axis.need(node, i) for i in _slots(node) if node.inputs[i].name != ""]
    try:
        before = np.broadcast_shapes(*(d.before for d in shapes))
        after = np.broadcast_shapes(*(d.after for d in shapes))
    except ValueError:
        raise axis.undecided(node, "a constant with one entry per token") from None
    if node.op in ("LayerNormalization", "RMSNormalization"):
        first = int(node.attrs.get("axis", -1)) % len(before)
        if before[first:] != after[first:]:
            raise axis.undecided(node, "a norm over the token axis")
    return Dims(before, after)


def _matmul(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    a, b = axis.need(node, 0), axis.need(node, 1)
    results = []
    for left, right in ((a.before, b.before), (a.after, b.after)):
        if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
            raise axis.undecided(node, f"a product of {left} and {right}")
        results.append((*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1]))
    return [Dims(*results)]


def _transpose(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    pairs = axis.need(node, 0).pairs()
    order = node.attrs.get("perm") or list(range(len(pairs)))[::-1]
    return [_dims([pairs[i] for i in order])]


def _reshape(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    source = axis.need(node, 0)
    target = list(axis.values(node, 1, "target shape").flat)
    keep_zero = bool(node.attrs.get("allowzero", 0))
    sizes = [
        source.before[i] if e.before == 0 and not keep_zero else e.before
        for i, e in enumerate(target)
    ]
    if -1 in sizes:
        known = prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = prod(source.before) // known
    wanted = _regrouped(axis, node, source, sizes)
    for element, pair in zip(target, wanted, strict=True):
        axis.expect(node, element, pair)
    return [_dims(wanted)]


def _regrouped(
    axis: TokenAxis, node: gs.Node, source: Dims, sizes: list[int]
) -> list[tuple[int, int]]:
    """Which target axes carry the tokens: axes are matched in groups of equal element counts."""
    wanted: list[tuple[int, int]] = []
    pairs, i, j = source.pairs(), 0, 0
    while i < len(pairs) or j < len(sizes):
        taken, made = [], []
        have = want = 1
        while not taken and not made or have != want:
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
    T = axis.shape[0]
    carriers = [k for k, m in enumerate(made) if m % T == 0]
    if len(carriers) != 1:
        raise axis.undecided(node, f"which of the dimensions {tuple(made)} holds the tokens")
    return [(m, m * after // before if k == carriers[0] else m) for k, m in enumerate(made)]


def _expand(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    source = axis.need(node, 0)
    target = list(axis.values(node, 1, "target shape").flat)
    rank = max(len(target), len(source.before))
    pairs = [(1, 1)] * (rank - len(source.before)) + source.pairs()
    wanted = []
    for k, element in enumerate(target, rank - len(target)):
        pair = pairs[k] if pairs[k][0] != 1 else (element.before, element.after)
        if pairs[k][0] != 1 and element.before != 1:
            axis.expect(node, element, pair)
        wanted.append(pair)
    return [_dims(pairs[: rank - len(target)] + wanted)]


def _slice(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    pairs = axis.need(node, 0).pairs()
    starts = plain(axis.values(node, 1, "starts"))
    ends = plain(axis.values(node, 2, "ends"))
    has_axes = len(node.inputs) > 3 and node.inputs[3].name != ""
    axes = plain(axis.values(node, 3, "axes")) if has_axes else list(range(len(starts)))
    has_steps = len(node.inputs) > 4
    steps = plain(axis.values(node, 4, "steps")) if has_steps else [1] * len(starts)
    for start, end, k, step in zip(starts, ends, axes, steps, strict=True):
        before, after = pairs[k]
        cut = slice(start, end, step)
        fixed = step == 1 and 0 <= start and 0 <= end < before
        to_the_end = step == 1 and start >= 0 and end > after
        if before != after and not fixed and not to_the_end:
            raise axis.undecided(node, f"a slice [{start}:{end}:{step}] of the token axis")
        pairs[k] = (len(range(before)[cut]), len(range(after)[cut]))
    return [_dims(pairs)]


def _split(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    dims = axis.need(node, 0)
    k = int(node.attrs.get("axis", 0)) % len(dims.before)
    if dims.carries(k):
        raise axis.undecided(node, "a split of the token axis")
    if len(node.inputs) > 1:
        sizes = plain(axis.values(node, 1, "split sizes"))
    else:
        parts = int(node.attrs.get("num_outputs", len(node.outputs)))
        size = -(-dims.before[k] // parts)
        sizes = [size] * (parts - 1) + [dims.before[k] - size * (parts - 1)]
    pairs = dims.pairs()
    return [_dims([*pairs[:k], (size, size), *pairs[k + 1 :]]) for size in sizes]


def _squeeze(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    pairs = axis.need(node, 0).pairs()
    if len(node.inputs) > 1:
        axes = {a % len(pairs) for a in plain(axis.values(node, 1, "axes"))}
    else:
        axes = {k for k, pair in enumerate(pairs) if pair == (1, 1)}
    return [_dims([pair for k, pair in enumerate(pairs) if k not in axes])]


def _unsqueeze(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    pairs = axis.need(node, 0).pairs()
    rank = len(pairs) + len(plain(axis.values(node, 1, "axes")))
    for k in sorted(a % rank for a in plain(axis.values(node, 1, "axes"))):
        pairs.insert(k, (1, 1))
    return [_dims(pairs)]


def _gather(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    dims = axis.need(node, 0)
    k = int(node.attrs.get("axis", 0)) % len(dims.before)
    indices = axis.values(node, 1, "indices")
    if dims.carries(k) and any(i < 0 for i in plain(indices)):
        raise axis.undecided(node, "an index counted from the end of the token axis")
    pairs = dims.pairs()
    return [_dims([*pairs[:k], *((n, n) for n in indices.shape), *pairs[k + 1 :]])]


def _concat(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    shapes = [axis.need(node, i).pairs() for i in _slots(node)]
    k = int(node.attrs["axis"]) % len(shapes[0])
    joined = (sum(s[k][0] for s in shapes), sum(s[k][1] for s in shapes))
    return [_dims([*shapes[0][:k], joined, *shapes[0][k + 1 :]])]


def _reduce(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    dims = axis.need(node, 0)
    rank = len(dims.before)
    listed = node.attrs.get("axes")
    if listed is None and len(node.inputs) > 1:
        listed = plain(axis.values(node, 1, "axes"))
    axes = {a % rank for a in listed} if listed is not None else set(range(rank))
    if any(dims.carries(k) for k in axes):
        raise axis.undecided(node, "a reduction over tokens, which would see the register,")
    keep = bool(node.attrs.get("keepdims", 1))
    pairs = [(1, 1) if k in axes else pair for k, pair in enumerate(dims.pairs())]
    return [_dims([pair for k, pair in enumerate(pairs) if keep or k not in axes])]


RULES: dict[str, Callable[[TokenAxis, gs.Node], list[Dims]]] = {
    "MatMul": _matmul,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Expand": _expand,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Gather": _gather,
    "Concat": _concat,
    **{op: _reduce for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")},
}
