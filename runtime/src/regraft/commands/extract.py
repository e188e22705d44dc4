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
import os
from pathlib import Path

from regraft.bulk.work import Opening
from regraft.cli.options import (
    add_engine,
    add_force,
    at_least,
    batch_size,
    file_name,
    thread_count,
    words,
)
from regraft.errors import InputError, UsageError
from regraft.extraction import into_file, into_folder
from regraft.feature_files import DTYPES, SUFFIXES, check_suffix
from regraft.features import SOURCES
from regraft.files import check_output
from regraft.image_files import list_images
from regraft.parquet_files import require_pyarrow
from regraft.pixel_extractor import BATCH_SIZE
from regraft.wording import some_unread


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
        type=batch_size,
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
    opening = _opening(args)
    if folder:
        summary = into_folder(
            paths,
            opening,
            args.out,
            args.dtype,
            force=args.force,
            shard_size=args.shard_size,
            processes=args.processes,
            ray=args.ray,
        )
    else:
        summary = into_file(paths, opening, args.out, args.dtype, force=args.force)
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
