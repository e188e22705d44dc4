"""One worker: an extractor, and shard after shard computed with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from regraft.bulk.folder import about, shard_name
from regraft.bulk.job import Job
from regraft.bundle import Bundle
from regraft.extractor import Extractor
from regraft.feature_files import DType, ParquetWriter
from regraft.files import whole_file
from regraft.rows import Rows, rows_of, shapes_of


class Watcher(Protocol):
    """Is told how the work goes; of the images in shards that are not done yet, too."""

    def advance(self, images: int) -> None:
        """So many images more were looked at."""

    def failed(self, path: str, message: str) -> None:
        """One of them could not be read."""


@dataclass(frozen=True)
class Opening:
    """How a worker opens its extractor, in whatever process; see :meth:`Extractor.open`."""

    bundle: str
    engine: str
    precision: str | None = None
    threads: int | None = None
    batch_size: int | None = None
    workers: int | None = None
    draft: bool = False
    outputs: tuple[str, ...] | None = None

    def open(self, verify_hashes: bool = True) -> Extractor:
        """Opens it.

        Args:
            verify_hashes: False where the same files were checked a moment ago.
        """
        return Extractor.open(
            Bundle.open(self.bundle, verify_hashes),
            self.engine,
            threads=self.threads,
            precision=self.precision,
            batch_size=self.batch_size,
            workers=self.workers,
            draft=self.draft,
            outputs=self.outputs,
        )


@dataclass(frozen=True)
class Task:
    """One shard to compute.

    Attributes:
        place: the folder of shards.
        job_digest: of the job that it belongs to.
        dtype: of the features in it.
        number: which one.
        names: its images, as they were named.
        folder: where relative names start; None for the current folder.
    """

    place: Path
    job_digest: str
    dtype: DType
    number: int
    names: tuple[str, ...]
    folder: str | None = None

    @classmethod
    def of(cls, job: Job, place: Path, number: int, names: Sequence[str]) -> Task:
        """A task of a job; ``names`` are all its images."""
        span = job.span(number)
        own = tuple(names[span.start : span.stop])
        return cls(place, job.digest, _dtype(job.dtype), number, own, job.folder)

    @property
    def images(self) -> list[Path]:
        """Where its images are."""
        return [Path(self.folder or "", name) for name in self.names]


def compute(extractor: Extractor, task: Task, watcher: Watcher) -> None:
    """Computes a shard from its image files and writes it.

    Raises:
        InputError: the shard cannot be written, or a value does not fit its dtype.
        EngineError: the engine failed, or features hold NaN or Inf.
    """
    write(extractor, task, rows_of(extractor, task.images, task.names), watcher)


def write(extractor: Extractor, task: Task, rows: Iterable[Rows], watcher: Watcher) -> None:
    """Writes a shard's rows; the file appears once they are all there."""
    path = task.place / shard_name(task.number)
    with whole_file(path, force=True) as hidden:
        shapes = shapes_of(extractor.bundle.manifest, extractor.fields)
        writer = ParquetWriter(hidden, task.dtype, about(task.job_digest, task.number), shapes)
        with closing(writer):
            for some in rows:
                writer.append(some)
                for name, error in zip(some.paths, some.errors, strict=True):
                    if error is not None:
                        watcher.failed(name, error)
                watcher.advance(len(some))
            writer.finish()


def _dtype(name: str) -> DType:
    return "float16" if name == "float16" else "float32"
