"""What was measured for a page: norms, attention and effect of the images that could be read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regraft.effect import Effect
from regraft.manifest import Manifest


@dataclass(frozen=True)
class State:
    """Norms and attention of one of the two graphs over all images.

    Attributes:
        norms: float32 (N, layers, T), T = P + patches, and + R where there are registers.
        attention: float32 (N, layers, T), of CLS to every token, mean over heads; without a class
            token, of the patches on average. In the variant kv + R, for the constants.
    """

    norms: NDArray[np.float32]
    attention: NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        name: what the page calls it.
        picture: as the model sees it, RGB, its longer edge at most ``measure.PICTURE_EDGE``.
        effect: of this image alone.
    """

    name: str
    picture: Image.Image
    effect: Effect


@dataclass(frozen=True)
class Measurement:
    """What the page is made from.

    Attributes:
        manifest: of the bundle.
        samples: the images that could be read, in order.
        before: of the baseline.
        after: of the patched graph.
        effect: over all samples.
        engine: what computed it, with its version.
    """

    manifest: Manifest
    samples: tuple[Sample, ...]
    before: State
    after: State
    effect: Effect
    engine: str

    @property
    def patches(self) -> slice:
        """The patches among the tokens."""
        return slice(self.manifest.tokens.prefix, self.manifest.tokens.count)

    @property
    def registers(self) -> slice:
        """The test-time registers among the tokens of ``after``."""
        return slice(self.manifest.tokens.count, None)

    def outliers(self, state: State) -> NDArray[np.bool_]:
        """Which patches are outlier tokens at the detection layer: (N, patches)."""
        norms = state.norms[:, self.manifest.detection_layer, self.patches]
        return np.asarray(norms > self.manifest.threshold)

    def attention_on_outliers(self) -> NDArray[np.float64]:
        """Share of the baseline's CLS attention on its outlier tokens, by layer: (layers,)."""
        shares = self.before.attention[:, :, self.patches]
        on_outliers = np.where(self.outliers(self.before)[:, None], shares, 0).sum(axis=2)
        return np.asarray(on_outliers.mean(axis=0, dtype=np.float64))
