"""Extracts the features of many images into one file, .npz or .parquet.

The file holds the arrays that the Python API names (cls, prefix, patches, pooled, hidden.L,
attention.L, test_time_registers) and paths, which says which row is which image. Images that cannot
be read are named on stderr and left out; with --strict the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.cli.options import add_engine, add_force, at_least, words
from regraft.errors import InputError
from regraft.extractor import BATCH_SIZE, Extractor
from regraft.feature_files import DTYPES, check_suffix, feature_file
from regraft.files import check_output
from regraft.images import list_images
from regraft.pipeline import Failure
from regraft.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `regraft export` wrote")
    parser.add_argument(
        "images", metavar="IMAGE_OR_DIR", nargs="+", help="image files, and folders of them"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the file to write, .npz or .parquet"
    )
    parser.add_argument(
        "--outputs",
        type=words,
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
        "--workers", type=at_least(1), metavar="N", help="threads that decode and preprocess"
    )
    parser.add_argument(
        "--draft",
        action="store_true",
        help="decode large JPEG files at a reduced size: faster, but it changes pixels",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if an image cannot be read"
    )
    add_force(parser)
    parser.add_argument("--json", action="store_true", help="print a summary for machines")


@dataclass
class Summary:
    """What one run did, for people and for ``--json``."""

    out: str
    engine: str
    dtype: str
    images: int = 0
    seconds: float = 0.0
    arrays: dict[str, list[int]] = field(default_factory=dict)
    failed: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``seconds`` from the first image to the whole file."""
        rate = self.images / self.seconds if self.seconds else 0.0
        return {**vars(self), "images_per_second": rate}

    def lines(self) -> Iterator[str]:
        """The summary in words."""
        shapes = ", ".join(f"{n} {tuple(shape)}" for n, shape in self.arrays.items())
        yield f"{self.out}: {self.images} images, {self.dtype}: {shapes}"
        yield (
            f"{self.engine}: {self.seconds:.1f} s, {self.images / max(self.seconds, 1e-9):.1f} "
            "images per second"
        )


def run(args: argparse.Namespace) -> int:
    """Extracts, and prints what was done."""
    check_suffix(args.out)
    check_output(args.out, args.force)
    paths = list_images(args.images)
    with Extractor.open(
        args.bundle,
        args.engine,
        threads=args.threads,
        precision=args.precision,
        batch_size=args.batch_size,
        workers=args.workers,
        draft=args.draft,
        outputs=args.outputs,
    ) as extractor:
        summary = _extract(extractor, paths, args)
    if args.json:
        print(json.dumps(summary.to_json()))
    else:
        print("\n".join(summary.lines()))
    if summary.failed and args.strict:
        raise InputError(
            f"{len(summary.failed)} of {len(paths)} images could not be read (named above); "
            f"{args.out} holds the others; without --strict this is no error"
        )
    return 0


def _extract(extractor: Extractor, paths: list[Path], args: argparse.Namespace) -> Summary:
    summary = Summary(args.out, extractor.engine, args.dtype)
    started = time.monotonic()
    with (
        feature_file(args.out, args.dtype, args.force) as writer,
        Progress(len(paths), "images", "extracting") as progress,
    ):

        def leave_out(failure: Failure) -> None:
            progress.leave_out(failure.message)
            summary.failed.append({"path": str(failure.path), "message": failure.message})

        for features in extractor.stream(paths, on_error=leave_out):
            writer.append(features.arrays(), [str(paths[i]) for i in features.indices])
            progress.advance(len(features))
    summary.images = writer.rows
    summary.arrays = {name: [writer.rows, *shape] for name, shape in writer.shapes.items()}
    summary.seconds = time.monotonic() - started
    return summary
