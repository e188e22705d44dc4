from __future__ import annotations

import itertools

import numpy as np
import pytest

from regraft.timing import Ratio, Times, race


def test_the_order_changes_every_round() -> None:
    runs: list[str] = []
    names = ["a", "b", "c"]
    times = race({n: lambda n=n: runs.append(n) for n in names}, seconds=0, rounds=8)
    timed = runs[6:]  # after two warm-up runs each
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) == 8
    assert all(sorted(order) == names for order in rounds)
    assert all(first != second for first, second in itertools.pairwise(rounds))
    assert all(len(times[name].seconds) == 8 for name in names)


def test_two_rivals_take_turns_and_one_runs_alone() -> None:
    runs: list[str] = []
    race({n: lambda n=n: runs.append(n) for n in "ab"}, seconds=0, rounds=4)
    assert "".join(runs[4:]) in ("abbaabba", "baabbaab")
    assert len(race({"a": lambda: None}, seconds=0, rounds=3)["a"].seconds) == 3


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    return clock


def test_slow_is_measured_as_slow(clock: Clock) -> None:
    rivals = {"slow": lambda: clock.sleep(6), "fast": lambda: clock.sleep(2)}
    times = race(rivals, seconds=0, rounds=15)
    assert times["slow"].seconds.tolist() == [6] * 15
    assert (times["fast"].median, times["fast"].p99) == (2, 2)
    assert Ratio.of(times["slow"], times["fast"]) == Ratio(3, 3, 3)


def test_the_check_is_off_the_clock(clock: Clock) -> None:
    times = race(
        {"a": lambda: clock.sleep(2)}, seconds=0, rounds=3, check=lambda *_: clock.sleep(50)
    )
    assert times["a"].seconds.tolist() == [2, 2, 2]


def test_spread_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    noisy = Times(1 + 0.2 * rng.random(40))
    ratio = Ratio.of(noisy, Times(np.ones(40)))
    assert 1 < ratio.low < ratio.median < ratio.high < 1.2


def test_checks_see_every_timed_result() -> None:
    seen = []
    race(
        {"a": lambda: 1},
        seconds=0,
        rounds=3,
        check=lambda name, result: seen.append((name, result)),
    )
    assert seen == [("a", 1)] * 3


def test_it_goes_on_until_time_is_up(clock: Clock) -> None:
    times = race({"a": lambda: clock.sleep(1), "b": lambda: clock.sleep(1)}, seconds=10, rounds=2)
    assert len(times["a"].seconds) == 5
    assert len(race({"a": lambda: clock.sleep(1)}, seconds=1, rounds=7)["a"].seconds) == 7


def test_the_ratio_is_taken_round_by_round() -> None:
    drift = np.linspace(1, 5, 40)  # a machine that slows down
    ratio = Ratio.of(Times(drift * 1.01), Times(drift))
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.01, 1.01, 1.01))
