"""Traces a model, redirects its register neurons in the graph, verifies it, writes a bundle.

The graph is verified token by token against PyTorch with hooks on the given images before the
bundle appears; a bundle that is not equal is not written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.options import at_least, batch_size, integers
from regraft.constants import VARIANTS
from regraft.errors import UsageError
from regraft.wording import counted
from regraft_export.commands._export_images import CALIBRATION, ImageBatches, shared_out
from regraft_export.commands._model_arguments import add_model_arguments, load_model
from regraft_export.commands._redirect_arguments import add_redirect_arguments, redirect_options

if TYPE_CHECKING:
    from regraft.manifest import Manifest
    from regraft.verification import Verification

_PRECISIONS = ("fp32", "fp16", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--neurons", required=True, metavar="FILE", help="neurons.json")
    parser.add_argument(
        "--images", required=True, nargs="+", metavar="DIR", help="images to verify on"
    )
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="the folder to write")
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        default="token",
        help="token: a register runs through the network (default); kv: the neurons are silenced "
        "in the weights, and later attentions see the register's mean key and value",
    )
    parser.add_argument(
        "--calibration-images",
        type=at_least(1),
        metavar="N",
        help="--variant kv: take the mean over at most N of the --images, none of which is "
        f"verified on (default: {CALIBRATION})",
    )
    add_redirect_arguments(parser)
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument(
        "--layers",
        type=integers(0),
        default=(),
        metavar="L,...",
        help="raw outputs of these blocks",
    )
    outputs.add_argument(
        "--attentions", type=integers(0), default=(), metavar="L,...", help="their CLS attention"
    )
    parser.add_argument("--precision", choices=_PRECISIONS, default="fp32")
    parser.add_argument(
        "--cuda-operators",
        action="store_true",
        help="let the graphs of ort-cuda use CUDA operators of regraft's own: faster, and `regraft "
        "build` then compiles them, with nvcc",
    )
    parser.add_argument(
        "--no-baseline", action="store_true", help="leave the unpatched model and the probes out"
    )
    parser.add_argument(
        "--max-images", type=at_least(1), default=32, metavar="N", help="to verify on (default: 32)"
    )
    parser.add_argument("--batch-size", type=batch_size, default=8, metavar="N")
    parser.add_argument(
        "--strict", action="store_true", help="write nothing if an image cannot be read"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace BUNDLE if it exists; export although the neurons were found in other "
        "weights, at another image size or with another preprocessing",
    )
    parser.add_argument("--json", action="store_true", help="print the findings for machines")


def run(args: argparse.Namespace) -> int:
    """Exports, and prints what was found."""
    from regraft.files import check_output
    from regraft.image_files import list_images
    from regraft.manifest import NAME
    from regraft.neurons import Neurons
    from regraft.progress import Progress
    from regraft_export.exporting import export_bundle
    from regraft_export.identity import check_identity
    from regraft_export.outlier_level import measured_level, recorded_level
    from regraft_export.vit.structure import from_module

    if args.calibration_images is not None and args.variant != "kv":
        raise UsageError(
            f"--calibration-images is for --variant kv, and the variant is {args.variant}; give "
            "both or neither"
        )
    check_output(args.out, args.force, marker=NAME)
    neurons = Neurons.load(args.neurons)
    options = _options(args)
    paths, apart = shared_out(list_images(args.images), args)
    loaded = load_model(args)
    vit = from_module(loaded.module, loaded.preprocessing.image_size)
    options.check_against(vit)
    for warning in check_identity(neurons, loaded, vit, args.force):
        print(f"regraft: warning: {warning}", file=sys.stderr)
    images = ImageBatches(paths, loaded.preprocessing, args.batch_size)
    calibration = ImageBatches(apart, loaded.preprocessing, args.batch_size)
    if args.strict:
        images.check_all()
    if args.strict and apart:
        calibration.check_all()
    level = recorded_level(neurons, vit.layout.depth) or measured_level(vit, neurons, images)
    with Progress(len(paths) + len(apart), "images", "verifying") as progress:
        exported = export_bundle(
            loaded,
            vit,
            neurons,
            lambda: images,
            level,
            Path(args.out),
            options,
            calibration=lambda: calibration,
            force=args.force,
            on_batch=progress.advance,
        )
    if args.json:
        verification = exported.verification.to_json()
        print(json.dumps({"out": args.out, "verify": verification}, allow_nan=False))
    else:
        print("\n".join(_summary(args.out, exported.manifest, exported.verification)))
    return 0


def _options(args: argparse.Namespace) -> Any:
    from regraft_export.export_options import ExportOptions

    return ExportOptions(
        redirect=redirect_options(args),
        precision=args.precision,
        layers=args.layers,
        attentions=args.attentions,
        baseline=not args.no_baseline,
        variant=args.variant,
        operators=args.cuda_operators,
    )


def _summary(out: str, manifest: Manifest, verification: Verification) -> Iterator[str]:
    from regraft.commands.verify import lines

    sites = manifest.sites
    yield (
        f"{out}: {manifest.model['source']}, {manifest.precision}, opset {manifest.opset}, "
        f"{sum(r.bytes for r in manifest.files.values()) / 1e6:.1f} MB"
    )
    yield (
        f"sites: {sites.token} token, {sites.redirect} redirect (layers "
        f"{', '.join(map(str, manifest.layers))}), {sites.output} output, {sites.attention} "
        f"attention; {len(sites.mended)} baked token counts mended"
    )
    made = manifest.constants
    if made is not None:
        none = max(made.errors)
        yield (
            f"constants: from layer {made.first_layer} on, mean of "
            f"{counted(made.images, 'image')}; error to the variant token "
            f"{made.errors[made.first_layer]:.2g}, without constants "
            f"{made.errors[none]:.2g} (on {counted(made.measured_images, 'image')})"
        )
    yield from lines(verification)
    if manifest.cuda_missing:
        yield f"ort-cuda: no graph of its own, runs the portable one: {manifest.cuda_missing}"
    elif manifest.cuda is not None and manifest.cuda.operators:
        yield (
            "ort-cuda: its graphs have CUDA operators of regraft's own, verified here by what they "
            "stand for, in fp32; `regraft build` compiles them and verifies them on the card"
        )
    elif manifest.precision != "fp32":
        yield (
            "ort-cuda: its graphs were verified in fp32; a CPU has no "
            f"{manifest.precision} kernels for them"
        )
    if not manifest.verified:
        yield (
            f"ort-cpu cannot run {manifest.precision}: the same rewrite was verified in fp32; the "
            f"{manifest.precision} graph itself is unverified until `regraft build {out}` verifies "
            "it on an engine that runs it"
        )
