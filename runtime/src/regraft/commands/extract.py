"""Extracts the features of many images: into one file, .npz or .parquet, or into a folder.

A file holds the arrays that the Python API names (cls, prefix, patches, pooled, hidden.L,
attention.L, test_time_registers) and paths, which says which row is which image. A name without a
suffix is a folder of .parquet files (shards) for large numbers of images: a run that was stopped
in any way, run again, goes on after the last finished shard, in OUT.partial, which becomes OUT
once every image is in it. Images that cannot be read are named on stderr; in .parquet they are rows
with an error, in .npz they are left out; with --strict the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from regraft.bulk.on_ray import RayCrew
from regraft.bulk.processes import ProcessCrew
from regraft.bulk.run import Crew, choose_shard_size, extract_folder, job_of
from regraft.bulk.work import Opening, Task, Watcher, compute
from regraft.bundle import Bundle
from regraft.cli.options import add_engine, add_force, at_least, file_name, thread_count, words
from regraft.engines.cores import usable_cores
from regraft.errors import InputError, UsageError
from regraft.feature_files import DTYPES, SUFFIXES, check_suffix, feature_file
from regraft.features import SOURCES, available_fields
from regraft.files import check_output
from regraft.images import list_images
from regraft.parquet_files import require_pyarrow
from regraft.pipeline import default_workers
from regraft.pixel_extractor import BATCH_SIZE
from regraft.progress import Progress
from regraft.rows import rows_of, shapes_of
from regraft.wording import counted, some_unread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `regraft export` wrote")
    parser.add_argument(
        "images", metavar="IMAGE_OR_DIR", nargs="+", help="image files, and folders of them"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=_out,
        metavar="OUT",
        help="what to write: a file (.npz, .parquet), or a folder (a name without a suffix)",
    )
    parser.add_argument(
        "--outputs",
        type=_fields,
        metavar="NAMES",
        help="which features, such as cls,patches,pooled (default: all that the bundle gives)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the arrays (default: float32)"
    )
    add_engine(parser)
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help=f"images per run of the engine (default: {BATCH_SIZE})",
    )
    parser.add_argument(
        "--workers", type=thread_count, metavar="N", help="threads that decode and preprocess"
    )
    parser.add_argument(
        "--draft",
        action="store_true",
        help="decode large JPEG files at a reduced size: faster, but it changes pixels",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if an image cannot be read"
    )
    _add_folder(parser)
    add_force(parser)
    parser.add_argument("--json", action="store_true", help="print a summary for machines")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("for a folder")
    group.add_argument(
        "--shard-size",
        type=at_least(1),
        metavar="N",
        help="images in one .parquet file (default: by the size of the features)",
    )
    group.add_argument(
        "--processes",
        type=thread_count,
        metavar="N",
        help="worker processes, which share the cores (default: 1); with --ray, actors in the "
        "cluster (default: one per GPU, without GPUs one per node)",
    )
    group.add_argument(
        "--ray",
        action="store_true",
        help="compute on a Ray cluster: that of RAY_ADDRESS, else one that runs here, else a new "
        "one; its nodes must see bundle, images and OUT under the same names",
    )


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


def run(args: argparse.Namespace) -> int:
    """Extracts, and prints what was done."""
    folder = _is_folder(args.out)
    if folder:
        require_pyarrow()
    else:
        _refuse_folder_options(args)
        check_suffix(args.out)
        check_output(args.out, args.force)
    paths = list_images(args.images)
    summary = _extract_folder(paths, args) if folder else _extract_file(paths, args)
    if args.json:
        print(json.dumps(summary.to_json()))
    else:
        print("\n".join(summary.lines()))
    if summary.failed and args.strict:
        others = "the others" if args.out.endswith(".npz") else "their errors"
        raise InputError(
            f"{some_unread(len(summary.failed), len(paths))}; "
            f"{args.out} holds {others}; without --strict this is no error"
        )
    return 0


def _out(text: str) -> str:
    """An argument type: the name of a file or a folder."""
    if not _is_folder(text):
        return file_name(*SUFFIXES)(text)
    if Path(text).suffix.lower() in SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"{text}: ends as a file does, and in {os.sep!r} as a folder does; expected one of both"
        )
    return text


def _fields(text: str) -> tuple[str, ...]:
    """An argument type: fields of the features."""
    chosen = words(text)
    for name in chosen:
        if name not in SOURCES:
            raise argparse.ArgumentTypeError(
                f"there is no output {name!r}; expected {', '.join(SOURCES)}"
            )
    return chosen


def _is_folder(out: str) -> bool:
    return out.endswith(os.sep) or not Path(out).suffix


def _refuse_folder_options(args: argparse.Namespace) -> None:
    for option, given in (
        ("--ray", args.ray),
        ("--processes", args.processes is not None),
        ("--shard-size", args.shard_size is not None),
    ):
        if given:
            raise UsageError(
                f"{option} needs a folder to write to, and --out {args.out} is a file; give a "
                "name without a suffix"
            )


def _opening(args: argparse.Namespace) -> Opening:
    return Opening(
        bundle=args.bundle,
        engine=args.engine,
        precision=args.precision,
        threads=args.threads,
        batch_size=args.batch_size,
        workers=args.workers,
        draft=args.draft,
        outputs=None if args.outputs is None else tuple(dict.fromkeys(args.outputs)),
    )


def _extract_file(paths: list[Path], args: argparse.Namespace) -> Summary:
    with (
        _opening(args).open() as extractor,
        feature_file(args.out, args.dtype, args.force) as writer,
        Progress(len(paths), "images", "extracting") as progress,
    ):
        summary = Summary(args.out, extractor.engine, args.dtype, computed=len(paths))
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


def _extract_folder(paths: list[Path], args: argparse.Namespace) -> Summary:
    names = [str(path) for path in paths]
    with ExitStack() as stack:
        opening, workers, crew = _crew(args, stack)
        bundle = Bundle.open(args.bundle)
        fields = opening.outputs or available_fields(
            bundle.manifest.outputs, bundle.manifest.tokens
        )
        shapes = shapes_of(bundle.manifest, fields)
        size = choose_shard_size(
            args.out,
            args.shard_size,
            images=len(names),
            pixels=3 * math.prod(bundle.manifest.image_size),
            shapes=shapes,
            dtype=args.dtype,
            workers=workers,
        )
        job = job_of(bundle, opening, names, args.dtype, size)
        outcome = extract_folder(job, args.out, names, crew, force=args.force)
    return Summary(
        out=args.out,
        engine=job.engine,
        dtype=job.dtype,
        images=outcome.images,
        computed=outcome.computed,
        seconds=outcome.seconds,
        arrays={name: [outcome.images, *shape] for name, shape in shapes.items()},
        failed=[{"path": path, "message": message} for path, message in outcome.failed],
        shards={"all": outcome.shards, "resumed": outcome.resumed},
    )


def _crew(args: argparse.Namespace, stack: ExitStack) -> tuple[Opening, int, Crew]:
    """How the bundle is opened (by which engine, named), how many share the work, and who does."""
    opening, processes = _opening(args), args.processes or 1
    if args.ray:
        crew = stack.enter_context(RayCrew.connect(opening, args.processes))
        return crew.opening, crew.slots, crew
    extractor = stack.enter_context(opening.open())
    opening = replace(opening, engine=extractor.engine)
    if processes == 1:

        def alone(tasks: Sequence[Task], watcher: Watcher) -> None:
            for task in tasks:
                compute(extractor, task, watcher)

        return opening, 1, alone
    extractor.close()
    share = replace(
        opening,
        threads=opening.threads or max(1, usable_cores() // processes),
        workers=opening.workers or max(1, default_workers() // processes),
    )
    return opening, processes, ProcessCrew(share, processes)
