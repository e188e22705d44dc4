"""Writes a model repository for NVIDIA's Triton Inference Server.

It holds three models: NAME takes preprocessed pixels, NAME_images takes image files (JPEG and
others), and NAME_preprocess is what the latter decodes with. ONNX Runtime executes the bundle's
graph; with --plan, TensorRT executes that engine, which has to be of the server's TensorRT version
and GPU. NAME_preprocess needs regraft-runtime in the server's Python: pip install regraft-runtime
in an image derived from Triton's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from regraft.bundle import Bundle
from regraft.cli.options import add_force, at_least
from regraft.errors import UsageError
from regraft.triton.config import Serving
from regraft.triton.repository import write_repository


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    standard = Serving("")
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `regraft export` wrote")
    parser.add_argument("--out", required=True, metavar="REPOSITORY", help="the folder to write")
    parser.add_argument("--name", help="of the model (default: the bundle folder's name)")
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="a TensorRT engine to serve (implies a GPU)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), help="what runs the model (default: cpu)"
    )
    for option, least, default, words in (
        ("--max-batch", 1, standard.max_batch, "images in one run"),
        ("--instances", 1, standard.instances, "copies of the model; with gpu, per GPU"),
        ("--preprocess-instances", 1, standard.preprocess_instances, "processes that decode"),
        ("--max-queue", 1, standard.max_queue, "requests that wait; further ones are refused"),
        ("--timeout-ms", 0, standard.timeout_ms, "that a request waits at most; 0: no limit"),
        ("--delay-us", 0, standard.delay_us, "that a request waits for others in its batch"),
    ):
        parser.add_argument(
            option,
            type=at_least(least),
            default=default,
            metavar="N",
            help=f"{words} (default: {default})",
        )
    add_force(parser)
    parser.add_argument("--json", action="store_true", help="print the files for machines")


def run(args: argparse.Namespace) -> int:
    """Writes the repository and says what is in it."""
    if args.plan is not None and args.device == "cpu":
        raise UsageError("--plan needs a GPU, and --device is cpu; leave --device out")
    bundle = Bundle.open(args.bundle)
    serving = Serving(
        name=args.name or bundle.path.resolve().name,
        gpu=args.plan is not None or args.device == "gpu",
        tensorrt=args.plan is not None,
        max_batch=args.max_batch,
        instances=args.instances,
        preprocess_instances=args.preprocess_instances,
        max_queue=args.max_queue,
        timeout_ms=args.timeout_ms,
        delay_us=args.delay_us,
    )
    files = write_repository(bundle, serving, args.out, plan=args.plan, force=args.force)
    if args.json:
        print(json.dumps({"out": args.out, "files": [str(file) for file in files]}))
    else:
        print(f"{args.out}: models {serving.name}, {serving.preprocess}, {serving.images}")
        for file in files:
            print(f"  {file}")
    return 0
