"""Which layer shows outlier tokens, and above which norm a patch counts as one.

Only norms are looked at: L2 norms of patch tokens at the raw outputs of the blocks (no final norm,
no CLS, no registers), gathered in histograms of fixed size.

The rule, for one layer. Let ``m`` be the median norm and ``s`` the spread of the upper half of the
ordinary patches, ``ln(q85 / m) / 1.036`` (one standard deviation if they were log-normal; outliers
are 1 to 3 % of the tokens, so neither quantile feels them).

1. A norm stands out above ``c = max(3 m, m exp(5 s))``: three times the median, because models
   without outliers reach two to three, and five spreads, because a model whose norms are wide by
   nature has no gap. The paper's mean + 3 sd (arXiv 2506.08010, A.4) is not used: the outliers
   themselves inflate mean and deviation.
2. The threshold is ``max(c, sqrt(m o))``, ``o`` the median of the norms above ``c``: half way in
   the logarithm between ordinary and outlying norms, which keeps clear of an ordinary tail where
   outliers are far away (DINOv2-B: 8 against 430, while ordinary patches reach 29).
3. A layer has outlier tokens if between 0.05 % and 15 % of its patches lie above the threshold, at
   least three of them, in at least two images and 5 % of the images. A single odd image is no
   reason to patch a model, and what a sixth of the patches do is no exception.

The detection layer is the one with the largest ``share * (o / m - 1)``, the excess norm per patch
in medians; among layers within 5 % of it the first. Outliers are written over a few layers and
then carried along while the ordinary norms grow, so that is where the writing has just finished:
earlier, writers would be missed; later, units that only read outliers join in. The last block,
where some models take the outliers away again, does not win.

Checked against the norms that are published or reported for released models (DINOv2-L: ordinary
50, outliers 150 to 600; OpenCLIP-B/16: 15 to 20 against 100 to 150; InternViT-6B: 332 against
7000; CLIP-B/16: 14 against 80; DINOv2-B: above), see the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.errors import InputError, ModelError

STANDS_OUT = 3.0
SPREADS = 5.0
MIN_SHARE, MAX_SHARE = 0.0005, 0.15
MIN_TOKENS = 3
MIN_IMAGES, MIN_IMAGE_SHARE = 2, 0.05
TIE = 0.95

_LOWEST, _HIGHEST = -4, 8  # decimal logarithms of the norms that are told apart
_PER_DECADE = 256  # bins 0.9 % wide
_BINS = (_HIGHEST - _LOWEST) * _PER_DECADE
_NORMAL_Q85 = 1.0364  # 85 % quantile of the standard normal distribution


class NormStatistics:
    """Distribution of patch norms by layer, in memory that no number of images changes.

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
                f"batch of {norms.shape[1]} images are NaN or infinite; expected finite features: "
                "check the weights and the preprocessing (mean, std)"
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


@dataclass(frozen=True)
class LayerNorms:
    """What the norms of one layer say.

    Attributes:
        layer: block, from 0.
        median: of all patches.
        largest: of all patches.
        threshold: above it a patch is an outlier.
        typical: median norm of the outliers (the threshold if there are none).
        tokens: how many outliers.
        share: outliers over patches.
        images: images with at least one.
        shown: whether the rule calls them outlier tokens.
    """

    layer: int
    median: float
    largest: float
    threshold: float
    typical: float
    tokens: int
    share: float
    images: int
    shown: bool

    @property
    def excess(self) -> float:
        """Norm above the median per patch, in medians, that the outliers hold."""
        return self.share * (self.typical / self.median - 1)


@dataclass(frozen=True)
class Detection:
    """Where outlier tokens are told from others.

    Attributes:
        layer: at whose raw output.
        threshold: above which patch norm, strictly.
        profile: every layer, judged by the rule (by the threshold if it was set by hand).
    """

    layer: int
    threshold: float
    profile: tuple[LayerNorms, ...]

    @property
    def found(self) -> LayerNorms:
        """The detection layer's entry of the profile."""
        return self.profile[self.layer]


def judge_layer(stats: NormStatistics, layer: int, threshold: float | None = None) -> LayerNorms:
    """Applies the rule (see the module) to one layer, or a threshold set by hand."""
    median = max(stats.quantile(layer, 0.5), 1e-30)
    by_hand = threshold is not None
    if threshold is None:
        spread = math.log(max(stats.quantile(layer, 0.85), median) / median) / _NORMAL_Q85
        stands_out = median * max(STANDS_OUT, math.exp(min(SPREADS * spread, 50.0)))
        outlying = stats.median_above(layer, stands_out)
        threshold = on_edge(max(stands_out, math.sqrt(median * outlying)))
    tokens, images = stats.tokens_above(layer, threshold), stats.images_above(layer, threshold)
    share = tokens / stats.tokens
    enough_images = images >= max(MIN_IMAGES, MIN_IMAGE_SHARE * stats.images)
    exceptional = MIN_SHARE <= share <= MAX_SHARE and tokens >= MIN_TOKENS and enough_images
    return LayerNorms(
        layer=layer,
        median=median,
        largest=float(stats.largest[layer]),
        threshold=threshold,
        typical=stats.median_above(layer, threshold),
        tokens=tokens,
        share=share,
        images=images,
        shown=tokens > 0 if by_hand else exceptional,
    )


def detect(
    stats: NormStatistics, *, threshold: float | None = None, layer: int | None = None
) -> Detection:
    """Chooses the detection layer and the threshold.

    Args:
        stats: patch norms of all layers.
        threshold: set by hand; then any patch above it is an outlier.
        layer: set by hand.

    Raises:
        InputError: a value set by hand is out of range.
        ModelError: there are no outlier tokens; the message has the figures.
    """
    if stats.images == 0:
        raise InputError("no image could be used for detection; expected at least one")
    if threshold is not None and not 0 < threshold < math.inf:
        raise InputError(f"threshold is {threshold}; expected a norm above 0")
    if layer is not None and not 0 <= layer < stats.layers:
        raise InputError(
            f"detection layer is {layer}; the model has {stats.layers} blocks, so layers run from "
            f"0 to {stats.layers - 1}"
        )
    profile = tuple(judge_layer(stats, i, threshold) for i in range(stats.layers))
    among = [entry for entry in profile if entry.shown and layer in (None, entry.layer)]
    if threshold is not None and layer is None:
        # Norms grow with depth: a fixed threshold may call every patch of the last layers one.
        among = [entry for entry in among if entry.share <= MAX_SHARE]
    if not among:
        raise ModelError(_nothing_found(stats, profile, threshold, layer))
    most = max(entry.excess for entry in among)
    chosen = next(entry for entry in among if entry.excess >= TIE * most)
    return Detection(chosen.layer, chosen.threshold, profile)


def _nothing_found(
    stats: NormStatistics,
    profile: tuple[LayerNorms, ...],
    threshold: float | None,
    layer: int | None,
) -> str:
    seen = [entry for entry in profile if layer in (None, entry.layer)]
    best = max(seen, key=lambda entry: (entry.excess, entry.largest / entry.median))
    figures = (
        f"at layer {best.layer} the largest patch norm is {best.largest / best.median:.2f} times "
        f"the median ({best.largest:.4g} against {best.median:.4g}), and {best.tokens} of "
        f"{stats.tokens} patches in {best.images} of {stats.images} images lie above "
        f"{best.threshold:.4g}"
    )
    if threshold is not None:
        return (
            f"no outlier tokens above the threshold {threshold:.4g} that was set: {figures}; "
            f"expected some, in at most {MAX_SHARE:.0%} of the patches: set another --threshold, "
            "or none"
        )
    return (
        f"no outlier tokens: {figures}; expected {MIN_SHARE:.2%} to {MAX_SHARE:.0%} of the "
        f"patches, in at least {MIN_IMAGE_SHARE:.0%} of the images (and {MIN_IMAGES}), to stand "
        f"out by {STANDS_OUT:g} times the median; there is nothing to patch (--threshold and "
        "--detection-layer set both by hand)"
    )
