"""One row of ``regraft bench``: a batch timed on the patched graph and on its baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.bundle import Bundle
from regraft.engines import Engine
from regraft.errors import GateError
from regraft.extractor import Extractor
from regraft.features import Features
from regraft.timing import Ratio, compare, race

_TURN = 0.005  # seconds of runs in a row on the device: what it takes to start them is hidden
_TOLERANCE = 1e-5  # relative to the largest value; the same graph on the same pixels


@dataclass(frozen=True)
class OnDevice:
    """Computing alone, by the device's own clock, nothing copied; milliseconds per run."""

    rounds: int
    baseline_ms: float
    patched_ms: float
    ratio: Ratio


@dataclass(frozen=True)
class Row:
    """The figures of one batch size; times in milliseconds per run.

    ``on_device`` is None for an engine whose device has no clock (:attr:`EngineKind.has_clock`).
    """

    batch: int
    rounds: int
    baseline_ms: float
    baseline_p99_ms: float
    patched_ms: float
    patched_p99_ms: float
    ratio: Ratio
    baseline_images_per_second: float
    patched_images_per_second: float
    on_device: OnDevice | None


def measure(
    bundle: Bundle,
    baseline: Engine,
    patched: Engine,
    pixels: NDArray[np.float32],
    seconds: float,
    rounds: int,
) -> Row:
    """Times one batch on both engines and checks what they return.

    Args:
        bundle: where both graphs come from.
        baseline: opened on the graph ``baseline``.
        patched: opened on the graph ``model``.
        pixels: preprocessed images, float32 (B, 3, H, W).
        seconds: how long to measure; half of it on the device alone, if that has a clock.
        rounds: how many rounds at least.

    Raises:
        GateError: a timed run returned something else than the extractor.
    """
    # Both give what the baseline has, so that the register's own output is not counted against it.
    names = list(baseline.outputs)
    expected = {
        "baseline": _features(bundle, baseline.run(pixels, names)),
        "patched": Extractor(bundle, patched).run(pixels).arrays(),
    }

    def check(name: str, outputs: Any) -> None:
        _expect_equal(name, _features(bundle, outputs), expected[name])

    share = seconds / 2 if patched.has_clock else seconds
    times = race(
        {
            "baseline": lambda: baseline.run(pixels, names),
            "patched": lambda: patched.run(pixels, names),
        },
        seconds=share,
        rounds=rounds,
        check=check,
    )
    before, after = times["baseline"], times["patched"]
    return Row(
        batch=len(pixels),
        rounds=len(before.seconds),
        baseline_ms=before.median * 1e3,
        baseline_p99_ms=before.p99 * 1e3,
        patched_ms=after.median * 1e3,
        patched_p99_ms=after.p99 * 1e3,
        ratio=Ratio.of(after, before),
        baseline_images_per_second=len(pixels) / before.median,
        patched_images_per_second=len(pixels) / after.median,
        on_device=(
            _on_device(baseline, patched, len(pixels), share, rounds) if patched.has_clock else None
        ),
    )


def _on_device(
    baseline: Engine, patched: Engine, batch: int, seconds: float, rounds: int
) -> OnDevice:
    """Both in turn, on the images that were run last."""
    # As many runs for both, so that neither is compared at another warmth or clock.
    runs = max(1, round(_TURN / baseline.device_seconds(batch, 3)))
    times = compare(
        {
            "baseline": lambda: baseline.device_seconds(batch, runs),
            "patched": lambda: patched.device_seconds(batch, runs),
        },
        seconds=seconds,
        rounds=rounds,
    )
    before, after = times["baseline"], times["patched"]
    return OnDevice(
        len(before.seconds), before.median * 1e3, after.median * 1e3, Ratio.of(after, before)
    )


def _features(bundle: Bundle, outputs: Any) -> dict[str, NDArray[np.float32]]:
    count = len(next(iter(outputs.values())))
    return Features.from_outputs(outputs, bundle.manifest.tokens, range(count)).arrays()


def _expect_equal(
    graph: str,
    got: dict[str, NDArray[np.float32]],
    expected: dict[str, NDArray[np.float32]],
) -> None:
    if not got:
        raise GateError(f"bench: {graph} returned nothing to compare")
    for name, array in got.items():
        want = expected[name]
        if not np.isfinite(array).all():
            raise GateError(f"bench: {name} of {graph} holds NaN or Inf; its time means nothing")
        worst = float(np.abs(array - want).max(initial=0.0))
        limit = _TOLERANCE * float(np.abs(want).max(initial=0.0))
        if worst > limit:
            raise GateError(
                f"bench: {name} of {graph} differs from what the extractor gives by {worst:.3g}; "
                f"expected at most {limit:.3g}; its time means nothing"
            )
