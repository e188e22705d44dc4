"""Times a bundle's patched graph against its baseline, interleaved in one run.

Both run on the same engine and give the same outputs; the order changes every round. The ratio is
the median over rounds with its 95 % interval. What is timed is checked: finite, and equal to what
`regraft extract` gives. A run begins and ends in the host's memory; where the engine's device has
a clock, what it computes is timed by that, too. Each graph is opened once, and the interval covers
the runs alone: on a card a graph opened again may differ by some percent at small batches.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regraft import __version__
from regraft.bench_plot import Pair, svg
from regraft.bench_row import Row, measure
from regraft.bundle import Bundle
from regraft.cli.options import (
    MOST_IN_BATCH,
    add_engine,
    add_force,
    at_least,
    duration,
    file_name,
    integers,
)
from regraft.engines import Engine, EngineOptions
from regraft.engines.cores import processor
from regraft.errors import ImageError
from regraft.files import check_output, whole_file
from regraft.image_files import list_images
from regraft.images import decode
from regraft.preprocessing import Preprocessing
from regraft.timing import Ratio
from regraft.verification import Engines
from regraft.wording import unread

_SMOOTH = 12  # cells per side of the random pictures' colour fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `regraft export` wrote")
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="IMAGE_OR_DIR",
        help="pictures to run on (default: random ones, smooth with some noise)",
    )
    parser.add_argument(
        "--batch-sizes",
        type=integers(1, MOST_IN_BATCH),
        default=(1, 8),
        metavar="N,N",
        help="images per run (default: 1,8)",
    )
    parser.add_argument(
        "--seconds",
        type=duration,
        default=5.0,
        help="time for each batch size, half of it for the device alone where that is timed "
        "(default: 5)",
    )
    parser.add_argument(
        "--rounds", type=at_least(2), default=10, metavar="N", help="at least so many (default: 10)"
    )
    add_engine(parser)
    parser.add_argument(
        "--plot", type=file_name(".svg"), metavar="FILE.svg", help="draw the figures, too"
    )
    add_force(parser)
    parser.add_argument("--json", action="store_true", help="print the figures for machines")


def run(args: argparse.Namespace) -> int:
    """Measures, and prints a table."""
    if args.plot is not None:
        check_output(args.plot, args.force)
    bundle = Bundle.open(args.bundle)
    options = EngineOptions(threads=args.threads, precision=args.precision)
    with Engines(bundle, args.engine, options) as engines:
        baseline, patched = engines["baseline"], engines["model"]
        pictures = _pictures(bundle.manifest.preprocessing, args.images, max(args.batch_sizes))
        rows = [
            measure(bundle, baseline, patched, pictures[:batch], args.seconds, args.rounds)
            for batch in args.batch_sizes
        ]
        about = _about(bundle, patched, args)
    if args.plot is not None:
        _plot(args, about, rows)
    if args.json:
        print(json.dumps({**about, "batches": [asdict(row) for row in rows]}, indent=2))
    else:
        print("\n".join(_table(about, rows)))
        if args.plot is not None:
            print(f"written: {args.plot}")
    return 0


def _plot(args: argparse.Namespace, about: dict[str, Any], rows: Sequence[Row]) -> None:
    details = ", ".join(f"{name} {value}" for name, value in about["engine_details"].items())
    pairs = [
        Pair(label, row.batch, part.baseline_ms, part.patched_ms, astuple(part.ratio))
        for row in rows
        for label, part in ((f"batch {row.batch}", row), ("device alone", row.on_device))
        if part is not None
    ]
    title = f"{about['model']}, {about['precision']}, {about['engine']}"
    with whole_file(args.plot, args.force) as file:
        file.write_text(svg(title, f"{details}; {about['processor']}", pairs), encoding="utf-8")


def _pictures(
    preprocessing: Preprocessing, paths: Sequence[str] | None, count: int
) -> NDArray[np.float32]:
    """``count`` preprocessed images, (count, 3, H, W); given ones are repeated if too few."""
    if paths is None:
        images: list[Any] = [
            _random_picture(preprocessing.image_size, seed) for seed in range(count)
        ]
    else:
        files: list[Path] = list_images(paths)
        images = _decoded(files[:count])
    return np.stack([preprocessing(images[i % len(images)]) for i in range(count)])


def _decoded(files: Sequence[Path]) -> list[Any]:
    images, failed = [], []
    for file in files:
        try:
            images.append(decode(file))
        except ImageError as error:
            failed.append(str(error))
    if failed:
        raise ImageError(unread(failed, len(files)))
    return images


def _random_picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth colour fields with some noise: values and correlations like a photograph's."""
    rng = np.random.default_rng(seed)
    height, width = size
    cells = rng.integers(0, 256, (_SMOOTH, _SMOOTH, 3), np.uint8)
    smooth = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth, np.float32) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _about(bundle: Bundle, engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "model": bundle.manifest.model.get("source", "unknown"),
        "engine": engine.name,
        "engine_details": engine.details(),
        "precision": engine.precision,
        "image_size": list(bundle.manifest.image_size),
        "images": "random" if args.images is None else list(args.images),
        "versions": {"regraft": __version__, "python": platform.python_version()},
        "processor": processor(),
    }


def _table(about: dict[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    height, width = about["image_size"]
    details = ", ".join(f"{name} {value}" for name, value in about["engine_details"].items())
    yield f"{about['model']}, {about['precision']}, {height} x {width} pixels"
    yield f"{about['engine']} ({details}) on {about['processor']}"
    if about["images"] == "random":
        yield "random pictures; --images takes yours"
    heads = ("baseline ms (p99)", "patched ms (p99)", "ratio (95 %)")
    yield f"batch  {heads[0]:<21}{heads[1]:<21}{heads[2]:<24}images/s  rounds"
    for row in rows:
        base = f"{row.baseline_ms:.2f} ({row.baseline_p99_ms:.2f})"
        patched = f"{row.patched_ms:.2f} ({row.patched_p99_ms:.2f})"
        rate = f"{row.patched_images_per_second:.1f}"
        yield f"{row.batch:<7}{base:<21}{patched:<21}{_said(row.ratio):<24}{rate:<10}{row.rounds}"
    if any(row.on_device for row in rows):
        yield (
            "the device alone, by its own clock, nothing copied (a graph opened again may differ "
            "by some percent):"
        )
    for batch, own in ((row.batch, row.on_device) for row in rows):
        if own is not None:
            rate = f"{batch / own.patched_ms * 1e3:.1f}"
            yield (
                f"{batch:<7}{own.baseline_ms:<21.3f}{own.patched_ms:<21.3f}"
                f"{_said(own.ratio):<24}{rate:<10}{own.rounds}"
            )


def _said(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
