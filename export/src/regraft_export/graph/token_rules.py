"""What each operator does to the token axis; one small function an operator.

A rule takes the analysis and a node and returns the dimensions of its outputs, before and after.
It asks the analysis to mend a baked count (``expect``), or refuses what cannot be decided.
``token_sums.py``, ``token_moves.py`` and ``token_reshapes.py`` have a table of rules each; here are
those of operators whose result is shaped like what they are given, and the table of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from regraft_export.graph.dims import Dims
from regraft_export.graph.token_moves import MOVES
from regraft_export.graph.token_reshapes import RESHAPES
from regraft_export.graph.token_sums import SUMS

if TYPE_CHECKING:
    from regraft_export.graph.token_axis import Rule, TokenAxis

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


def _broadcast(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    shapes = [axis.need(node, i) for i, value in enumerate(node.inputs) if value.name != ""]
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


def _like_first(axis: TokenAxis, node: gs.Node) -> list[Dims]:
    return [axis.need(node, 0)] * len(node.outputs)


RULES: dict[str, Rule] = {
    **SUMS,
    **MOVES,
    **RESHAPES,
    **dict.fromkeys(("Dropout", "CastLike", "SequenceAt"), _like_first),
    **dict.fromkeys(_SAME_SHAPE, _broadcast),
}

STANDARD_DOMAINS = (None, "", "ai.onnx")

# Operators of other domains that leave the tokens as they are.
CONTRIBUTED_RULES: dict[str, Rule] = dict.fromkeys(
    ("Gelu", "QuickGelu", "FastGelu", "BiasGelu"), _like_first
)
