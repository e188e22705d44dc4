"""Stacks of transformer blocks in a foreign graph, and which of them is meant.

Blocks follow one another along the residual stream: from one MLP's addition over attention's to the
next MLP's. Between two MLPs lies exactly one attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx
import onnx_graphsurgeon as gs

from regraft.errors import ModelError
from regraft_export.foreign.constants import is_constant
from regraft_export.foreign.mlp import ATTENTION, PASSES, Mlp, mlps
from regraft_export.foreign.reach import Reach
from regraft_export.graph.token_rules import CONTRIBUTED_RULES
from regraft_export.onnx_file.view import View

_FUSED = "com.microsoft"
_QUANTISED = frozenset(
    ["DequantizeLinear", "QLinearMatMul", "MatMulInteger", "MatMulNBits", "DynamicQuantizeLinear"]
)


@dataclass(frozen=True)
class Stack:
    """Blocks in the order they run.

    Attributes:
        mlps: one a block.
        additions: residual additions from one block's output to the next MLP's stream.
        start: the stream where the first block reads it.
        inputs: names of the graph's inputs it is computed from.
        names: of nodes, weights and modules of its MLPs, for choosing.
    """

    mlps: tuple[Mlp, ...]
    additions: int
    start: gs.Variable
    inputs: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.mlps)

    def __str__(self) -> str:
        reads = ", ".join(self.inputs) or "no input"
        return f"{self.depth} blocks of width {self.mlps[0].width} from {reads} ({self.names[0]!r})"


def find_stacks(view: View, reach: Reach) -> list[Stack]:
    """Every stack of a graph, at least two blocks each."""
    found = mlps(reach)
    by_out = {id(m.out): m for m in found}
    previous: dict[int, tuple[Mlp, int]] = {}
    for m in found:
        link = _walk_back(m.stream, by_out, reach)
        if link is not None and link[0].width == m.width:
            previous[id(m)] = link
    followed = {id(before) for before, _ in previous.values()}
    stacks = []
    for last in (m for m in found if id(m) not in followed):
        chain, counts = [last], []
        while id(chain[0]) in previous:
            before, count = previous[id(chain[0])]
            chain.insert(0, before)
            counts.append(count)
        if len(chain) > 1 and len(set(counts)) == 1 and _attends(chain, reach):
            start = _first_read(chain[0].stream, counts[0], reach)
            if start is not None:
                stacks.append(_stack(view, chain, counts[0], start, reach))
    return stacks


def choose(view: View, stacks: Sequence[Stack], prefix: str | None) -> Stack:
    """The stack that is meant.

    Args:
        view: for messages.
        stacks: at least two blocks each.
        prefix: how names of its nodes, weights or modules, or its input's name, begin.

    Raises:
        ModelError: there is none, or more than one that fits.
    """
    path = view.file.path
    if not stacks or _fused(view):
        raise ModelError(f"{path}: {_why_none(view)}")
    fitting = stacks
    if prefix is not None:
        wanted = prefix.strip("/.")
        fitting = [s for s in stacks if any(n.startswith(wanted) for n in (*s.names, *s.inputs))]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(map(str, stacks))
    if not fitting:
        raise ModelError(
            f"{path}: no stack of transformer blocks has names that begin with {prefix!r}; there "
            f"{'is' if len(stacks) == 1 else 'are'}: {listed}"
        )
    raise ModelError(
        f"{path}: {len(fitting)} stacks of transformer blocks ({listed}); choose one with --prefix "
        "and how its names begin, or the name of its input"
    )


def _walk_back(stream: gs.Tensor, by_out: dict[int, Mlp], reach: Reach) -> tuple[Mlp, int] | None:
    """The MLP before a stream, and how many additions lie between."""
    count = 0
    while id(stream) not in by_out:
        step = _step_back(stream, reach)
        if step is None:
            return None
        stream, counts = step
        count += counts
    return by_out[id(stream)], count


def _step_back(stream: gs.Tensor, reach: Reach) -> tuple[gs.Tensor, int] | None:
    """The stream before the node that made it, and whether that node was an addition to it."""
    if len(stream.inputs) != 1:
        return None
    node = stream.inputs[0]
    if node.op in PASSES and not node.domain:
        return node.inputs[0], 0
    if node.op != "Add" or any(is_constant(t) for t in node.inputs):
        return None
    a, b = node.inputs
    for trunk, branch in ((a, b), (b, a)):
        if trunk is not branch and reach.computes(trunk, branch):
            return trunk, 1
    return None


def _first_read(stream: gs.Tensor, additions: int, reach: Reach) -> gs.Variable | None:
    """The stream as many additions before the first MLP as there are before the others."""
    while additions:
        step = _step_back(stream, reach)
        if step is None:
            return None
        stream, counts = step
        additions -= counts
    return stream


def _attends(chain: Sequence[Mlp], reach: Reach) -> bool:
    """Whether there is one attention between each two MLPs."""
    for before, after in pairwise(chain):
        here = [n for n in reach.between(before.out, after.stream) if n.op in ATTENTION]
        if len(here) != 1:
            return False
    return True


def _stack(
    view: View, chain: Sequence[Mlp], additions: int, start: gs.Variable, reach: Reach
) -> Stack:
    behind = reach.behind(start)
    read = {id(t) for n in reach.nodes_of(behind) for t in n.inputs} | {id(start)}
    inputs = tuple(t.name for t in view.graph.inputs if id(t) in read)
    return Stack(tuple(chain), additions, start, inputs, tuple(_names(view, chain)))


def _names(view: View, chain: Sequence[Mlp]) -> list[str]:
    names: list[str] = []
    for m in chain:
        proto = view.file.skeleton.graph.node[view.origin[id(m.matmul)]]
        names += [proto.name.lstrip("/"), m.weight.source.name.lstrip("/")]
        names += [name for entry in proto.metadata_props for name in _scopes(entry)]
    return [name for name in dict.fromkeys(names) if name]


def _scopes(entry: onnx.StringStringEntryProto) -> list[str]:
    """Names of modules, which PyTorch's exporter records beside each node."""
    if not entry.key.endswith("name_scopes"):
        return []
    return [part.strip(" '\"") for part in entry.value.strip("[]").split(",")]


def _fused(view: View) -> list[str]:
    """Operators that ONNX Runtime's optimiser made of several; one may hide a block."""
    harmless = {*CONTRIBUTED_RULES, *_QUANTISED}
    return sorted({n.op for n in view.graph.nodes if n.domain == _FUSED and n.op not in harmless})


def _why_none(view: View) -> str:
    nodes = view.graph.nodes
    fused = _fused(view)
    if fused:
        return (
            f"its blocks are fused already ({', '.join(fused)}, of ONNX Runtime's optimiser); "
            "patch the file as it was before fusing, then fuse the patched one"
        )
    quantised = sorted({n.op for n in nodes if n.op in _QUANTISED})
    if quantised:
        return (
            f"it is quantised already ({', '.join(quantised)}); patch the file as it was before, "
            "then quantise the patched one"
        )
    called = sorted({f.name for f in view.file.skeleton.functions} & {n.op for n in nodes})
    if called:
        return (
            f"its nodes call functions of its own ({', '.join(called[:3])}); inline them first "
            "(onnx.inliner.inline_local_functions)"
        )
    return (
        "no stack of transformer blocks was found; looked for at least two blocks, each with one "
        "attention (Softmax or Attention node) and an MLP whose last product, with a constant "
        "(hidden, width), is added to the residual stream"
    )
