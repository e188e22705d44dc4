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
in medians; among layers within 10 % of it the first. Outliers are written over a few layers and
then carried along while the ordinary norms grow, so that is where the writing has just finished:
earlier, writers would be missed; later, units that only read outliers join in. The last block,
where some models take the outliers away again, does not win.

Checked against the norms that are published or reported for released models (DINOv2-L: ordinary
50, outliers 150 to 600; OpenCLIP-B/16: 15 to 20 against 100 to 150; InternViT-6B: 332 against
7000; CLIP-B/16: 14 against 80; DINOv2-B: above), see the tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regraft.errors import InputError, ModelError
from regraft_export.finding.norms import NormStatistics, on_edge

STANDS_OUT = 3.0
SPREADS = 5.0
MIN_SHARE, MAX_SHARE = 0.0005, 0.15
MIN_TOKENS = 3
MIN_IMAGES, MIN_IMAGE_SHARE = 2, 0.05
TIE = 0.90

_NORMAL_Q85 = 1.0364  # 85 % quantile of the standard normal distribution


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
        profile: every layer, judged by the rule; the detection layer by ``threshold``, which may
            have been set by hand.
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
    by_rule = [judge_layer(stats, i) for i in range(stats.layers)]
    judged = by_rule
    if threshold is not None:
        judged = [judge_layer(stats, i, threshold) for i in range(stats.layers)]
    judged = [entry for entry in judged if layer in (None, entry.layer)]
    among = [entry for entry in judged if entry.shown]
    if threshold is not None and layer is None:
        # Norms grow with depth: a fixed threshold may call every patch of the last layers one.
        among = [entry for entry in among if entry.share <= MAX_SHARE]
    if not among:
        raise ModelError(_nothing_found(stats, judged, threshold))
    most = max(entry.excess for entry in among)
    chosen = next(entry for entry in among if entry.excess >= TIE * most)
    by_rule[chosen.layer] = chosen
    return Detection(chosen.layer, chosen.threshold, tuple(by_rule))


def _nothing_found(
    stats: NormStatistics, judged: Sequence[LayerNorms], threshold: float | None
) -> str:
    best = max(judged, key=lambda entry: (entry.excess, entry.largest / entry.median))
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
        f"patches, in at least {MIN_IMAGE_SHARE:.0%} of the images (and {MIN_IMAGES}), to lie that "
        f"far out ({STANDS_OUT:g} times the median, further where norms are widely spread); there "
        "is nothing to patch (--threshold and --detection-layer set both by hand)"
    )
