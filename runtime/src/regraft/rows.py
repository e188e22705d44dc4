"""Features of images in the order in which the images were named, bad ones among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regraft.extractor import Extractor
from regraft.features import Features, Floats, choose_outputs
from regraft.images import ImageSource
from regraft.manifest import Manifest
from regraft.pipeline import Failure


@dataclass(frozen=True)
class Rows:
    """Consecutive images of a list, each with its features or with the reason why it has none.

    Attributes:
        paths: B names.
        errors: B entries: None, or why the image could not be read.
        arrays: name -> (G, ...), float32: of the G rows without an error, in order.
    """

    paths: tuple[str, ...]
    errors: tuple[str | None, ...]
    arrays: Mapping[str, Floats]

    def __len__(self) -> int:
        """B."""
        return len(self.paths)


Stream = Callable[[Callable[[Failure], None]], Iterator[Features]]


def rows_of(
    extractor: Extractor, images: Sequence[ImageSource], names: Sequence[str]
) -> Iterator[Rows]:
    """The features of images as rows, in order, none missing.

    Args:
        extractor: what computes them.
        images: what :meth:`Extractor.stream` takes.
        names: how each row is called, as many.

    Raises:
        EngineError: the engine failed, or features hold NaN or Inf.
    """
    return in_order(lambda on_error: extractor.stream(images, on_error, ahead=True), names)


def in_order(stream: Stream, names: Sequence[str]) -> Iterator[Rows]:
    """Joins the batches of a stream with the failures that it reports on its way.

    Args:
        stream: given a callback for failures, yields features; indices count from 0, ascending.
        names: how each row is called.
    """
    failed: dict[int, str] = {}
    done = 0
    for features in stream(lambda failure: failed.__setitem__(failure.index, failure.message)):
        end = int(features.indices[-1]) + 1
        yield _rows(names, failed, done, end, features.arrays())
        done = end
    if done < len(names):
        yield _rows(names, failed, done, len(names), {})


def _rows(
    names: Sequence[str],
    failed: Mapping[int, str],
    start: int,
    end: int,
    arrays: Mapping[str, Floats],
) -> Rows:
    rows = Rows(tuple(names[start:end]), tuple(failed.get(i) for i in range(start, end)), arrays)
    good = rows.errors.count(None)
    if any(len(array) != good for array in arrays.values()) or (good and not arrays):
        # An image lost or doubled must never become a row with another one's features.
        raise AssertionError(f"rows {start} to {end}: {good} good ones, other features")
    return rows


def shapes_of(manifest: Manifest, fields: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shape of one row of every array that a bundle gives for these fields of ``Features``."""
    fields = tuple(fields)
    outputs = {
        name: np.empty((0, *(int(size) for size in manifest.outputs[name][1:])), np.float32)
        for name in choose_outputs(fields, manifest.outputs, manifest.tokens)
    }
    empty = Features.from_outputs(outputs, manifest.tokens, (), fields)
    return {name: array.shape[1:] for name, array in empty.arrays().items()}
