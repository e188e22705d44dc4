"""Algorithm 2 of arXiv 2506.08010 and its options, in numpy on the whole activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.errors import NeuronsError
from regraft.neurons import RegisterNeuron
from regraft.redirect import RedirectOptions


def redirect(
    h: NDArray[Any],
    neurons: Sequence[RegisterNeuron],
    options: RedirectOptions,
    patches: int,
    class_token: bool,
) -> NDArray[Any]:
    """What a down-projection reads instead of ``h``.

    Args:
        h: (B, T + R, hidden), the registers last.
        neurons: of this layer.
        options: of the redirect.
        patches: how many of the T tokens are patches; they are the last.
        class_token: whether token 0 is CLS.

    Raises:
        NeuronsError: ``value = constant`` and a neuron has no value.
    """
    T = h.shape[1] - options.registers
    result = h.copy()
    received = _received(h, neurons, options)
    for k, neuron in enumerate(neurons):
        before = h[:, T - patches : T, neuron.index]
        column = result[:, :, neuron.index]  # a view
        column[:, :T] = 0
        if options.cls == "keep" and class_token:
            column[:, 0] = h[:, 0, neuron.index]
        column[:, T - patches : T] = _on_patches(before, neuron.sign, options.patches)
        column[:, T:] = received[:, k, None] * np.asarray(options.scale, h.dtype)
    return result


def _received(
    h: NDArray[Any], neurons: Sequence[RegisterNeuron], options: RedirectOptions
) -> NDArray[Any]:
    """What the register receives of each neuron, before the scale: (B, k)."""
    read = h[:, :, [n.index for n in neurons]]
    if options.value == "constant":
        lacking = [n for n in neurons if n.value is None]
        if lacking:
            raise NeuronsError(
                f"neuron (layer {lacking[0].layer}, index {lacking[0].index}) has no value, which "
                "value = constant needs"
            )
        return np.broadcast_to([n.value for n in neurons], read.shape[::2]).astype(h.dtype)
    if options.value == "per-layer":
        flat = read.reshape(len(h), -1)
        strongest = np.abs(flat).argmax(axis=1)
        return np.repeat(flat[np.arange(len(h)), strongest][:, None], len(neurons), axis=1)
    positive = np.array([n.sign > 0 for n in neurons])
    received: NDArray[Any] = np.where(positive, read.max(axis=1), read.min(axis=1))
    return received


def _on_patches(values: NDArray[Any], sign: int, rule: str) -> NDArray[Any]:
    """What one neuron holds on patches, (B, patches)."""
    if rule == "keep":
        return values
    if rule == "zero":
        return np.zeros_like(values)
    mean = np.broadcast_to(values.mean(axis=1, keepdims=True), values.shape)
    if rule == "mean":
        return mean
    deviation = values.std(axis=1, keepdims=True)
    beyond = values > mean + deviation if sign > 0 else values < mean - deviation
    return np.where(beyond, mean, values)
