"""Which batch sizes are executed: a few, so that each can keep its CUDA graph.

A batch is padded to the next larger one; a batch beyond the largest is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def buckets(smallest: int, largest: int) -> tuple[int, ...]:
    """The powers of two between two batch sizes, and both of them, ascending."""
    powers = (1 << exponent for exponent in range(largest.bit_length()))
    return tuple(sorted({smallest, largest, *(p for p in powers if smallest < p < largest)}))


def pieces(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cuts a batch into pieces.

    Args:
        count: images, at least 1.
        sizes: as :func:`buckets` gives them.

    Yields:
        First image, one past the last, and the bucket that executes them.
    """
    for start in range(0, count, sizes[-1]):
        stop = min(count, start + sizes[-1])
        yield start, stop, next(size for size in sizes if size >= stop - start)
