"""The sites of a patch, counted in the finished graph: none may have been lost."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from regraft.errors import RewriteError
from regraft.rewrite_counts import Sites


@dataclass(frozen=True)
class Rewritten:
    """What the rewrites of a patch left behind.

    Attributes:
        weights: names of the weights with zeroed rows, one per touched layer.
        mended: baked token counts, as ``node: before -> after``.
        nodes_added: {layer: nodes}.
        cut: tensor name -> the same without registers; empty in the variant kv.
        registers: as they leave the network; None in the variant kv.
        seen: {layer: keys its attention sees}, where that is not the number of tokens.
    """

    weights: list[str]
    mended: list[str]
    nodes_added: dict[int, int]
    cut: dict[str, gs.Variable]
    registers: gs.Variable | None
    seen: dict[int, int]


def count_sites(graph: gs.Graph, rewritten: Rewritten, *, probe: bool) -> Sites:
    """Counts the sites in a finished graph.

    Args:
        graph: with its outputs set.
        rewritten: what was done to it.
        probe: whether its outputs are a probe's.

    Raises:
        RewriteError: there are more or fewer than the patch has.
    """
    names = [node.name for node in graph.nodes]
    weights = {t.name for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    sites = Sites(
        token=names.count("regraft.append_register"),
        redirect=sum(name in weights for name in rewritten.weights),
        output=sum(name.startswith("regraft.cut.") for name in names),
        mended=tuple(rewritten.mended),
        attention=sum(
            {f"regraft.constant.{i}.{what}.join" for what in ("key", "value")} <= set(names)
            for i in rewritten.seen
        ),
    )
    found = (sites.token, sites.redirect, sites.output, sites.attention)
    token = rewritten.registers is not None
    # Cut: last_hidden_state, each further block output, the registers; a probe only the first.
    cuts = (1 if probe else 1 + len(rewritten.cut)) if token else 0
    expected = (int(token), len(rewritten.weights), cuts, len(rewritten.seen))
    if found != expected:
        raise RewriteError(
            f"the patched graph has {found[0]} token, {found[1]} redirect, {found[2]} output and "
            f"{found[3]} attention sites; expected {expected[0]}, {expected[1]}, {expected[2]} and "
            f"{expected[3]}: a rewrite was lost"
        )
    return sites
