"""Algorithm 2 of arXiv 2506.08010 and its options, said with loops over images, tokens, neurons.

Independent of regraft's own statements: nothing is folded, vectorised or shared with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from regraft.neurons import RegisterNeuron
from regraft.redirect import RedirectOptions


def redirect(
    activation: NDArray[np.floating],
    neurons: Sequence[RegisterNeuron],
    options: RedirectOptions,
    *,
    prefix: int,
    patches: int,
    class_token: bool,
) -> NDArray[np.float64]:
    """What the down-projection of one layer must read.

    Args:
        activation: (B, prefix + patches + registers, hidden), as the layer computed it.
        neurons: of this layer.
        options: of the redirect.
        prefix: prefix tokens.
        patches: patch tokens.
        class_token: whether token 0 is CLS.
    """
    result = activation.astype(np.float64).copy()
    for image in range(activation.shape[0]):
        h = activation[image].astype(np.float64)
        received = [_received(h, neuron, neurons, options) for neuron in neurons]
        for neuron, value in zip(neurons, received, strict=True):
            j = neuron.index
            for token in range(prefix):
                spared = options.cls == "keep" and class_token and token == 0
                result[image, token, j] = h[token, j] if spared else 0.0
            own = [h[prefix + i, j] for i in range(patches)]
            for i in range(patches):
                result[image, prefix + i, j] = _on_patch(own, i, neuron.sign, options.patches)
            for register in range(options.registers):
                scaled = value * options.scale[register]
                result[image, prefix + patches + register, j] = scaled
    return result


def _received(
    h: NDArray[np.float64],
    neuron: RegisterNeuron,
    neurons: Sequence[RegisterNeuron],
    options: RedirectOptions,
) -> float:
    """What a register receives of one neuron in one image; h is (tokens, hidden)."""
    column = [h[token, neuron.index] for token in range(h.shape[0])]
    if options.value == "constant":
        assert neuron.value is not None
        return neuron.value
    if options.value == "per-neuron":
        return max(column) if neuron.sign > 0 else min(column)
    strongest = 0.0
    for other in neurons:
        for token in range(h.shape[0]):
            if abs(h[token, other.index]) > abs(strongest):
                strongest = h[token, other.index]
    return strongest


def _on_patch(own: list[float], i: int, sign: int, patches: str) -> float:
    mean = sum(own) / len(own)
    if patches == "zero":
        return 0.0
    if patches == "keep":
        return own[i]
    if patches == "mean":
        return mean
    deviation = math.sqrt(sum((v - mean) ** 2 for v in own) / len(own))
    beyond = own[i] > mean + deviation if sign > 0 else own[i] < mean - deviation
    return mean if beyond else own[i]
