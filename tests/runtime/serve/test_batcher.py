"""The queue in front of an engine, with an engine that the test holds in its hand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence

import numpy as np
import pytest

from regraft.serve.batcher import Answer, Batcher
from regraft.serve.refusals import Kind, Refusal


class Engine:
    """Doubles what it gets, once it may; remembers its batches."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.batches: list[list[float]] = []
        self.outputs: list[Sequence[str]] = []

    def run(self, pixels: np.ndarray, outputs: Sequence[str]) -> Mapping[str, np.ndarray]:
        self.batches.append(pixels.ravel().tolist())
        self.outputs.append(outputs)
        assert self.go.wait(20)
        if 99.0 in pixels:
            raise RuntimeError("the engine failed")
        return {name: np.where(pixels == 13, np.nan, pixels * 2) for name in outputs}


def images(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


Test = Callable[[Engine, Batcher], Awaitable[None]]


def drive(test: Test, preferred: int = 4, delay: float = 0.0) -> Engine:
    engine = Engine()

    async def main() -> None:
        batcher = Batcher(engine.run, preferred, delay)
        try:
            await test(engine, batcher)
        finally:
            engine.go.set()
            await batcher.close()

    asyncio.run(main())
    return engine


def submit(batcher: Batcher, *values: float, patience: float = 30.0) -> asyncio.Task[Answer]:
    loop = asyncio.get_running_loop()
    return loop.create_task(batcher.submit(images(*values), ("y",), "m", loop.time() + patience))


async def busy(engine: Engine, batcher: Batcher) -> asyncio.Task[Answer]:
    first = submit(batcher, 0)
    while not engine.batches:
        await asyncio.sleep(0.001)
    return first


def test_waiting_requests_share_a_run_in_order_and_get_their_own_rows() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        first = await busy(engine, batcher)
        rest = [submit(batcher, *values) for values in ((1, 2), (3,), (4, 5), (6,))]
        await asyncio.sleep(0.05)
        assert batcher.waiting("m") == 4
        engine.go.set()
        answers = [await task for task in (first, *rest)]
        got = [answer.outputs["y"].ravel().tolist() for answer in answers]
        assert got == [[0], [2, 4], [6], [8, 10], [12]]
        assert [answer.first for answer in answers] == [True, True, False, True, False]

    engine = drive(test)
    assert engine.batches == [[0], [1, 2, 3], [4, 5, 6]]


def test_a_request_larger_than_a_preferred_batch_runs_alone() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        first = await busy(engine, batcher)
        tasks = [submit(batcher, *request) for request in ((1,), (2, 3, 4, 5, 6), (7, 8), (9, 10))]
        await asyncio.sleep(0.02)
        engine.go.set()
        await asyncio.gather(first, *tasks)

    assert drive(test).batches == [[0], [1], [2, 3, 4, 5, 6], [7, 8, 9, 10]]


def test_a_delay_fills_the_batch() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        engine.go.set()
        tasks = [submit(batcher, 1)]
        await asyncio.sleep(0.05)
        tasks.append(submit(batcher, 2))
        await asyncio.gather(*tasks)

    assert drive(test, delay=1.0).batches == [[1, 2]]


def test_a_full_batch_does_not_wait_for_the_delay() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        engine.go.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*(submit(batcher, i) for i in range(4)))

    assert drive(test, delay=60.0).batches == [[0, 1, 2, 3]]


def test_who_is_gone_is_passed_over() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        first = await busy(engine, batcher)
        gone, stays = submit(batcher, 1), submit(batcher, 2)
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.sleep(0.02)
        assert batcher.waiting("m") == 1
        engine.go.set()
        await asyncio.gather(first, stays)

    assert drive(test).batches == [[0], [2]]


def test_a_deadline_is_answered_while_the_engine_is_busy() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        first = await busy(engine, batcher)
        late = submit(batcher, 1, patience=0.05)
        with pytest.raises(Refusal, match="Request timeout expired") as caught:
            await late
        assert caught.value.kind is Kind.UNAVAILABLE
        assert not engine.go.is_set()
        engine.go.set()
        await first

    assert drive(test).batches == [[0]]


def test_a_broken_row_is_not_its_neighbours() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        first = await busy(engine, batcher)
        tasks = [submit(batcher, 1), submit(batcher, 13), submit(batcher, 2)]
        await asyncio.sleep(0.02)
        engine.go.set()
        await first
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[1], Refusal)
        assert results[1].kind is Kind.INTERNAL
        assert [r.outputs["y"].item() for r in (results[0], results[2])] == [2, 4]  # type: ignore[union-attr]

    assert drive(test).batches == [[0], [1, 13, 2]]


def test_an_engine_that_fails_is_an_internal_error_and_goes_on() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        engine.go.set()
        with pytest.raises(Refusal, match="the server's log has the details"):
            await submit(batcher, 99)
        assert (await submit(batcher, 1)).outputs["y"].item() == 2

    drive(test)
