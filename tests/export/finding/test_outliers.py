"""Which norms are called outliers: those of real models, and what must not be called so."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from regraft.errors import InputError, ModelError
from regraft_export.finding.norms import NormStatistics, on_edge
from regraft_export.finding.outliers import detect, judge_layer

IMAGES, PATCHES = 64, 256
Layer = tuple[float, float, tuple[float, float] | None]
"""Median of ordinary norms, their log-normal spread, and the range of outlier norms."""


def norms_of(layers: list[Layer], share: float = 0.02, seed: int = 0) -> NDArray[np.float32]:
    """(L, IMAGES, PATCHES): outliers at the same patches in all layers that have some."""
    draw = np.random.default_rng(seed)
    outlier = draw.random((IMAGES, PATCHES)) < share
    rows = []
    for median, spread, outliers in layers:
        norms = median * np.exp(spread * draw.standard_normal((IMAGES, PATCHES)))
        if outliers is not None:
            norms[outlier] = draw.uniform(*outliers, size=int(outlier.sum()))
        rows.append(norms)
    return np.stack(rows).astype(np.float32)


def statistics(norms: NDArray[np.float32]) -> NormStatistics:
    stats = NormStatistics(len(norms))
    for start in range(0, norms.shape[1], 16):
        stats.add(norms[:, start : start + 16])
    return stats


# name: layers, share of outliers, layers that may be chosen, range of the threshold
FACTS: dict[str, tuple[list[Layer], float, set[int], tuple[float, float]]] = {
    # Median about 50, outliers 150 to 600 from block 17 of 24 on, gone in the last block.
    "DINOv2-L": (
        [(20 + i, 0.12, None) for i in range(17)]
        + [(46, 0.12, (150, 320)), (48, 0.12, (170, 450)), (49, 0.12, (200, 600))]
        + [(50, 0.12, (200, 600)), (52, 0.12, (200, 600)), (54, 0.12, (180, 600))]
        + [(48, 0.12, None)],
        0.024,
        {18, 19, 20, 21, 22},
        (100, 200),
    ),
    # Block 8 of 12: median 8.4, largest 428; ordinary patches of its sibling reach 29.
    "DINOv2-B": (
        [(5 + 0.3 * i, 0.25, None) for i in range(6)]
        + [(7.5, 0.25, (80, 200)), (8, 0.25, (150, 420)), (8.4, 0.25, (160, 428))]
        + [(9, 0.25, (160, 430)), (11, 0.25, (160, 430)), (30, 0.25, None)],
        0.01,
        {7, 8, 9},
        (25, 150),
    ),
    # Appear after the MLP of layer 6 of 12; ordinary 15 to 20, outliers about 100 to 150.
    "OpenCLIP-B/16": (
        [(10 + i, 0.2, None) for i in range(6)]
        + [(16, 0.2, (90, 150)), (17, 0.2, (90, 150)), (18, 0.2, (90, 150))]
        + [(19, 0.2, (90, 150)), (20, 0.2, (90, 150)), (22, 0.2, (70, 120))],
        0.015,
        {6, 7},
        (30, 80),
    ),
    # Layer 29 of 45 on: median 332, outliers to 7000, sd 396.
    "InternViT-6B": (
        [(200 + 4 * i, 0.15, None) for i in range(29)]
        + [(332, 0.15, (3000, 7000)) for _ in range(14)]
        + [(400, 0.15, None)] * 2,
        0.008,
        set(range(29, 43)),
        (900, 2500),
    ),
    # Last layer: median 14.3, 99 % quantile 80.
    "CLIP-B/16": (
        [(8, 0.2, None)] * 9 + [(12, 0.2, (55, 80)), (13, 0.2, (60, 85)), (14.3, 0.2, (70, 95))],
        0.02,
        {9, 10, 11},
        (30, 60),
    ),
    # What the shipped ViT is trained for: about six times the median.
    "shipped": (
        [(10, 0.1, None)] * 3 + [(11, 0.1, (30, 50)), (12, 0.1, (65, 80)), (14, 0.1, (65, 80))],
        2 / 144,
        {4},
        (30, 50),
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_norms_of_real_models_show_their_outliers(name: str) -> None:
    layers, share, where, (low, high) = FACTS[name]
    norms = norms_of(layers, share)
    detection = detect(statistics(norms))
    assert detection.layer in where
    assert low < detection.threshold < high
    _, _, outliers = layers[detection.layer]
    assert outliers is not None
    found = norms[detection.layer] > detection.threshold
    assert found.mean() == pytest.approx(share, rel=0.25)
    assert detection.found.tokens == found.sum()
    shown = {entry.layer for entry in detection.profile if entry.shown}
    assert shown == {i for i, layer in enumerate(layers) if layer[2] is not None}


@pytest.mark.parametrize(
    ("spread", "largest_over_median"),
    [(0.02, 1.1), (0.1, 1.6), (0.2, 2.6), (0.35, 4.5), (0.6, 14)],
    ids=["random-vit", "narrow", "two-to-three", "wide", "very-wide"],
)
def test_merely_spread_norms_show_no_outliers(spread: float, largest_over_median: float) -> None:
    norms = norms_of([(10 + i, spread, None) for i in range(12)])
    assert norms.max() / np.median(norms) < 2 * largest_over_median
    with pytest.raises(ModelError, match=r"^no outlier tokens: at layer \d+ .* nothing to patch"):
        detect(statistics(norms))


def test_equal_norms_show_no_outliers() -> None:
    with pytest.raises(ModelError, match=r"largest patch norm is 1\.00 times the median"):
        detect(statistics(np.full((3, 8, 16), 5.0, np.float32)))


def test_zero_features_show_no_outliers() -> None:
    with pytest.raises(ModelError, match="no outlier tokens"):
        detect(statistics(np.zeros((3, 8, 16), np.float32)))


def test_one_odd_image_is_no_reason_to_patch() -> None:
    norms = norms_of([(10, 0.1, None)] * 2)
    norms[1, 7, :40] = 90
    with pytest.raises(ModelError, match=r"40 of 16384 patches in 1 of 64 images"):
        detect(statistics(norms))


def test_a_third_of_the_patches_is_no_exception() -> None:
    norms = norms_of([(10, 0.1, None)] * 2)
    norms[:, :, : PATCHES // 3] *= 8
    with pytest.raises(ModelError, match="no outlier tokens"):
        detect(statistics(norms))


def test_message_has_the_figures() -> None:
    norms = np.full((2, 10, 100), 10.0, np.float32)
    norms[1, :, 0] = 19.0
    with pytest.raises(ModelError) as caught:
        detect(statistics(norms))
    # The median comes from a histogram, so it is known within 0.5 %.
    assert "at layer 1 the largest patch norm is 1.89 times the median (19 against 10.05)" in str(
        caught.value
    )
    assert "expected 0.05% to 15% of the patches" in str(caught.value)


def test_layer_set_by_hand() -> None:
    stats = statistics(norms_of(FACTS["OpenCLIP-B/16"][0]))
    assert detect(stats, layer=9).layer == 9
    with pytest.raises(ModelError, match="no outlier tokens: at layer 2 "):
        detect(stats, layer=2)
    with pytest.raises(InputError, match=r"detection layer is 12; the model has 12 blocks, .* 11"):
        detect(stats, layer=12)


def test_threshold_set_by_hand() -> None:
    stats = statistics(norms_of(FACTS["OpenCLIP-B/16"][0]))
    assert detect(stats, threshold=75).threshold == 75
    assert detect(stats, threshold=75).layer in (6, 7)
    # Below the median of the last layers, so that most patches of these lie above.
    assert detect(stats, threshold=21).found.share < 0.15
    assert detect(stats, threshold=10, layer=11).found.share > 0.9
    # The other layers keep the rule's thresholds.
    by_hand, by_rule = detect(stats, threshold=75, layer=8), detect(stats)
    assert by_hand.found.threshold == 75
    assert by_hand.profile[7] == by_rule.profile[7]
    with pytest.raises(ModelError, match=r"above the threshold 500 that was set"):
        detect(stats, threshold=500)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="expected a norm above 0"):
            detect(stats, threshold=bad)


def test_norms_that_are_not_finite_are_an_error() -> None:
    norms = norms_of([(10, 0.1, None)] * 3)[:, :4]
    norms[1, 2, 3] = np.nan
    norms[2, 2, 3] = np.inf
    with pytest.raises(ModelError, match=r"layer 1: 1 of 1024 patch norms of a batch of 4 images"):
        NormStatistics(3).add(norms)


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(InputError, match="no image could be used"):
        detect(NormStatistics(2))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(2**-10, 1e6, width=32), min_size=1, max_size=200),
    q=st.floats(0.0, 1.0),
)
def test_quantiles_equal_the_exact_ones_within_a_bin(values: list[float], q: float) -> None:
    norms = np.array(values, np.float32)
    stats = NormStatistics(1)
    stats.add(norms[None, None])
    exact = np.sort(norms)[max(1, math.ceil(q * len(norms))) - 1]
    assert stats.quantile(0, q) == pytest.approx(exact, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0.0, 1e6, width=32), min_size=1, max_size=200),
    near=st.floats(1e-3, 1e6),
)
def test_counts_above_an_edge_are_exact(values: list[float], near: float) -> None:
    norms = np.array(values, np.float32)
    stats = NormStatistics(1)
    stats.add(norms[None, :, None])
    edge = on_edge(near)
    assert near <= edge * (1 + 1e-9) <= near * 1.01
    # An edge is a float64; norms that equal it up to float32's rounding may fall either way.
    clear = np.abs(norms / edge - 1) > 1e-6
    low = int((norms[clear] > edge).sum())
    assert low <= stats.tokens_above(0, edge) <= low + int((~clear).sum())
    assert stats.images_above(0, edge) == stats.tokens_above(0, edge)


def test_batches_add_up() -> None:
    norms = norms_of(FACTS["DINOv2-B"][0], 0.01)
    whole, split = NormStatistics(len(norms)), statistics(norms)
    whole.add(norms)
    assert [judge_layer(whole, i) for i in range(12)] == [judge_layer(split, i) for i in range(12)]


def test_memory_does_not_grow_with_images() -> None:
    norms = norms_of([(10, 0.1, None)] * 12)
    stats = NormStatistics(12)
    stats.add(norms)
    tracemalloc.start()
    for _ in range(20):
        stats.add(norms)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stats.images == 21 * IMAGES
    # The histograms are replaced by new ones of the same size: 12 layers of 3072 counts, twice.
    assert kept < 2 * 12 * 3072 * 8 * 1.2
