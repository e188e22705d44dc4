"""The pipeline: order, bounds, failures, and that its threads go away."""

from __future__ import annotations

import io
import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

import regraft.pipeline
from regraft.errors import ImageError, InputError, RegraftError
from regraft.images import decode
from regraft.pipeline import Failure, batches, default_workers
from regraft.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((8, 12), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "exact", (8, 12))


def flat(value: int) -> np.ndarray:
    """A picture whose preprocessed value says which one it was."""
    return np.full((5, 7, 3), value, np.uint8)


def values(pixels: np.ndarray) -> list[int]:
    return [int(v) for v in np.round(pixels[:, 0, 0, 0] * 255)]


def decoding_threads() -> int:
    return sum(t.name.startswith("regraft-decode") for t in threading.enumerate())


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
@pytest.mark.parametrize("count", [0, 1, 12, 13])
def test_batches_are_full_and_in_order(count: int, batch_size: int, workers: int) -> None:
    got = list(batches([flat(i) for i in range(count)], PREPROCESSING, batch_size, workers))
    sizes = [len(batch.pixels) for batch in got]
    assert sizes == [batch_size] * (count // batch_size) + [count % batch_size] * bool(
        count % batch_size
    )
    assert [i for batch in got for i in batch.indices] == list(range(count))
    for batch in got:
        assert batch.pixels.dtype == np.float32
        assert batch.pixels.flags.c_contiguous
        assert batch.pixels.shape[1:] == (3, 8, 12)
        assert values(batch.pixels) == list(batch.indices)


def test_order_does_not_depend_on_which_picture_is_ready_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow_at_first(item: np.ndarray, **options: object) -> Image.Image:
        time.sleep(0.03 if int(item[0, 0, 0]) % 3 == 0 else 0)
        return decode(item)

    monkeypatch.setattr(regraft.pipeline, "decode", slow_at_first)
    got = list(batches([flat(i) for i in range(12)], PREPROCESSING, 4, 4))
    assert [values(batch.pixels) for batch in got] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_every_kind_of_source(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(flat(9)).save(path)
    sources = [path, str(path), path.read_bytes(), Image.fromarray(flat(9)), flat(9)]
    (batch,) = batches(sources, PREPROCESSING, 8)
    assert values(batch.pixels) == [9] * 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_one_lazy_picture_given_many_times(kind: str) -> None:
    large = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(large).save(buffer, kind)
    (single,) = batches([buffer.getvalue()], PREPROCESSING, 1)

    def run(shared: Image.Image) -> np.ndarray:
        return np.concatenate([b.pixels for b in batches([shared] * 6, PREPROCESSING, 4, 4)])

    with ThreadPoolExecutor(2) as executor:
        for pixels in executor.map(run, [Image.open(buffer)] * 2):
            assert len(pixels) == 6
            assert (pixels == single.pixels).all()


def test_a_buffer_may_be_filled_anew() -> None:
    def frames() -> Iterator[np.ndarray]:
        frame = flat(0)
        for i in range(50):
            frame[:] = i
            yield frame

    got = batches(frames(), PREPROCESSING, 4, 3)
    assert [v for batch in got for v in values(batch.pixels)] == list(range(50))


def test_frames_of_an_animation_are_pictures_of_their_own() -> None:
    first, *others = (Image.fromarray(flat(value)) for value in (0, 100, 200))
    buffer = io.BytesIO()
    first.save(buffer, "PNG", save_all=True, append_images=others)
    (batch,) = batches(ImageSequence.Iterator(Image.open(buffer)), PREPROCESSING, 4, 2)
    assert values(batch.pixels) == [0, 100, 200]


def test_pictures_that_cannot_be_loaded_fail_in_their_turn() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        buffer, "PNG"
    )
    cut = Image.open(io.BytesIO(buffer.getvalue()[:5000]))
    huge, failures = Image.new("RGB", (50, 50)), list[Failure]()
    items = [flat(0), cut, flat(2), huge]
    (batch,) = batches(items, PREPROCESSING, 4, 2, on_error=failures.append, max_pixels=2000)
    assert batch.indices == (0, 2)
    assert [failure.index for failure in failures] == [1, 3]
    stream = batches(items, PREPROCESSING, 1, 2)
    assert next(stream).indices == (0,)
    with pytest.raises(ImageError, match="cannot be decoded"):
        next(stream)
    assert decoding_threads() == 0


def test_failures_are_collected_and_leave_batches_full(tmp_path: Path) -> None:
    text, empty = tmp_path / "text.jpg", tmp_path / "empty.jpg"
    text.write_text("not an image")
    empty.touch()
    items = [text, flat(1), flat(2), empty, flat(4), flat(5), flat(6), b"", tmp_path / "none.png"]
    failures: list[Failure] = []
    got = list(batches(items, PREPROCESSING, 2, 2, on_error=failures.append))
    assert [batch.indices for batch in got] == [(1, 2), (4, 5), (6,)]
    assert [values(batch.pixels) for batch in got] == [[1, 2], [4, 5], [6]]
    assert failures == [
        Failure(0, str(text), f"{text}: is not an image file that Pillow reads"),
        Failure(3, str(empty), f"{empty}: is empty (0 bytes)"),
        Failure(7, "a picture given as bytes", "a picture given as bytes: is empty (0 bytes)"),
        Failure(8, str(tmp_path / "none.png"), f"{tmp_path / 'none.png'}: no such file"),
    ]


def test_failures_alone_give_no_batch() -> None:
    failures: list[Failure] = []
    assert list(batches([b"x", b"y"], PREPROCESSING, 2, on_error=failures.append)) == []
    assert [failure.index for failure in failures] == [0, 1]


def test_without_on_error_the_first_failure_raises_after_the_batches_before_it() -> None:
    stream = batches([flat(0), flat(1), flat(2), b"", flat(4)], PREPROCESSING, 2, 2)
    assert next(stream).indices == (0, 1)
    with pytest.raises(ImageError, match=r"a picture given as bytes: is empty \(0 bytes\)"):
        next(stream)
    assert decoding_threads() == 0


def test_endless_input_is_read_two_batches_ahead_at_most() -> None:
    read = itertools.count()
    last = -1

    def endless() -> Iterator[np.ndarray]:
        nonlocal last
        for last in read:
            yield flat(last % 256)

    stream = batches(endless(), PREPROCESSING, 3, 2)
    for turn in range(1, 40):
        batch = next(stream)
        assert values(batch.pixels) == [i % 256 for i in batch.indices]
        assert last + 1 <= 3 * turn + 2 * 3
    stream.close()
    assert decoding_threads() == 0


def test_at_most_two_batches_are_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the pictures begun and not consumed: two batches, and the one being consumed."""
    lock, started, most, consumed = threading.Lock(), 0, 0, 0

    def counting(item: np.ndarray, **options: object) -> Image.Image:
        nonlocal started, most
        with lock:
            started += 1
            most = max(most, started - consumed)
        return decode(item)

    monkeypatch.setattr(regraft.pipeline, "decode", counting)
    for batch in batches((flat(i) for i in range(40)), PREPROCESSING, 4, 3):
        time.sleep(0.01)  # the workers get as far ahead as they may
        consumed += len(batch.pixels)
    assert started == 40
    assert 8 < most <= 12


def test_workers_go_on_while_a_batch_is_consumed(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Semaphore(0)

    def telling(item: np.ndarray, **options: object) -> Image.Image:
        done.release()
        return decode(item)

    monkeypatch.setattr(regraft.pipeline, "decode", telling)
    stream = batches([flat(i) for i in range(9)], PREPROCESSING, 3, 1)
    next(stream)
    for _ in range(9):
        assert done.acquire(timeout=5)
    stream.close()


@pytest.mark.parametrize("started", [0, 1])
def test_a_thread_that_cannot_be_started_is_one_error(
    monkeypatch: pytest.MonkeyPatch, started: int
) -> None:
    start, left = threading.Thread.start, itertools.count(started, -1)

    def limited(self: threading.Thread) -> None:
        if next(left) <= 0:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RegraftError) as caught:
        list(batches([flat(i) for i in range(9)], PREPROCESSING, 3, 4))
    assert str(caught.value).startswith(
        "no thread can be started to decode images (can't start new thread); expected up to 4: end "
    )
    assert decoding_threads() == 0


def test_another_refusal_of_the_executor_is_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    with pytest.raises(RuntimeError, match="after interpreter shutdown") as caught:
        list(batches([flat(0)], PREPROCESSING, 3, 4))
    assert not isinstance(caught.value, RegraftError)


def test_closing_early_stops_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def slow(item: np.ndarray, **options: object) -> Image.Image:
        begun.append(int(item[0, 0, 0]))
        time.sleep(0.01)
        return decode(item)

    monkeypatch.setattr(regraft.pipeline, "decode", slow)
    stream = batches((flat(i % 256) for i in itertools.count()), PREPROCESSING, 50, 2)
    next(stream)
    stream.close()
    assert decoding_threads() == 0
    assert len(begun) < 150, "pictures that nobody waits for are not decoded"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaving_the_loop_by_an_exception_stops_the_threads(error: type[BaseException]) -> None:
    def consume() -> None:
        for _ in batches((flat(i % 256) for i in itertools.count()), PREPROCESSING, 2, 2):
            raise error

    with pytest.raises(error):
        consume()
    assert decoding_threads() == 0


def test_errors_of_the_input_and_of_our_own_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield flat(0)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(batches(broken(), PREPROCESSING, 1))

    def bug(item: object, **options: object) -> Image.Image:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(regraft.pipeline, "decode", bug)
    failures: list[Failure] = []
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(batches([flat(0)], PREPROCESSING, 1, on_error=failures.append))
    assert failures == []
    assert decoding_threads() == 0


def test_options_reach_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    def spy(item: object, **options: object) -> Image.Image:
        seen.append(options)
        return decode(item, **options)

    monkeypatch.setattr(regraft.pipeline, "decode", spy)
    list(batches([flat(0)], PREPROCESSING, 1, draft=True, max_pixels=50))
    list(batches([flat(0)], PREPROCESSING, 1))
    assert seen == [
        {"max_pixels": 50, "draft_for": PREPROCESSING},
        {"max_pixels": 89_478_485, "draft_for": None},
    ]


@pytest.mark.parametrize(
    ("batch_size", "workers", "message"),
    [(0, 1, "batch_size is 0; expected at least 1"), (1, 0, "workers is 0; expected at least 1")],
)
def test_bad_options_are_refused_at_once(batch_size: int, workers: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        batches([], PREPROCESSING, batch_size, workers)
    assert str(caught.value) == message


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_default_workers_respect_affinity() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert default_workers() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert default_workers() == len(before)
