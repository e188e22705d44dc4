"""Distributions of patch norms, by layer, in memory that no number of images changes.

Histograms with logarithmic bins 0.9 % wide from 1e-4 to 1e8, so that quantiles are known within
half a percent whatever a model's norms are like.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from regraft.errors import ModelError
from regraft.wording import counted

_LOWEST, _HIGHEST = -4, 8  # decimal logarithms of the norms that are told apart
_PER_DECADE = 256  # bins 0.9 % wide
_BINS = (_HIGHEST - _LOWEST) * _PER_DECADE


class NormStatistics:
    """Distribution of patch norms by layer.

    Attributes:
        images: how many were added.
        tokens: how many patches, per layer.
        smallest: (L,) exact smallest norm.
        largest: (L,) exact largest norm.
    """

    def __init__(self, layers: int) -> None:
        self.images = 0
        self.tokens = 0
        self.smallest = np.full(layers, np.inf)
        self.largest = np.zeros(layers)
        self._of_tokens = np.zeros((layers, _BINS), np.int64)
        self._of_largest = np.zeros((layers, _BINS), np.int64)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.largest)

    def add(self, norms: NDArray[np.floating]) -> None:
        """Adds a batch.

        Args:
            norms: (L, B, patches), finite.

        Raises:
            ModelError: a norm is NaN or infinite; the message names the first such layer.
        """
        bad = ~np.isfinite(norms)
        if bad.any():
            layer = int(np.flatnonzero(bad.any(axis=(1, 2)))[0])
            raise ModelError(
                f"layer {layer}: {int(bad[layer].sum())} of {bad[layer].size} patch norms of a "
                f"batch of {counted(norms.shape[1], 'image')} are NaN or infinite; expected finite "
                "features: check the weights and the preprocessing (mean, std)"
            )
        self.images += norms.shape[1]
        self.tokens += norms.shape[1] * norms.shape[2]
        self.smallest = np.minimum(self.smallest, norms.min(axis=(1, 2)))
        self.largest = np.maximum(self.largest, norms.max(axis=(1, 2)))
        self._of_tokens += _counted(norms)
        self._of_largest += _counted(norms.max(axis=2))

    def quantile(self, layer: int, q: float) -> float:
        """The norm that a share ``q`` of the patches does not exceed, within 0.5 %."""
        return self._rank(layer, max(1, math.ceil(q * self.tokens)), self._of_tokens[layer])

    def median_above(self, layer: int, norm: float) -> float:
        """Median of the norms above ``norm``, within 0.5 %; ``norm`` itself if there are none."""
        counts = self._of_tokens[layer].copy()
        counts[: _bin_from(norm)] = 0
        total = int(counts.sum())
        return self._rank(layer, (total + 1) // 2, counts) if total else norm

    def tokens_above(self, layer: int, norm: float) -> int:
        """How many patches lie above ``norm`` (exact where :func:`on_edge` made it)."""
        return int(self._of_tokens[layer, _bin_from(norm) :].sum())

    def images_above(self, layer: int, norm: float) -> int:
        """How many images have a patch above ``norm``."""
        return int(self._of_largest[layer, _bin_from(norm) :].sum())

    def _rank(self, layer: int, rank: int, counts: NDArray[np.int64]) -> float:
        index = int(np.searchsorted(np.cumsum(counts), rank))
        centre = 10.0 ** (_LOWEST + (index + 0.5) / _PER_DECADE)
        return float(min(max(centre, self.smallest[layer]), self.largest[layer]))


def on_edge(norm: float) -> float:
    """``norm`` rounded up to the edge of a bin, so that counts above it are exact."""
    return float(10.0 ** (_LOWEST + _bin_from(norm) / _PER_DECADE))


def _bin_from(norm: float) -> int:
    """First bin whose norms are all above ``norm`` (itself an edge up to rounding)."""
    if norm <= 0:
        return 0
    position = (math.log10(norm) - _LOWEST) * _PER_DECADE
    return min(max(math.ceil(position - 1e-6), 0), _BINS)


def _counted(norms: NDArray[np.floating]) -> NDArray[np.int64]:
    """Counts by bin along the first axis: (L, ...) to (L, bins). Norms beyond go to the ends."""
    L = norms.shape[0]
    with np.errstate(divide="ignore"):
        position = (np.log10(norms.astype(np.float64)) - _LOWEST) * _PER_DECADE
    bins = np.clip(np.floor(position), 0, _BINS - 1).astype(np.int64).reshape(L, -1)
    flat = (bins + np.arange(L)[:, None] * _BINS).ravel()
    return np.bincount(flat, minlength=L * _BINS).reshape(L, _BINS)
