"""Verifies a bundle on images: parity of an engine, and what the patch does to the features.

Without --model the reference is the graph that export verified, run by ort-cpu with its optimiser
off. With --model (needs regraft-export) it is PyTorch with hooks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft import side_by_side
from regraft.bundle import Bundle
from regraft.cli.options import add_engine, at_least, batch_size
from regraft.engines import EngineOptions
from regraft.errors import InputError, UsageError, how_to_install
from regraft.image_files import list_images
from regraft.manifest import CUDA_GRAPHS
from regraft.pipeline import Failure, batches
from regraft.progress import Progress
from regraft.side_by_side import Agreement, AgreementMeter, Side, expect_one_model
from regraft.verification import Engines, Reference, UnoptimisedGraph, Verification, verify
from regraft.wording import counted, none_read, some_unread

REFERENCES = "regraft.references"  # entry points: how a MODEL becomes a Reference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `regraft export` wrote")
    parser.add_argument("--images", required=True, nargs="+", metavar="DIR", help="any images")
    parser.add_argument(
        "--against",
        metavar="BUNDLE",
        help="verify another bundle of the same model too, and show both side by side (for "
        "instance the variants token and kv)",
    )
    add_reference(parser)
    add_engine(parser)
    parser.add_argument("--batch-size", type=batch_size, default=8, metavar="N")
    parser.add_argument("--max-images", type=at_least(1), metavar="N", help="take only the first N")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if an image cannot be read"
    )
    parser.add_argument("--json", action="store_true", help="print the findings for machines")


def add_reference(parser: argparse.ArgumentParser) -> None:
    """Adds ``--model`` and ``--weights``, which :func:`open_reference` reads."""
    parser.add_argument(
        "--model", metavar="MODEL", help="compare with PyTorch and hooks (needs regraft-export)"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights for --model")


def run(args: argparse.Namespace) -> int:
    """Verifies, prints the findings, and fails if a limit is missed."""
    bundle = Bundle.open(args.bundle)
    other = None if args.against is None else Bundle.open(args.against)
    if other is not None:
        expect_one_model(bundle, other)
    paths = list_images(args.images)[: args.max_images]
    images = _Images(paths, args.batch_size)
    if other is None:
        found = _verified(bundle, args, images)
        said, words = found.to_json(), lines(found)
        verified = [found]
    else:
        sides, agreement = _side_by_side(bundle, other, args, images)
        said = {**sides[0].to_json(), **side_by_side.to_json(sides[1], agreement)}
        verified = [side.found for side in sides]
        blocks = [
            lines(side.found, f"{path}, variant {side.manifest.variant}")
            for side, path in zip(sides, (bundle.path, other.path), strict=True)
        ]
        words = chain(*blocks, side_by_side.lines(sides, agreement))
    print(json.dumps(said, allow_nan=False) if args.json else "\n".join(words))
    sys.stdout.flush()
    for one in verified:
        one.gate()
    if images.failed and args.strict:
        raise InputError(some_unread(len(images.failed), len(paths)))
    return 0


@dataclass
class _Images:
    """The images, decoded anew for each bundle; each that cannot be read is named once."""

    paths: Sequence[Path]
    batch_size: int
    failed: set[str] = field(default_factory=set)

    def batches(self, bundle: Bundle, progress: Progress) -> Iterator[NDArray[np.float32]]:
        def skip(failure: Failure) -> None:
            if failure.path in self.failed:
                progress.advance()
            else:
                progress.leave_out(failure.message)
            self.failed.add(failure.path)

        steps = bundle.manifest.preprocessing
        for batch in batches(self.paths, steps, self.batch_size, on_error=skip):
            yield batch.pixels


def _verified(
    bundle: Bundle, args: argparse.Namespace, images: _Images, **more: Any
) -> Verification:
    with ExitStack() as stack:
        reference = stack.enter_context(open_reference(bundle, args))
        progress = stack.enter_context(Progress(len(images.paths), "images", "verifying"))
        found = verify(
            bundle,
            images.batches(bundle, progress),
            reference,
            args.engine,
            EngineOptions(args.threads, precision=args.precision),
            on_batch=progress.advance,
            **more,
        )
    if not found.images:
        raise InputError(none_read(len(images.paths)))
    return found


def _side_by_side(
    bundle: Bundle, other: Bundle, args: argparse.Namespace, images: _Images
) -> tuple[tuple[Side, Side], list[Agreement]]:
    """Both verified, and how well what they give agrees."""
    agreement = AgreementMeter(bundle.manifest.tokens)
    options = EngineOptions(args.threads, precision=args.precision)
    with Engines(other, args.engine, options) as engines:

        def compare(pixels: NDArray[np.float32], outputs: Any) -> None:
            agreement.update(outputs, engines["model"].run(pixels))

        first = Side(bundle.manifest, _verified(bundle, args, images, on_outputs=compare))
    second = Side(other.manifest, _verified(other, args, images))
    return (first, second), agreement.result()


def open_reference(bundle: Bundle, args: argparse.Namespace) -> Any:
    """A context manager of what the engine is compared with.

    Raises:
        UsageError: ``--weights`` without ``--model``.
        InputError: ``--model`` without regraft-export, or a bundle whose graph cannot be its own
            reference.
    """
    if args.model is None:
        if args.weights is not None:
            raise UsageError("--weights is given without --model; give both or neither")
        if bundle.manifest.precision == "bf16":
            raise InputError(
                f"{bundle.path}: is a bf16 bundle, which ort-cpu, the reference without PyTorch, "
                "cannot run; give --model MODEL (needs regraft-export)"
            )
        return UnoptimisedGraph(bundle, args.threads)
    found = entry_points(group=REFERENCES, name="pytorch")
    if not found:
        raise InputError(
            f"--model needs the export distribution; {how_to_install('regraft-export')}"
        )
    reference: Reference = next(iter(found)).load()(bundle, args.model, args.weights)
    return reference


def lines(found: Verification, of: str = "") -> Iterator[str]:
    """A verification in words, a table and a few sentences.

    Args:
        found: what was found.
        of: of which bundle, where there are several.
    """
    verdict = "passed" if found.passed else "FAILED"
    yield (
        f"{of and f'{of}: '}parity of {found.engine} ({found.precision}) with {found.reference}, "
        f"{counted(found.images, 'image')}: {verdict}"
    )
    cosines = f"{'token cosine':>14}{'worst token':>13}{'image':>10}"
    yield f"  {'graph':<16}{'output':<22}{'relative error':>15}{cosines}"
    for c in found.parity:
        if c.graph in ("model", "baseline") or not c.passed:
            tokens = "" if c.token_cosine is None else f"{c.token_cosine:.6f}"
            worst = "" if c.worst_token is None else f"{c.worst_token.cosine:.6f}"
            image = "" if c.image_cosine is None else f"{c.image_cosine:.6f}"
            figures = f"{c.relative_error:>15.1e}{tokens:>14}{worst:>13}{image:>10}"
            yield f"  {c.graph:<16}{c.output:<22}{figures}{'' if c.passed else '  FAILED'}"
    others = {
        "probes": ("probe",),
        "graphs of ort-cuda, run by ort-cpu": tuple(CUDA_GRAPHS.values()),
    }
    for title, prefix in others.items():
        if rows := [c for c in found.parity if c.graph.startswith(prefix)]:
            largest = max(c.relative_error for c in rows)
            outputs = counted(len(rows), "output")
            yield f"  {title}: {outputs} compared, largest relative error {largest:.1e}"
    effect = found.effect
    if effect is None:
        bf16 = ", or they are bf16, which ort-cpu cannot run" if found.precision == "bf16" else ""
        yield f"effect: not measured, the bundle has no probes (exported with --no-baseline){bf16}"
        return
    yield (
        f"effect at layer {effect.detection_layer}: outlier tokens (norm above "
        f"{effect.threshold:.4g}) {effect.before.outliers} -> {effect.after.outliers} of "
        f"{effect.patches}; largest patch norm {effect.before.largest:.4g} -> "
        f"{effect.after.largest:.4g}, median {effect.before.median:.4g} -> "
        f"{effect.after.median:.4g}"
    )
    share = effect.register_attention[effect.detection_layer]
    norm = effect.register_norm
    register = "constants: " if norm is None else f"register: norm {norm:.4g}, "
    yield (
        f"  {register}{share:.1%} of the attention there; "
        f"cosine of {effect.cosine_of} to the baseline: median {effect.cosine_median:.4f}, "
        f"smallest {effect.cosine_smallest:.4f}"
    )
