"""Finds a model's register neurons: the few MLP units that write its outlier tokens.

The model is a PyTorch one, or an ONNX file that somebody else exported; then PyTorch is not needed.
The images are split by seed into three parts: one to see where outlier tokens are and to score all
units, one (at most 32) to select the fewest that have to be redirected, one (at most 32) to report
what that does. A model without outlier tokens needs no patch, is told so, and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.cli.options import add_force, at_least, batch_size, file_name, number, thread_count
from regraft.errors import InputError, UsageError
from regraft.wording import counted, some_unread
from regraft_export.commands._find_model import add_file_arguments, device_name, open_model
from regraft_export.commands._find_summary import figures, summary
from regraft_export.commands._model_arguments import add_model_arguments

if TYPE_CHECKING:
    from regraft.pipeline import Failure
    from regraft_export.finding.find import Found

ENOUGH = 100  # images; with fewer there is a warning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_model_arguments(
        parser,
        also=", or IN.onnx as an exporter wrote it, which has no preprocessing: give all of it",
    )
    parser.add_argument(
        "--images",
        required=True,
        nargs="+",
        metavar="DIR",
        help=f"images, {ENOUGH} or more, like those the model will see",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=file_name(".json"),
        metavar="FILE.json",
        help="the neurons file to write",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the split (default: 0)")
    parser.add_argument(
        "--batch-size", type=batch_size, default=16, metavar="N", help="images per pass (16)"
    )
    parser.add_argument(
        "--workers", type=thread_count, metavar="N", help="decoding threads (one per core)"
    )
    parser.add_argument(
        "--device",
        type=device_name,
        default="cpu",
        help="cpu (default), cuda, cuda:1, ... (ONNX files: cpu)",
    )
    parser.add_argument("--strict", action="store_true", help="exit 1 if an image cannot be read")
    add_force(parser)
    parser.add_argument("--json", action="store_true", help="print the figures for machines")
    _add_method_arguments(parser)
    add_file_arguments(parser)


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method (defaults fit most models)")
    group.add_argument(
        "--score",
        choices=("contribution", "activation"),
        default="contribution",
        help="contribution to the outliers' norm (default), or the paper's mean activation, which "
        "may need --max-layer",
    )
    group.add_argument(
        "--threshold",
        type=number(above=0),
        metavar="NORM",
        help="patch norm above which a token is one",
    )
    group.add_argument(
        "--detection-layer", type=at_least(0), metavar="L", help="block at whose output, from 0"
    )
    group.add_argument(
        "--max-layer",
        type=at_least(0),
        metavar="L",
        help="last block to score (default: detection layer)",
    )
    group.add_argument(
        "--max-neurons",
        type=at_least(1),
        default=512,
        metavar="N",
        help="select at most so many (512)",
    )


def run(args: argparse.Namespace) -> int:
    """Finds the neurons, writes the file, prints a summary."""
    from regraft.files import check_output, whole_file
    from regraft.image_files import list_images

    if args.detection_layer is not None and (args.max_layer or 0) > args.detection_layer:
        raise UsageError(
            f"--max-layer is {args.max_layer} and --detection-layer {args.detection_layer}; "
            "expected at most that layer: later ones cannot have written what is there"
        )
    check_output(args.out, args.force)
    paths = list_images(args.images)
    failures: list[Failure] = []
    found = _find(args, paths, failures)
    text = json.dumps(found.neurons.to_json(), indent=1, allow_nan=False) + "\n"
    with whole_file(args.out, args.force) as path:
        path.write_text(text, encoding="utf-8")
    used = found.neurons.about["images"]
    _warn_of_few(sum(used[part] for part in ("score", "select", "report")))
    for layer in found.report.left_later(found.neurons.about["detection_layer"]):
        entry = found.report.layers[layer]
        print(
            f"regraft: warning: at layer {layer}, {entry['outliers_after']} of "
            f"{entry['outliers_before']} outlier tokens are left; --detection-layer {layer} looks "
            "there",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps(figures(args, found), indent=1, allow_nan=False))
    else:
        print("\n".join(summary(args, found)))
    if failures and args.strict:
        raise InputError(
            f"{some_unread(len(failures), len(paths))}; {args.out} "
            "was found on the others; without --strict this is no error"
        )
    return 0


def _warn_of_few(images: int) -> None:
    if images < ENOUGH:
        print(
            f"regraft: warning: found on {counted(images, 'image')}; expected {ENOUGH} or more "
            "like those the model will see: with so few, units and figures may be chance",
            file=sys.stderr,
        )


def _find(args: argparse.Namespace, paths: list[Path], failures: list[Failure]) -> Found:
    from regraft.progress import Progress
    from regraft_export.finding.find import FindOptions, find_neurons
    from regraft_export.finding.parts import FileImages

    bars: list[Progress] = []

    def start(total: int | None, unit: str, label: str) -> Progress:
        bars[:] = [Progress(total, unit, label)]
        return bars[0]

    def skip(failure: Failure) -> None:
        failures.append(failure)
        bars[0].note(f"regraft: {failure.message}")

    options = FindOptions(
        seed=args.seed,
        score=args.score,
        threshold=args.threshold,
        detection_layer=args.detection_layer,
        max_layer=args.max_layer,
        max_neurons=args.max_neurons,
        batch_size=args.batch_size,
    )
    subject, preprocessing, about = open_model(args)
    images = FileImages(
        paths, preprocessing, batch_size=args.batch_size, workers=args.workers, on_failure=skip
    )
    return find_neurons(subject, images, options, about=about, progress=start)
