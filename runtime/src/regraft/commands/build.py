"""Builds an engine for this machine, verifies it on images, and caches it if it passes.

The result lies in the user's cache folder (REGRAFT_CACHE, else XDG_CACHE_HOME/regraft, else
~/.cache/regraft), not in the bundle, and is used by --engine ENGINE of the other commands until the
bundle, the engine's version or the machine changes. The parity gate of `regraft verify` comes
first: what misses a limit is not cached. An engine that needs no build is verified alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.building import Plan, build, is_current, plan
from regraft.bundle import Bundle
from regraft.cli.options import add_precision, at_least, batch_size, thread_count
from regraft.commands.verify import add_reference, lines, open_reference
from regraft.engines import AUTO, NAMES
from regraft.errors import EngineError
from regraft.image_files import list_images
from regraft.pipeline import Batch, Failure, batches
from regraft.progress import BuildBar, Progress
from regraft.verification import Verification
from regraft.wording import some_unread

BEFORE = "built before"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `regraft export` wrote")
    parser.add_argument(
        "--engine",
        required=True,
        choices=[name for name in NAMES if name != AUTO],
        help="what to build",
    )
    parser.add_argument(
        "--images", required=True, nargs="+", metavar="DIR", help="images for the parity gate"
    )
    add_reference(parser)
    add_precision(parser)
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=_pair,
        metavar="NAME=VALUE",
        help="a build option of the engine; a wrong name lists those it has (may be repeated)",
    )
    parser.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="threads inside one run, for the gate (default: the cores that may be used)",
    )
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        default=8,
        metavar="N",
        help="images per run of the gate; the first image is also run alone (default: 8)",
    )
    parser.add_argument("--max-images", type=at_least(1), metavar="N", help="take only the first N")
    parser.add_argument(
        "--force", action="store_true", help="build again what was built before, and is whole"
    )
    parser.add_argument("--json", action="store_true", help="print the findings for machines")


def run(args: argparse.Namespace) -> int:
    """Builds and verifies, and prints both."""
    bundle = Bundle.open(args.bundle)
    planned = plan(bundle, args.engine, dict(args.option), args.precision)
    paths = list_images(args.images)[: args.max_images]
    if planned.keys and not args.force and _current(planned):
        _print(args, planned, BEFORE, None, {})
        return 0
    found, reports = _built(args, bundle, planned, paths)
    _print(args, planned, "built" if planned.keys else "needs no build", found, reports)
    return 0


def _built(
    args: argparse.Namespace, bundle: Bundle, planned: Plan, paths: Sequence[Path]
) -> tuple[Verification, dict[str, Any]]:
    """Builds and verifies; warns of images that could not be read."""
    failed: list[Failure] = []
    with ExitStack() as stack:
        reference = stack.enter_context(open_reference(bundle, args))
        bar = stack.enter_context(BuildBar())
        progress = stack.enter_context(Progress(len(paths), "images", "verifying"))

        def skip(failure: Failure) -> None:
            failed.append(failure)
            progress.leave_out(failure.message)

        steps = bundle.manifest.preprocessing
        found = build(
            bundle,
            planned,
            _varied(batches(paths, steps, args.batch_size, on_error=skip)),
            reference,
            threads=args.threads,
            progress=bar,
            on_batch=progress.advance,
            on_verified=lambda missed: None if missed.passed else _show(args, missed),
        )
    if failed:
        unread = some_unread(len(failed), len(paths))
        print(f"regraft: warning: {unread}; verified on the others", file=sys.stderr)
    return found


def _current(planned: Plan) -> bool:
    try:
        return is_current(planned)
    except EngineError as error:
        print(f"regraft: warning: {error}; doing so", file=sys.stderr)
        return False


def _varied(prepared: Iterator[Batch]) -> Iterator[NDArray[np.float32]]:
    """The pixels, the very first image by itself: an engine may run one image by another path."""
    for index, batch in enumerate(prepared):
        parts = (batch.pixels[:1], batch.pixels[1:]) if index == 0 else (batch.pixels,)
        yield from (part for part in parts if len(part))


def _show(args: argparse.Namespace, found: Verification) -> None:
    print(json.dumps(found.to_json(), allow_nan=False) if args.json else "\n".join(lines(found)))
    sys.stdout.flush()


def _print(
    args: argparse.Namespace,
    planned: Plan,
    state: str,
    found: Verification | None,
    reports: dict[str, Any],
) -> None:
    folders = {name: str(key.folder) for name, key in planned.keys.items()}
    if args.json:
        content = {
            "engine": args.engine,
            "precision": planned.precision,
            "state": state,
            "options": dict(planned.options),
            "built": reports,
            "folders": folders,
            "verification": None if found is None else found.to_json(),
        }
        print(json.dumps(content, allow_nan=False))
        return
    note = "; --images not used (--force builds and verifies again)" if state == BEFORE else ""
    print(f"{args.engine} ({planned.precision}): {state}{note}")
    for name, report in reports.items():
        print(f"  {name}: {'; '.join(f'{k} {_words(v)}' for k, v in report.items())}")
    for folder in folders.values():
        print(f"  cached: {folder}")
    if found is not None:
        print("\n".join(lines(found)))


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_words(inner) for inner in value)
    return str(value)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value
