"""One run of a bulk extraction: what is there already, what is to do, and who does it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from regraft.bulk.folder import PARTIAL, ShardFolder
from regraft.bulk.job import JOB, Job, hash_names, start_of
from regraft.bulk.work import Opening, Task, Watcher
from regraft.bundle import Bundle, record
from regraft.engines import engine_class
from regraft.errors import InputError
from regraft.features import available_fields
from regraft.manifest import NAME
from regraft.progress import Progress
from regraft.wording import none_read

_SHARD_BYTES = 1 << 28  # of features: what a kill can lose is less than this per worker
_LARGEST = 4096  # images in a shard, where features are small
_SHARE = 4  # shards per worker at least, so that none waits long for the last one

# Computes shards, wherever, and returns once all are written.
Crew = Callable[[Sequence[Task], Watcher], None]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Outcome:
    """What a run did and what the folder holds.

    Attributes:
        images: with features, in all.
        failed: name and error of each image without features, in all.
        shards: how many there are.
        resumed: how many of them were there before this run.
        computed: images looked at in this run.
        seconds: that it took.
    """

    images: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    shards: int = 0
    resumed: int = 0
    computed: int = 0
    seconds: float = 0.0


def job_of(
    bundle: Bundle,
    opening: Opening,
    names: Sequence[str],
    dtype: str,
    shard_size: int,
) -> Job:
    """What is asked for, as the folder records it.

    Args:
        bundle: opened.
        opening: how it will be, by an engine's name (not ``auto``).
        names: the images.
        dtype: of the features in the shards.
        shard_size: images in one of them.
    """
    manifest = bundle.manifest
    engine = engine_class(opening.engine)
    return Job(
        bundle=record(bundle.path / NAME).sha256,
        engine=opening.engine,
        precision=engine.arithmetic(manifest.precision, opening.precision),
        outputs=opening.outputs or available_fields(manifest.outputs, manifest.tokens),
        dtype=dtype,
        draft=opening.draft,
        images=len(names),
        images_sha256=hash_names(names),
        folder=start_of(names),
        shard_size=shard_size,
    )


def choose_shard_size(
    out: str,
    asked: int | None,
    *,
    images: int,
    pixels: int,
    shapes: Shapes,
    dtype: str,
    workers: int,
) -> int:
    """Images in a shard: as asked, else as an earlier run recorded, else by the features' size.

    Args:
        out: the folder that is to appear.
        asked: what the user wants; None for a sensible number.
        images: how many there are.
        pixels: grey levels of one image.
        shapes: array name -> shape of one row.
        dtype: float32 or float16.
        workers: how many share the work.
    """
    if asked is not None:
        return asked
    target = os.path.realpath(out)  # as check_output takes it, which says what is wrong with it
    for place in map(Path, (target + PARTIAL, target)):
        with suppress(OSError):  # of the name: too long, say
            if (place / JOB).is_file():
                return Job.read(place).shard_size
    # With the decoded pixels, which wait in memory where decoding is done elsewhere.
    row = pixels + (2 if dtype == "float16" else 4) * sum(map(math.prod, shapes.values()))
    share = math.ceil(images / (_SHARE * workers))
    return max(1, min(_LARGEST, _SHARD_BYTES // row, share))


def extract_folder(
    job: Job, out: str, names: Sequence[str], crew: Crew, *, force: bool = False
) -> Outcome:
    """Fills the folder of a job, going on where an earlier run was stopped.

    Args:
        job: what is asked for.
        out: the folder that is to appear.
        names: the images.
        crew: computes what is missing.
        force: whether other features there may be replaced.

    Raises:
        OutputExistsError: there are features of another job, and not ``force``.
        InputError: the folder cannot be written, or holds something else, or no image could be
            read; then nothing is left of this run.
        EngineError: the engine failed.
    """
    outcome = Outcome(shards=job.shards)
    started = time.monotonic()
    with ShardFolder.open(out, job, names, force) as folder:
        done = folder.done()
        outcome.resumed = len(done)
        todo = [number for number in range(job.shards) if number not in done]
        with Progress(len(names), "images", "extracting") as progress:
            progress.skip(sum(shard.rows for shard in done.values()))
            for _, message in folder.failures(done):  # of the earlier run, whose words may be lost
                progress.note(f"regraft: {message}")
            if todo:
                tasks = [Task.of(job, folder.place, number, names) for number in todo]
                crew(tasks, _Bar(progress, outcome))
        outcome.failed = list(folder.failures(folder.done()))
        if len(outcome.failed) == len(names):
            # Not kept for a later run either, which would take the failures over.
            folder.discard()
            raise InputError(f"{out}: there are no features to write; {none_read(len(names))}")
        if not folder.complete:
            folder.publish()
    outcome.images = len(names) - len(outcome.failed)
    outcome.seconds = time.monotonic() - started
    return outcome


class _Bar:
    """A watcher that draws a progress bar and counts."""

    def __init__(self, progress: Progress, outcome: Outcome) -> None:
        self._progress, self._outcome = progress, outcome

    def advance(self, images: int) -> None:
        self._outcome.computed += images
        self._progress.advance(images)

    def failed(self, path: str, message: str) -> None:
        self._progress.note(f"regraft: {message}")
