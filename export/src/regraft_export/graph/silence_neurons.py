"""Rewrite: register neurons are silenced by weight alone; no node is added.

Before::  y = h @ W + b            After::  y = h @ (W, the neurons' rows zeroed) + b
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from regraft.neurons import RegisterNeuron
from regraft_export.graph.anchors import DownProjection
from regraft_export.graph.document import Editor


def silence_neurons(
    graph: gs.Graph, down: DownProjection, neurons: Sequence[RegisterNeuron]
) -> None:
    """Silences the neurons of one layer on every token.

    Args:
        graph: changed in place.
        down: the layer's down-projection.
        neurons: of this layer, at least one.
    """
    weight = down.weight.values.copy()
    weight[[n.index for n in neurons]] = 0
    name = weight_name(neurons[0].layer)
    down.matmul.inputs[1] = Editor(graph).constant(name, weight)


def weight_name(layer: int) -> str:
    """The name of a silenced layer's weight."""
    return f"regraft.silence.{layer}.weight"
