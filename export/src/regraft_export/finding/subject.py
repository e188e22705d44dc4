"""What finding asks of a model, whatever runs it; arrays are numpy's on both sides.

The algorithm (``outliers.py``, ``score.py``, ``search.py``, ...) sees a model through this protocol
alone. ``pytorch.py`` implements it for PyTorch modules, ``foreign/subject.py`` for ONNX files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regraft.neurons import Neurons

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Intervention:
    """What is done to a model while it runs.

    Attributes:
        register: whether one zero token is appended to the tokens, and removed behind the network.
        neurons: redirected to the register; without one, zero on every token. Always with the
            redirect's default options.
    """

    register: bool = False
    neurons: Neurons | None = None


PLAIN = Intervention()


@dataclass(frozen=True)
class Contributions:
    """What the units of some layers contribute to the outlier tokens of a batch, as sums.

    See ``score.py`` for the terms.

    Attributes:
        at_outliers: per layer (m,): contributions at the outlier tokens.
        elsewhere: per layer (m,): those at the ordinary patches of images that have outliers.
        activation: per layer (m,): activations at the outlier tokens.
        activation_by_image: per layer (m,): of each image's mean activation at its outlier tokens.
        outliers: outlier tokens.
        ordinary: ordinary patches of images that have outliers.
        images: images.
        images_with_outliers: of these, those with at least one.
    """

    at_outliers: tuple[Doubles, ...]
    elsewhere: tuple[Doubles, ...]
    activation: tuple[Doubles, ...]
    activation_by_image: tuple[Doubles, ...]
    outliers: int
    ordinary: int
    images: int
    images_with_outliers: int

    @classmethod
    def of_batch(
        cls, by_layer: Sequence[tuple[Doubles, ...]], per_image: NDArray[Any], patches: int
    ) -> Contributions:
        """Puts the sums of one batch together.

        Args:
            by_layer: of each layer the four kinds of sums, in the order of the attributes.
            per_image: (B,): outlier tokens of each image.
            patches: patch tokens of an image.
        """
        at_outliers, elsewhere, activation, by_image = zip(*by_layer, strict=True)
        outliers, affected = int(per_image.sum()), int((per_image > 0).sum())
        return cls(
            at_outliers=at_outliers,
            elsewhere=elsewhere,
            activation=activation,
            activation_by_image=by_image,
            outliers=outliers,
            ordinary=affected * patches - outliers,
            images=len(per_image),
            images_with_outliers=affected,
        )


@dataclass(frozen=True)
class Seen:
    """What one pass through the whole model showed.

    Attributes:
        norms: (L, B, patches + R): L2 norms of the patches, and of the registers behind them, at
            every block's raw output.
        outputs: (B, E): the model's own output.
        output: what that is: ``pooled``, ``class token`` or ``mean patch``.
    """

    norms: Floats
    outputs: Floats
    output: str


class Subject(Protocol):
    """A Vision Transformer that finding works on. Pixels are float32 (B, 3, H, W)."""

    @property
    def hidden(self) -> tuple[int, ...]:
        """Neurons of every layer, by layer."""

    @property
    def patches(self) -> int:
        """Patch tokens of an image."""

    @property
    def state_bytes(self) -> int:
        """What one image's :meth:`state` takes."""

    @property
    def versions(self) -> Mapping[str, str]:
        """The packages that compute the figures."""

    def activation_bytes(self, layers: int) -> int:
        """What the activations of the first ``layers`` layers of one image take."""

    def norms(self, pixels: Floats) -> Floats:
        """One pass through the whole model as it is: patch norms, (L, B, patches)."""

    def contributions(
        self, pixels: Floats, layer: int, threshold: float, layers: int
    ) -> Contributions | None:
        """One pass to the output of block ``layer``.

        Args:
            pixels: as few images as :meth:`activation_bytes` demands.
            layer: the detection layer.
            threshold: above it a patch is an outlier.
            layers: how many layers, from the first, to score.

        Returns:
            The sums; None where no image has an outlier.

        Raises:
            ModelError: the activations are not laid out token by token.
        """

    def state(self, pixels: Floats, layer: int) -> Any:
        """What enters block ``layer`` (from 1) with a register and nothing redirected so far."""

    def norms_at(
        self,
        pixels: Floats,
        layer: int,
        done: Intervention = PLAIN,
        start: tuple[int, Any] | None = None,
    ) -> Floats:
        """One pass to the output of block ``layer``: patch norms there, (B, patches).

        Args:
            pixels: the images.
            layer: where the pass ends.
            done: what is done meanwhile.
            start: (block, what :meth:`state` gave for it): the pass begins there. Nothing in front
                of that block may be touched.
        """

    def received(self, pixels: Floats, neurons: Neurons) -> Mapping[int, Doubles]:
        """What the register receives of each unit: {layer: (m,)}, summed over images."""

    def observe(self, pixels: Floats, done: Intervention) -> Seen:
        """One pass through the whole model."""

    def down(self, layer: int) -> tuple[Floats, Floats | None]:
        """A down-projection (m, D), without LayerScale, and its bias (D,) or None."""
