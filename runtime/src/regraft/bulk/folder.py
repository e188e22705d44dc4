"""The folder of shards: ``OUT.partial`` while it is filled, ``OUT`` once every shard is there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from regraft.bulk.job import IMAGES, JOB, UNFINISHED, Job
from regraft.errors import InputError, OutputExistsError
from regraft.files import check_output, swap_folders
from regraft.parquet_files import ERROR, PATHS, require_pyarrow

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows, where two runs at once are the user's to avoid
    fcntl = None

PARTIAL = ".partial"
_SHARD = re.compile(r"shard-(\d{6,})\.parquet")


@dataclass(frozen=True)
class Done:
    """A finished shard: its rows, and how many of them have an error."""

    rows: int
    errors: int


class ShardFolder:
    """Where the shards of a job go. A context manager; it is locked until it is left.

    Attributes:
        out: the folder that is to appear.
        place: where shards are written: ``out`` with ``.partial``, or ``out`` if it is complete.
        job: what was asked for.
    """

    def __init__(self, out: Path, place: Path, job: Job) -> None:
        self.out, self.place, self.job = out, place, job
        self._lock: int | None = None

    @classmethod
    def open(cls, out: str | Path, job: Job, names: Sequence[str], force: bool = False) -> Self:
        """Opens a folder for a job: a new one, an unfinished one of the same job, or a whole one.

        Args:
            out: the folder that is to appear.
            job: what is asked for.
            names: the images.
            force: whether other features there, finished or not, may be replaced.

        Raises:
            OutputExistsError: there are features of another job, and not ``force``.
            InputError: it cannot be written, is no such folder, or another run fills it.
        """
        target = Path(os.path.realpath(out))
        if not force and (target / JOB).is_file():
            _refuse_other(target, job, "holds features that were extracted otherwise")
            return cls(target, target, job)
        check_output(out, force, marker=JOB)
        folder = cls(target, target.with_name(target.name + PARTIAL), job)
        try:
            folder._begin(names, force)
        except BaseException:
            folder._unlock()
            raise
        return folder

    @property
    def complete(self) -> bool:
        """Whether it was published before."""
        return self.place == self.out

    def done(self) -> dict[int, Done]:
        """The finished shards, read from their footers.

        Raises:
            InputError: a shard is damaged or of another job.
        """
        shards = {}
        for path in sorted(self.place.iterdir()):
            if match := _SHARD.fullmatch(path.name):
                shards[int(match[1])] = self._inspect(path, int(match[1]))
        return shards

    def shard(self, number: int) -> Path:
        """Where a shard is, or will be."""
        return self.place / shard_name(number)

    def failures(self, shards: Mapping[int, Done]) -> Iterator[tuple[str, str]]:
        """Name and error of every image without features, from finished shards."""
        pa, pq = require_pyarrow()
        for number, done in shards.items():
            if done.errors:
                table = pq.read_table(self.shard(number), columns=[PATHS, ERROR])
                bad = table.filter(pa.compute.is_valid(table[ERROR]))
                yield from zip(bad[PATHS].to_pylist(), bad[ERROR].to_pylist(), strict=True)

    def publish(self) -> None:
        """Renames the folder to ``out``, every shard being there.

        Raises:
            AssertionError: one is not.
        """
        missing = set(range(self.job.shards)) - set(self.done())
        if missing:
            raise AssertionError(f"{self.place}: {len(missing)} shards are missing")
        self.clean()
        check_output(self.out, True, marker=JOB)
        swap_folders(self.place, self.out)
        self.place = self.out

    def discard(self) -> None:
        """Removes what was filled, unless it is complete."""
        if not self.complete:
            self._empty()
            self.place.rmdir()

    def clean(self) -> None:
        """Removes what killed runs left half-written."""
        for path in self.place.glob(".shard-*"):
            path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.complete:
            with suppress(OSError):
                self.clean()
        self._unlock()

    def _begin(self, names: Sequence[str], force: bool) -> None:
        try:
            there = self.place.is_dir()
        except OSError as error:
            raise InputError(
                f"{self.out}: it is called {self.place.name} until it is whole, which cannot be "
                f"written ({error.strerror}); choose a shorter name"
            ) from error
        if there and not (self.place / JOB).is_file():
            with suppress(PermissionError):  # which the check below puts into words
                self._acquire()
                self._drop_unbegun()
        check_output(self.place, True, marker=JOB)
        self.place.mkdir(exist_ok=True)
        if self._lock is None:
            self._acquire()
        if (self.place / JOB).is_file():
            try:
                _refuse_other(self.place, self.job, "holds an unfinished extraction")
            except InputError:
                if not force:
                    raise
                self._empty()
        self.clean()
        if not (self.place / JOB).is_file():
            self.job.write(self.place, names)

    def _empty(self) -> None:
        # The record goes after the shards, so that what a kill leaves is still known.
        for path in sorted(self.place.iterdir(), key=_last):
            path.unlink()

    def _drop_unbegun(self) -> None:
        """Removes what a run leaves that was killed before its record was whole."""
        found = list(self.place.iterdir())
        if {path.name for path in found} <= {IMAGES, UNFINISHED}:
            for path in found:
                path.unlink()

    def _acquire(self) -> None:
        if fcntl is None:
            return
        self._lock = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.place}: another `regraft extract` is filling it; wait for it, or choose "
                "another --out"
            ) from None

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _inspect(self, path: Path, number: int) -> Done:
        pa, pq = require_pyarrow()
        try:
            footer = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: is damaged ({reason}); remove it and run again") from None
        own = {k.encode(): v.encode() for k, v in about(self.job.digest, number).items()}
        strange = own.items() - (footer.metadata or {}).items()
        if strange or footer.num_rows != len(self.job.span(number)):
            raise InputError(
                f"{path}: is not of this extraction; remove it and run again, or choose another "
                "--out"
            )
        return Done(footer.num_rows, _errors(footer))


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.parquet"


def about(job_digest: str, number: int) -> dict[str, str]:
    """What a shard's footer says of itself."""
    return {"regraft.run": job_digest, "regraft.shard": str(number)}


def _last(path: Path) -> int:
    return {JOB: 1, IMAGES: 2}.get(path.name, 0)


def _errors(footer: Any) -> int:
    """The rows whose ``error`` is not null, from the footer's statistics."""
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(
        column.num_values - column.statistics.null_count
        for column in columns
        if column.path_in_schema == ERROR
    )


def _refuse_other(place: Path, job: Job, state: str) -> None:
    there = Job.read(place)
    if there != job:
        raise OutputExistsError(
            f"{place}: {state}: {'; '.join(there.differences(job))}; give --force to start anew, "
            "or choose another --out"
        )
