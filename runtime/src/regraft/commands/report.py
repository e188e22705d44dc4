"""Writes one HTML file that shows what the patch does: pictures, charts, controls, parity.

The file is self-contained and fetches nothing. The bundle's probe graphs run on ort-cpu. Images
that cannot be read are named on stderr and left out; with --strict the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.bundle import Bundle
from regraft.cli.options import add_force, at_least, batch_size, file_name, thread_count
from regraft.errors import ImageError, InputError
from regraft.files import check_output, whole_file
from regraft.image_files import evenly, list_images
from regraft.progress import Progress
from regraft.wording import some_unread

if TYPE_CHECKING:
    from regraft.report.measure import Source
    from regraft.report.measurement import Measurement

MAX_IMAGES = 16
BATCH_SIZE = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `regraft export` wrote")
    parser.add_argument("--images", required=True, nargs="+", metavar="DIR", help="any images")
    parser.add_argument(
        "--out",
        required=True,
        type=file_name(".html"),
        metavar="FILE.html",
        help="the file to write",
    )
    parser.add_argument(
        "--max-images",
        type=at_least(1),
        default=MAX_IMAGES,
        metavar="N",
        help="use at most N images, evenly spaced in their order (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="threads inside one run of the engine (default: the cores that may be used)",
    )
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        default=BATCH_SIZE,
        metavar="N",
        help="images per run of the engine (default: %(default)s)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if an image cannot be read"
    )
    add_force(parser)
    parser.add_argument("--json", action="store_true", help="print a summary for machines")


def run(args: argparse.Namespace) -> int:
    """Measures, writes the page, and says the headline."""
    from regraft.engines import EngineOptions
    from regraft.report.measure import measure
    from regraft.report.page import Origin, page
    from regraft.report.wording import headline

    check_output(args.out, args.force)
    bundle = Bundle.open(args.bundle)
    paths = list_images(args.images)
    chosen = named(evenly(paths, args.max_images), args.images)
    failed: list[tuple[str, str]] = []
    with Progress(len(chosen), "images", "measuring") as progress:

        def leave_out(source: Source, error: ImageError) -> None:
            failed.append((source.name, str(error)))
            progress.leave_out(error)

        found = measure(
            bundle,
            chosen,
            options=EngineOptions(args.threads),
            batch_size=args.batch_size,
            on_error=leave_out,
            on_batch=progress.advance,
        )
    origin = Origin(command(args), len(paths), [name for name, _ in failed], _now())
    with whole_file(args.out, args.force) as hidden:
        hidden.write_text(page(bundle, found, origin), encoding="utf-8")
    if args.json:
        print(json.dumps(_summary(args.out, found, failed), allow_nan=False))
    else:
        print(headline(found.effect))
        print(f"written: {args.out}, {Path(args.out).stat().st_size / 1e6:.1f} MB")
    if failed and args.strict:
        raise InputError(
            f"{some_unread(len(failed), len(chosen))}; {args.out} "
            "shows the others; without --strict this is no error"
        )
    return 0


def named(paths: Sequence[Path], given: Sequence[str]) -> list[Source]:
    """The images with the names that the page shows: relative to the folder they were found in."""
    from regraft.report.measure import Source

    folders = [Path(folder) for folder in given]

    def name(path: Path) -> str:
        folder = next((f for f in folders if f in path.parents), path.parent)
        return str(path.relative_to(folder))

    return [Source(path, name(path)) for path in paths]


def command(args: argparse.Namespace) -> list[str]:
    """The words that make this page again."""
    words = ["regraft", "report", args.bundle, "--images", *args.images, "--out", args.out]
    if args.max_images != MAX_IMAGES:
        words += ["--max-images", str(args.max_images)]
    return words


def _now() -> datetime:
    # SOURCE_DATE_EPOCH is the convention by which builds are made reproducible.
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now(UTC)


def _summary(out: str, found: Measurement, failed: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "out": out,
        "bytes": Path(out).stat().st_size,
        "images": len(found.samples),
        "effect": found.effect.to_json(),
        "failed": [{"path": name, "message": message} for name, message in failed],
    }
