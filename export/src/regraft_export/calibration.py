"""Measures the constants of the variant ``kv`` on images, and from which block on they are needed.

The constants are the keys and values of the test-time registers, with the redirect active, averaged
over all images. No attention needs them before the register was first written, so block
``first touched + 1`` is where they may start at the earliest. A later start is taken as long as the
blocks left out cost at most a twentieth of what leaving out every block costs. The cost is the
relative error of ``last_hidden_state`` to the variant ``token``, beyond that of the earliest start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.constants import Constants
from regraft.errors import InputError, ModelError
from regraft.neurons import Neurons
from regraft.redirect import RedirectOptions
from regraft_export.register_constants import RegisterConstants
from regraft_export.vit.constant_keys import Call, attention_changed
from regraft_export.vit.hooks import redirected, register_replaced
from regraft_export.vit.observe import observe
from regraft_export.vit.parts import VisionTransformer

MEASURED_IMAGES = 8
LEFT_OUT = 0.05


@dataclass(frozen=True)
class Calibration:
    """Attributes: constants (of the chosen blocks) and about (how they came to be)."""

    constants: RegisterConstants
    about: Constants


def calibrate(
    vit: VisionTransformer,
    neurons: Neurons,
    options: RedirectOptions,
    batches: Iterable[NDArray[np.float32]],
    *,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Calibration:
    """Measures the constants.

    Args:
        vit: the model, float32.
        neurons: the register neurons.
        options: of the redirect that gives the register what it holds.
        batches: preprocessed images, each (B, 3, H, W); at least one.
        on_batch: called with each batch's size, for progress.

    Raises:
        InputError: no image came.
        ModelError: an attention cannot be intercepted, or a key or value is not finite.
    """
    means = _Means(vit)
    with torch.no_grad(), redirected(vit, neurons, options):
        with attention_changed(vit, range(vit.layout.depth), means.add):
            for pixels in batches:
                means.run(pixels)
                on_batch(len(pixels))
        if not means.images:
            raise InputError("no image came to calibrate the variant kv on; expected at least one")
        constants = means.result()
        sample = torch.cat(means.sample)
        right = observe(vit, sample).last_hidden_state
    earliest = neurons.layers[0] + 1
    errors = _errors(vit, neurons, constants, sample, right, range(earliest, vit.layout.depth + 1))
    first = choose(errors)
    about = Constants(first, means.images, means.digest.hexdigest(), len(sample), errors)
    return Calibration(constants.from_block(first), about)


def choose(errors: Mapping[int, float]) -> int:
    """The first block that needs constants, by the rule above.

    Args:
        errors: {block: error with the constants from it on}; the last is that without any.
    """
    best, none = errors[min(errors)], errors[max(errors)]
    allowed = best + LEFT_OUT * max(none - best, 0.0)
    return max(block for block, error in errors.items() if error <= allowed)


def _errors(
    vit: VisionTransformer,
    neurons: Neurons,
    constants: RegisterConstants,
    pixels: Tensor,
    right: Tensor,
    starts: range,
) -> dict[int, float]:
    errors = {}
    for start in starts:
        with (
            torch.no_grad(),
            register_replaced(vit, neurons.neurons, constants.from_block(start)),
        ):
            state = observe(vit, pixels).last_hidden_state
        errors[start] = float((state - right).norm() / right.norm().clamp(min=1e-30))
    return errors


@dataclass
class _Means:
    """Sums of the registers' keys and values, (heads, R, head size) float64 by block."""

    vit: VisionTransformer
    images: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    sample: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.digest = hashlib.sha256()

    def run(self, pixels: NDArray[np.float32]) -> None:
        """Runs the model, which calls :meth:`add` in each block."""
        images = torch.from_numpy(pixels).to(self.vit.device)
        self.vit.module(images)
        self.digest.update(np.ascontiguousarray(pixels).tobytes())
        if self.images < MEASURED_IMAGES:
            self.sample.append(images[: MEASURED_IMAGES - self.images])
        self.images += len(pixels)

    def add(self, layer: int, call: Call) -> Call:
        for sums, tokens in ((self.keys, call.key), (self.values, call.value)):
            registers = tokens[:, :, self.vit.layout.count :].double().sum(dim=0)
            sums[layer] = sums.get(layer, torch.zeros_like(registers)) + registers
        return call

    def result(self) -> RegisterConstants:
        keys, values = (
            {i: (s / self.images).float().cpu().numpy() for i, s in sums.items()}
            for sums in (self.keys, self.values)
        )
        for layer, array in (*keys.items(), *values.items()):
            if not np.isfinite(array).all():
                raise ModelError(
                    f"block {layer}: the register's mean key or value is NaN or infinite; expected "
                    "finite numbers: check the weights and the preprocessing (mean, std)"
                )
        return RegisterConstants(keys, values)
