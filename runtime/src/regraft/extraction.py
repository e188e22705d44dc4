"""Features of many images, extracted into a file or a folder, and what a run tells of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.bulk.crews import gathered
from regraft.bulk.run import choose_shard_size, extract_folder, job_of
from regraft.bulk.work import Opening
from regraft.bundle import Bundle
from regraft.feature_files import DType, feature_file
from regraft.features import available_fields
from regraft.progress import Progress
from regraft.rows import rows_of, shapes_of
from regraft.wording import counted


@dataclass
class Summary:
    """What one run did, for people and for ``--json``.

    Attributes:
        images: with features, in what was written.
        computed: looked at in this run.
        failed: path and message of each image without features.
        shards: of a folder: how many there are, and how many of them an earlier run had finished.
    """

    out: str
    engine: str
    dtype: str
    images: int = 0
    computed: int = 0
    seconds: float = 0.0
    arrays: dict[str, list[int]] = field(default_factory=dict)
    failed: list[dict[str, str]] = field(default_factory=list)
    shards: dict[str, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``seconds`` from the first image to the whole output."""
        content = {name: value for name, value in vars(self).items() if value is not None}
        del content["computed"]
        return {**content, "images_per_second": self._rate()}

    def lines(self) -> Iterator[str]:
        """The summary in words."""
        shapes = ", ".join(f"{n} {tuple(shape)}" for n, shape in self.arrays.items())
        others = f" ({len(self.failed)} could not be read)" if self.failed else ""
        yield f"{self.out}: {counted(self.images, 'image')}{others}, {self.dtype}: {shapes}"
        if self.shards is not None:
            shards = counted(self.shards["all"], "shard")
            yield f"{shards}, {self.shards['resumed']} of them there before"
        if self.computed:
            yield f"{self.engine}: {self.seconds:.1f} s, {self._rate():.1f} images per second"

    def _rate(self) -> float:
        return self.computed / self.seconds if self.seconds else 0.0


def into_file(
    paths: Sequence[Path], opening: Opening, out: str, dtype: DType, *, force: bool = False
) -> Summary:
    """Extracts into one file.

    Args:
        paths: the images.
        opening: how the bundle is opened.
        out: ends in ``.npz`` or ``.parquet``.
        dtype: of the arrays in the file.
        force: whether an existing file may be replaced.

    Raises:
        BundleError, EngineError: as :meth:`regraft.Extractor.open`.
        InputError, OutputExistsError: as :func:`regraft.feature_files.feature_file`.
    """
    with (
        opening.open() as extractor,
        feature_file(out, dtype, force) as writer,
        Progress(len(paths), "images", "extracting") as progress,
    ):
        summary = Summary(out, extractor.engine, dtype, computed=len(paths))
        started = time.monotonic()
        for rows in rows_of(extractor, paths, [str(path) for path in paths]):
            writer.append(rows)
            for path, error in zip(rows.paths, rows.errors, strict=True):
                if error is not None:
                    progress.note(f"regraft: {error}")
                    summary.failed.append({"path": path, "message": error})
            progress.advance(len(rows))
    summary.images = writer.rows
    summary.arrays = {name: [writer.rows, *shape] for name, shape in writer.shapes.items()}
    summary.seconds = time.monotonic() - started
    return summary


def into_folder(
    paths: Sequence[Path],
    opening: Opening,
    out: str,
    dtype: DType,
    *,
    force: bool = False,
    shard_size: int | None = None,
    processes: int | None = None,
    ray: bool = False,
) -> Summary:
    """Extracts into a folder of shards, going on where an earlier run was stopped.

    Args:
        paths: the images.
        opening: how the bundle is opened.
        out: the folder that is to appear.
        dtype: of the arrays in the shards.
        force: whether other features there may be replaced.
        shard_size: images in a shard; None for a sensible number.
        processes, ray: as of :func:`regraft.bulk.crews.gathered`.

    Raises:
        BundleError, EngineError: as :meth:`regraft.Extractor.open`.
        InputError, OutputExistsError: as :func:`regraft.bulk.run.extract_folder`.
    """
    names = [str(path) for path in paths]
    with gathered(opening, processes, ray=ray) as (named, workers, crew):
        bundle = Bundle.open(opening.bundle)
        manifest = bundle.manifest
        fields = named.outputs or available_fields(manifest.outputs, manifest.tokens)
        shapes = shapes_of(manifest, fields)
        size = choose_shard_size(
            out,
            shard_size,
            images=len(names),
            pixels=3 * math.prod(manifest.image_size),
            shapes=shapes,
            dtype=dtype,
            workers=workers,
        )
        job = job_of(bundle, named, names, dtype, size)
        outcome = extract_folder(job, out, names, crew, force=force)
    return Summary(
        out=out,
        engine=job.engine,
        dtype=job.dtype,
        images=outcome.images,
        computed=outcome.computed,
        seconds=outcome.seconds,
        arrays={name: [outcome.images, *shape] for name, shape in shapes.items()},
        failed=[{"path": path, "message": message} for path, message in outcome.failed],
        shards={"all": outcome.shards, "resumed": outcome.resumed},
    )
