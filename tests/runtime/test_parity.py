from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from regraft.parity import LIMITS, Comparison, Limits, Meter, WorstToken, cosine

LOOSE = Limits(relative_error=10, token_cosine=-1, image_cosine=-1)


def features(seed: int = 0, shape: tuple[int, ...] = (4, 7, 6)) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def compared(
    reference: NDArray[np.float32],
    candidate: NDArray[np.float32],
    output: str = "last_hidden_state",
    limits: Limits = LIMITS["fp32"],
    class_token: bool = True,
) -> Comparison:
    meter = Meter("model", output, class_token)
    meter.update(reference, candidate)
    return meter.result(limits)


def test_the_limits_of_the_design() -> None:
    assert {
        "fp32": Limits(1e-4, 0.9999, 0.999),
        "fp16": Limits(1e-2, 0.995, 0.999),
        "bf16": Limits(2e-2, 0.99, 0.999),
    } == LIMITS


def test_equal_outputs_pass() -> None:
    x = features()
    result = compared(x, x.copy())
    assert (result.graph, result.output, result.images) == ("model", "last_hidden_state", 4)
    assert (result.relative_error, result.finite, result.failures) == (0.0, True, ())
    assert result.token_cosine == pytest.approx(1, abs=1e-12)
    assert result.image_cosine == pytest.approx(1, abs=1e-12)
    assert result.passed
    assert result.to_json()["passed"] is True
    assert result.to_json()["failures"] == []


def test_a_single_bad_token_is_shown_where_the_percentile_hides_it() -> None:
    a = features(0, (6, 150, 6))
    b = a.copy()
    b[4, 33] = -b[4, 33]
    meter = Meter("model", "last_hidden_state", True)
    meter.update(a[:3], b[:3])
    fair = meter.result(LIMITS["fp16"])
    assert fair.worst_token is not None
    assert fair.worst_token.cosine == pytest.approx(1, abs=1e-12)
    meter.update(a[3:], b[3:])
    result = meter.result(Limits(1, 0.995, 0.999))
    assert result.passed
    assert result.token_cosine == pytest.approx(1, abs=1e-12)
    assert result.worst_token == WorstToken(pytest.approx(-1), image=4, token=33)
    assert result.to_json()["worst_token"] == {"cosine": pytest.approx(-1), "image": 4, "token": 33}
    assert compared(a[:, 0], b[:, 0], "pooler_output").worst_token is None


def test_comparing_nothing_is_a_failure() -> None:
    result = Meter("probe", "norms.3", True).result(LIMITS["fp32"])
    assert not result.passed
    assert result.failures == ("probe norms.3: nothing was compared",)
    assert (result.images, result.token_cosine, result.image_cosine) == (0, None, None)


def test_batches_add_up_to_one_frobenius_norm() -> None:
    a, b = features(0, (9, 7, 6)), features(1, (9, 7, 6))
    meter = Meter("model", "hidden.3", True)
    for start, end in ((0, 4), (4, 8), (8, 9)):
        meter.update(a[start:end], b[start:end])
    result = meter.result(LOOSE)
    whole = np.linalg.norm((b - a).astype(np.float64)) / np.linalg.norm(a.astype(np.float64))
    assert result.relative_error == pytest.approx(whole, rel=1e-6)
    assert result.images == 9
    tokens = [
        np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)
        for x, y in zip(a.reshape(-1, 6), b.reshape(-1, 6), strict=True)
    ]
    assert result.token_cosine == pytest.approx(np.percentile(tokens, 1), abs=1e-6)
    assert result.image_cosine is None


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("fp16", 1e-2), ("bf16", 2e-2)])
def test_the_error_may_reach_its_limit_and_no_more(precision: str, error: float) -> None:
    x = features().astype(np.float64)
    limits = LIMITS[precision]
    assert compared(x, x * (1 + 0.99 * error), limits=limits).passed
    failed = compared(x, x * (1 + 1.01 * error), limits=limits)
    assert failed.failures == (
        f"model last_hidden_state: relative error {1.01 * error:.2e}; at most {error:.0e} allowed",
    )


def test_a_few_wrong_tokens_show_in_the_percentile_though_the_error_is_small() -> None:
    x = np.tile(features(0, (1, 1, 6)), (1, 100, 1)).astype(np.float64)
    x[0, 50:] *= 1e6  # the error hides behind large tokens
    y = x.copy()
    y[0, :3] *= -1
    result = compared(x, y, "hidden.1")
    assert result.relative_error < 1e-5
    assert result.failures == (
        "model hidden.1: 1st-percentile token cosine -1.000000; at least 0.9999 needed",
    )
    # One token of a hundred is below the percentile, which interpolates to its neighbour.
    y[0, 1:3] = x[0, 1:3]
    assert compared(x, y, "hidden.1").token_cosine == pytest.approx(1 - 2 * 0.01, abs=1e-9)


def test_the_worst_image_decides_not_a_percentile() -> None:
    x = features(0, (300, 8))
    y = x.copy()
    y[17] = features(1, (8,))
    angle = float(cosine(x[17].astype(np.float64), y[17].astype(np.float64)))
    result = compared(x, y, "pooler_output", Limits(10, 1, 0.999))
    assert result.token_cosine is None
    assert result.failures == (
        f"model pooler_output: smallest image cosine {angle:.6f}; at least 0.999 needed",
    )


def test_cls_is_compared_per_image_where_there_is_one() -> None:
    x = features(0, (3, 50, 6))
    y = x.copy()
    y[1, 0] *= -1
    with_cls = compared(x, y, limits=LOOSE)
    assert with_cls.image_cosine == pytest.approx(-1)
    without = compared(x, y, limits=LOOSE, class_token=False)
    assert without.image_cosine is None
    assert compared(x, y, "hidden.2", LOOSE).image_cosine is None


@pytest.mark.parametrize(
    ("output", "tokens"),
    [
        ("last_hidden_state", True),
        ("hidden.11", True),
        ("test_time_registers", True),
        ("attentions.3", False),
        ("norms.3", False),
        ("pooler_output", False),
    ],
)
def test_which_outputs_are_compared_per_token(output: str, tokens: bool) -> None:
    x = features()
    assert (compared(x, x, output).token_cosine is not None) == tokens


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_one_value_that_is_not_finite_fails(bad: float, side: str) -> None:
    x, y = features(), features()
    (x if side == "reference" else y)[2, 3, 4] = bad
    meter = Meter("baseline", "last_hidden_state", True)
    meter.update(features(), features())
    meter.update(x, y)
    result = meter.result(LIMITS["fp32"])
    assert result.failures == ("baseline last_hidden_state: NaN or infinity",)
    assert (result.finite, result.images) == (False, 8)
    json.dumps(result.to_json(), allow_nan=False)


def test_nothing_but_nan_fails() -> None:
    x = np.full((2, 3, 4), np.nan, np.float32)
    assert compared(x, x).failures == ("model last_hidden_state: NaN or infinity",)


def test_another_shape_fails_and_is_named_once() -> None:
    meter = Meter("model", "last_hidden_state", True)
    for _ in range(3):
        meter.update(features(), features(0, (4, 8, 6)))
    meter.update(features(), features())
    result = meter.result(LIMITS["fp32"])
    assert result.failures == (
        "model last_hidden_state: shape (4, 8, 6); the reference has (4, 7, 6)",
    )


def test_shapes_that_would_broadcast_are_still_different() -> None:
    x = np.ones((4, 7, 6), np.float32)
    assert not compared(x, np.ones((4, 1, 6), np.float32)).passed
    assert not compared(x, np.ones((1, 7, 6), np.float32)).passed


def test_zero_against_something_is_a_failure() -> None:
    zero, one = np.zeros((2, 3, 4), np.float32), np.ones((2, 3, 4), np.float32)
    assert compared(zero, zero).passed
    for a, b in ((zero, one), (one, zero)):
        result = compared(a, b)
        assert len(result.failures) == 3
        assert (result.token_cosine, result.image_cosine) == (0.0, 0.0)
    result = compared(zero, one)
    assert result.failures[0].startswith("model last_hidden_state: relative error ")
    json.dumps(result.to_json(), allow_nan=False)
    json.dumps(compared(zero, 1e30 * one).to_json(), allow_nan=False)


def test_cosine_of_zero_vectors() -> None:
    zero, x = np.zeros(3), np.array([3.0, 4.0, 0.0])
    assert cosine(zero, zero) == 1
    assert cosine(zero, x) == 0
    assert cosine(x, zero) == 0
    assert cosine(x, x) == pytest.approx(1)
    assert cosine(x, -2 * x) == pytest.approx(-1)
    many = cosine(np.stack([zero, x, x]), np.stack([zero, zero, x]))
    assert many.tolist() == pytest.approx([1, 0, 1])


def test_a_cosine_never_leaves_its_range() -> None:
    x = np.random.default_rng(0).normal(size=(1000, 3)) * 1e-3
    assert np.abs(cosine(x, x)).max() <= 1
    assert np.abs(cosine(x, x * 7)).max() <= 1


def test_every_missed_limit_is_named_in_order() -> None:
    x = features(0, (2, 5, 4))
    result = compared(x, -x)
    assert [line.partition(": ")[2].split(";")[0] for line in result.failures] == [
        "relative error 2.00e+00",
        "1st-percentile token cosine -1.000000",
        "smallest image cosine -1.000000",
    ]
