"""Fingerprints: a rounded or transposed weight is accepted, another one refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from regraft_export.finding.fingerprint import TOLERANCE, difference, fingerprint, matches

DRAW = np.random.default_rng(0)
WEIGHT = DRAW.standard_normal((768, 192)).astype(np.float32) * 0.02
BIAS = DRAW.standard_normal(192).astype(np.float32) * 0.1
PRINT = fingerprint(WEIGHT, BIAS)


def rounded(values: NDArray[np.float32], dtype: torch.dtype) -> NDArray[np.float32]:
    return torch.from_numpy(values).to(dtype).float().numpy()


def test_same_weight_matches_exactly() -> None:
    assert difference(PRINT, WEIGHT, BIAS) == 0
    assert matches(json.loads(json.dumps(PRINT)), WEIGHT, BIAS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weight_is_accepted(dtype: torch.dtype) -> None:
    apart = difference(PRINT, rounded(WEIGHT, dtype), rounded(BIAS, dtype))
    assert 0 < apart < TOLERANCE / 2


def test_transposed_weight_is_accepted() -> None:
    assert difference(PRINT, np.ascontiguousarray(WEIGHT.T), BIAS) == 0


def test_unknown_bias_is_not_compared() -> None:
    assert matches(PRINT, WEIGHT, None)
    assert matches(fingerprint(WEIGHT, None), WEIGHT, BIAS)


@pytest.mark.parametrize("change", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fine_tune_is_refused(change: float, dtype: torch.dtype) -> None:
    step = DRAW.standard_normal(WEIGHT.shape).astype(np.float32)
    step *= change * np.linalg.norm(WEIGHT) / np.linalg.norm(step)
    assert not matches(PRINT, rounded(WEIGHT + step, dtype), BIAS)


def test_change_of_the_bias_alone_is_refused() -> None:
    assert not matches(PRINT, WEIGHT, BIAS + 0.02)


def test_rescaled_weight_is_refused() -> None:
    assert not matches(PRINT, WEIGHT * 1.01, BIAS)


def test_change_of_one_row_is_refused() -> None:
    changed = WEIGHT.copy()
    changed[5] = 0
    assert not matches(PRINT, changed, BIAS)


def test_other_shapes_and_values_are_refused() -> None:
    assert difference(PRINT, WEIGHT[:, :100], BIAS[:100]) == float("inf")
    assert difference(PRINT, WEIGHT[None], BIAS) == float("inf")
    broken = WEIGHT.copy()
    broken[0, 0] = np.nan
    assert not matches(PRINT, broken, BIAS)


def test_another_number_of_projections_is_refused() -> None:
    numbers = PRINT["projections"]
    for other in (numbers[:1], numbers[:2], [], [numbers], numbers[0]):
        assert difference({**PRINT, "projections": other}, WEIGHT, None) == float("inf")
    short = {**PRINT["bias"], "projections": PRINT["bias"]["projections"][:1]}
    assert difference({**PRINT, "bias": short}, WEIGHT, BIAS) == float("inf")
    assert difference({**PRINT, "bias": {**short, "norm": 0}}, WEIGHT, BIAS * 0) == float("inf")


def test_a_bias_that_is_not_finite_is_refused() -> None:
    assert difference(PRINT, WEIGHT, BIAS * np.nan) == float("inf")


@settings(max_examples=25, deadline=None)
@given(hidden=st.integers(4, 60), width=st.integers(2, 40), seed=st.integers(0, 99))
def test_any_pair_of_random_weights_is_told_apart(hidden: int, width: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    shape = (max(hidden, width + 1), width)
    one, other = draw.standard_normal(shape), draw.standard_normal(shape)
    assert matches(fingerprint(one, None), one.T)
    assert not matches(fingerprint(one, None), other)


def test_numbers_are_the_same_everywhere() -> None:
    # Written down once: the signs come from raw bits, which numpy promises never to change.
    got = fingerprint(np.arange(12, dtype=np.float64).reshape(4, 3), np.array([1.0, 2.0, 4.0]))
    assert got["shape"] == [4, 3]
    assert got["norm"] == 22.49444
    assert got["projections"][:4] == [14.0, 36.0, 12.0, 20.0]
    assert got["bias"]["projections"][:4] == [-7.0, 7.0, -7.0, 1.0]
