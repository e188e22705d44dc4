"""The runner's bookkeeping, over a fake CUDA runtime and a fake engine; nothing runs on a card."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support import fake_tensorrt as fake

from regraft.engines.buckets import buckets, pieces
from regraft.engines.cuda_runtime import Cuda
from regraft.engines.tensorrt.runner import Runner
from regraft.errors import EngineError

OUTPUTS = ["pooler_output", "last_hidden_state"]


def opened(
    engine: fake.Engine | None = None, *, graphs: bool = True
) -> tuple[Runner, fake.Engine, fake.Cudart]:
    engine = engine or fake.Engine(fake.Cudart())
    return Runner(engine, fake.module({}), Cuda(engine.cudart), graphs), engine, engine.cudart


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("smallest", "largest", "expected"),
    [
        (1, 1, (1,)),
        (1, 8, (1, 2, 4, 8)),
        (1, 6, (1, 2, 4, 6)),
        (3, 20, (3, 4, 8, 16, 20)),
        (5, 5, (5,)),
        (4, 4, (4,)),
    ],
)
def test_buckets_are_powers_of_two_and_both_ends(
    smallest: int, largest: int, expected: tuple[int, ...]
) -> None:
    assert buckets(smallest, largest) == expected


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 300))
def test_pieces_cover_a_batch_once_with_the_smallest_bucket_that_holds(
    smallest: int, more: int, count: int
) -> None:
    sizes = buckets(smallest, smallest + more)
    found = list(pieces(count, sizes))
    covered = list(itertools.chain(*(range(start, stop) for start, stop, _ in found)))
    assert covered == list(range(count))
    for start, stop, bucket in found:
        assert bucket >= stop - start
        assert all(size < stop - start for size in sizes if size < bucket)
    assert all(bucket == sizes[-1] for _, _, bucket in found[:-1])


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("batches", [(1, 4, 6), (3, 4, 6), (2, 2, 2)])
def test_every_batch_gives_its_own_images_features(
    batches: tuple[int, int, int], graphs: bool
) -> None:
    runner, engine, cudart = opened(fake.Engine(fake.Cudart(), batches), graphs=graphs)
    kept = []
    for count in (1, 5, 2, 6, 13, 3, 1):
        pixels = images(count, seed=count)
        results = runner.run(pixels, OUTPUTS)
        kept.append((pixels, results))
        assert [r.dtype for r in results] == [np.float32, np.float32]
    # Owned by the caller: later runs change nothing in earlier results.
    for pixels, results in kept:
        for name, result in zip(OUTPUTS, results, strict=True):
            np.testing.assert_array_equal(result, fake.right(pixels, name))
    assert {batch for batch, _ in engine.executed} <= set(runner.sizes)
    assert any(recorded for _, recorded in engine.executed) == graphs
    runner.close()
    runner.close()
    assert cudart.live == 0


def test_a_bucket_is_recorded_once_and_then_replayed() -> None:
    runner, engine, cudart = opened()
    for seed in range(4):
        runner.run(images(3, seed), OUTPUTS)
    assert engine.executed == [(4, False), (4, True)]
    assert cudart.calls["cudaGraphLaunch"] == 4
    runner.run(images(2), OUTPUTS)
    assert engine.executed[2:] == [(2, False), (2, True)]
    assert cudart.calls["cudaMalloc"] == 1 + len(fake.SHAPES)  # all of it at the start


@pytest.mark.parametrize("graphs", [True, False])
def test_the_card_times_itself(graphs: bool) -> None:
    runner, engine, cudart = opened(graphs=graphs)
    runner.run(images(3), OUTPUTS)
    before, copies = len(engine.executed), cudart.calls["cudaMemcpyAsync"]
    # The fake's clock: one millisecond for each piece of work.
    assert runner.device_seconds(3, 4) == 1e-3
    largest = runner.sizes[-1]
    runner.run(images(largest), OUTPUTS)
    assert runner.device_seconds(2 * largest, 2) == 2e-3  # two pieces
    assert cudart.calls["cudaMemcpyAsync"] == copies + 1 + len(OUTPUTS)
    assert (len(engine.executed) > before + 4) is not graphs  # replayed, not started anew


def test_padding_is_zero_whatever_ran_before() -> None:
    runner, engine, _ = opened(graphs=False)
    runner.run(images(6), OUTPUTS)
    runner.run(images(5), OUTPUTS)
    assert engine.padding[0] > 0
    assert engine.padding[1] == 0


def test_only_what_is_asked_for_is_copied_back() -> None:
    runner, _, cudart = opened()
    runner.run(images(3), ["pooler_output"])
    assert cudart.copied == [("in", 4 * 4 * 3 * 8 * 8), ("out", 3 * 4 * 4)]
    cudart.copied.clear()
    assert runner.run(images(3), []) == []
    assert [direction for direction, _ in cudart.copied] == ["in"]


def test_without_a_recording_it_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    engine = fake.Engine(fake.Cudart())
    engine.refuses_capture = True
    runner, _, cudart = opened(engine)
    with caplog.at_level(logging.WARNING, "regraft"):
        for count in (3, 2, 3):
            pixels = images(count)
            np.testing.assert_array_equal(
                runner.run(pixels, OUTPUTS)[0], fake.right(pixels, "pooler_output")
            )
    assert caplog.text.count("works without CUDA graphs") == 1
    assert not runner.graphs
    assert cudart.calls["cudaStreamBeginCapture"] == cudart.calls["cudaStreamEndCapture"] == 1
    runner.close()
    assert cudart.live == 0


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaGraphInstantiate"])
def test_a_recording_that_fails_is_given_up(call: str) -> None:
    runner, _, cudart = opened()
    cudart.fails[call] = fake.Status.cudaErrorLaunchFailure
    pixels = images(3)
    np.testing.assert_array_equal(
        runner.run(pixels, OUTPUTS)[1], fake.right(pixels, "last_hidden_state")
    )
    assert not runner.graphs
    assert cudart.calls["cudaGraphLaunch"] == 0
    runner.close()
    assert cudart.live == 0


@pytest.mark.parametrize("memory", [1000, 5000, 9000])
def test_too_little_memory_is_one_clear_error_and_leaks_nothing(memory: int) -> None:
    cudart = fake.Cudart()
    cudart.memory = memory
    with pytest.raises(
        EngineError,
        match=r"^tensorrt: cudaMalloc failed \(cudaErrorMemoryAllocation: the text of "
        r"cudaErrorMemoryAllocation\); free memory on the card, or build with a smaller max-batch$",
    ):
        opened(fake.Engine(cudart))
    assert cudart.live == 0


def test_a_lost_card_is_one_clear_error() -> None:
    runner, _, cudart = opened()
    runner.run(images(2), OUTPUTS)
    cudart.fails["cudaGraphLaunch"] = fake.Status.cudaErrorLaunchFailure
    with pytest.raises(EngineError, match=r"cudaGraphLaunch failed .*restart the process"):
        runner.run(images(2), OUTPUTS)
    # Nothing can be freed any more either, and that must not take the error's place.
    for call in ("cudaGraphExecDestroy", "cudaFree", "cudaFreeHost", "cudaStreamDestroy"):
        cudart.fails[call] = fake.Status.cudaErrorLaunchFailure
    runner.close()
    assert not cudart.fails


def test_a_context_that_cannot_be_had_is_an_error() -> None:
    engine = fake.Engine(fake.Cudart())
    engine.refuses_context = True
    with pytest.raises(EngineError, match="no execution context could be created"):
        opened(engine)[0].run(images(1), OUTPUTS)


def test_a_plan_of_another_type_is_refused() -> None:
    engine = fake.Engine(fake.Cudart())
    engine.dtypes["pooler_output"] = "HALF"
    with pytest.raises(EngineError, match="expected pixel_values and outputs, all FLOAT"):
        opened(engine)
    assert engine.cudart.live == 0
