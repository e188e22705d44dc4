"""Rules of operators that give a tensor other dimensions: reshape, flatten and expand.

A target shape may have the token count baked in, by itself or multiplied with something else. Which
of its dimensions holds the tokens is worked out from the dimensions of the source.
"""

from __future__ import annotations

from math import gcd, prod
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from regraft_export.graph.dims import Dims, from_pairs
from regraft_export.graph.shape_values import elements_of

if TYPE_CHECKING:
    from regraft_export.graph.token_axis import Rule, TokenAxis


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


def _flatten(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    pairs = axis.need(node, 0).pairs()
    at = int(node.attrs.get("axis", 1)) % (len(pairs) + 1)
    halves = (pairs[:at], pairs[at:])
    return [from_pairs([(prod(b for b, _ in h), prod(a for _, a in h)) for h in halves])]


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


RESHAPES: dict[str, Rule] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Expand": _expand,
}
