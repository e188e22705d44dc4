"""Decoding and preprocessing in worker threads, ahead of whatever consumes the batches.

Pillow releases the GIL while it decodes and resizes, so that threads are enough. Order is the
order of the input. Pictures given in memory are copied, and Pillow images decoded, in the
consumer's thread, so that the caller may share and reuse them. Memory is bounded: besides the batch
that is being consumed, pictures for two batches at most exist, done or in work, however many there
are in all.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.errors import ImageError, InputError, RegraftError
from regraft.images import MAX_PIXELS, ImageSource, decode, name_of, private
from regraft.preprocessing import Preprocessing

_NO_THREAD = "can't start new thread"  # Python's words; the type alone says nothing


@dataclass(frozen=True)
class Failure:
    """A picture that could not be decoded.

    Attributes:
        index: position of the picture in the input, from 0.
        path: its path as messages name it, or what it was given as.
        message: the error's message, one line.
    """

    index: int
    path: str
    message: str


@dataclass(frozen=True)
class Batch:
    """Preprocessed pictures, in input order.

    Attributes:
        pixels: float32 (B, 3, H, W), C-contiguous; every batch but the last has the size asked for.
        indices: position of each picture in the input, from 0, ascending; failures leave gaps.
    """

    pixels: NDArray[np.float32]
    indices: tuple[int, ...]


def default_workers() -> int:
    """One worker per core that this process may use."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def batches(
    items: Iterable[ImageSource],
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int | None = None,
    *,
    on_error: Callable[[Failure], None] | None = None,
    draft: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Generator[Batch, None, None]:
    """Decodes and preprocesses pictures in threads and hands them out in batches.

    Closing the generator, or leaving its loop by any exception, stops the threads.

    Args:
        items: what :func:`regraft.images.decode` takes; may be endless. Read in the
            consumer's thread, at most two batches ahead. A picture or a buffer may occur again,
            and may be changed once the next item is asked for.
        preprocessing: from picture to pixels.
        batch_size: pictures in a batch.
        workers: threads; by default one per core that this process may use.
        on_error: called in the consumer's thread, in input order, for each picture that cannot be
            decoded, which is then left out (``failures.append`` collects them). Without it the
            first one raises.
        draft: decode JPEG files at reduced size where that suffices; changes pixels slightly.
        max_pixels: larger pictures count as failures.

    Yields:
        Batches in input order; the last one may be smaller, none is empty.

    Raises:
        ImageError: a picture cannot be decoded, and there is no ``on_error``.
        InputError: ``batch_size`` or ``workers`` is below 1.
        RegraftError: the system starts no thread.
    """
    workers = default_workers() if workers is None else workers
    for name, value in (("batch_size", batch_size), ("workers", workers)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")

    def claim(item: ImageSource) -> ImageSource:
        return private(item, max_pixels=max_pixels)

    def prepare(item: ImageSource) -> NDArray[np.float32]:
        image = decode(item, max_pixels=max_pixels, draft_for=preprocessing if draft else None)
        return preprocessing(image)

    size = preprocessing.image_size
    return _run(iter(items), claim, prepare, size, batch_size, workers, on_error)


def _run(
    items: Iterator[ImageSource],
    claim: Callable[[ImageSource], ImageSource],
    prepare: Callable[[ImageSource], NDArray[np.float32]],
    image_size: tuple[int, int],
    batch_size: int,
    workers: int,
    on_error: Callable[[Failure], None] | None,
) -> Generator[Batch, None, None]:
    numbered = enumerate(items)
    pending: deque[tuple[int, str, Future[NDArray[np.float32]]]] = deque()
    executor = ThreadPoolExecutor(workers, thread_name_prefix="regraft-decode")

    def submit(item: ImageSource) -> Future[NDArray[np.float32]]:
        try:
            claimed = claim(item)
        except ImageError as error:
            failed = Future[NDArray[np.float32]]()
            failed.set_exception(error)  # raised in its turn
            return failed
        try:
            return executor.submit(prepare, claimed)
        except RuntimeError as error:  # the executor starts its threads one by one, here
            if _NO_THREAD not in str(error):
                raise
            raise RegraftError(
                f"no thread can be started to decode images ({error}); expected up to {workers}: "
                "end other programs, or raise the limit of processes (ulimit -u, or a container's)"
            ) from error

    def refill(room: int) -> None:
        while len(pending) < room and (entry := next(numbered, None)) is not None:
            pending.append((entry[0], name_of(entry[1]), submit(entry[1])))

    try:
        pixels, indices = _empty(0, image_size), list[int]()
        while True:
            refill(2 * batch_size - len(indices))
            if not pending:
                break
            if not indices:  # what is left may be less than a batch
                pixels = _empty(min(batch_size, len(pending)), image_size)
            index, name, future = pending.popleft()
            try:
                pixels[len(indices)] = future.result()
            except ImageError as error:
                if on_error is None:
                    raise
                on_error(Failure(index, name, str(error)))
                continue
            indices.append(index)
            if len(indices) == batch_size:
                batch, indices = Batch(pixels, tuple(indices)), []
                refill(2 * batch_size)  # the workers go on while the batch is consumed
                yield batch
                del batch
        if indices:
            yield Batch(pixels[: len(indices)], tuple(indices))
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _empty(batch_size: int, image_size: tuple[int, int]) -> NDArray[np.float32]:
    return np.empty((batch_size, 3, *image_size), np.float32)
