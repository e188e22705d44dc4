"""Finds a model's register neurons: the few MLP units that write its outlier tokens.

The model is a PyTorch one, or an ONNX file that somebody else exported; then PyTorch is not needed.
The images are split by seed into three parts: one to see where outlier tokens are and to score all
units, one (at most 32) to select the fewest that have to be redirected, one (at most 32) to report
what that does. A model without outlier tokens needs no patch, is told so, and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.options import add_force, at_least, file_name, number, thread_count
from regraft.errors import InputError, UsageError
from regraft.wording import counted, some_unread
from regraft_export.commands._model_arguments import (
    add_model_arguments,
    load_model,
    preprocessing_overrides,
)

if TYPE_CHECKING:
    from regraft.pipeline import Failure
    from regraft.preprocessing import Preprocessing
    from regraft_export.finding.find import Found
    from regraft_export.finding.subject import Subject


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
        "--batch-size", type=at_least(1), default=16, metavar="N", help="images per pass (16)"
    )
    parser.add_argument(
        "--workers", type=thread_count, metavar="N", help="decoding threads (one per core)"
    )
    parser.add_argument(
        "--device",
        type=_device_name,
        default="cpu",
        help="cpu (default), cuda, cuda:1, ... (ONNX files: cpu)",
    )
    parser.add_argument("--strict", action="store_true", help="exit 1 if an image cannot be read")
    add_force(parser)
    parser.add_argument("--json", action="store_true", help="print the figures for machines")
    _add_method_arguments(parser)
    group = parser.add_argument_group("where MODEL is an ONNX file")
    group.add_argument(
        "--prefix",
        metavar="NAME",
        help="which stack of blocks, where the file has several: how the names of its nodes or "
        "weights begin, or the name of its input",
    )
    group.add_argument(
        "--output",
        metavar="NAME",
        help="the output by which a redirect's effect is judged, where several could be",
    )


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
    from regraft.images import list_images

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
        print(json.dumps(_figures(args, found), indent=1, allow_nan=False))
    else:
        print("\n".join(_summary(args, found)))
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
    subject, preprocessing, about = (_of_file if _is_file(args.model) else _of_pytorch)(args)
    images = FileImages(
        paths, preprocessing, batch_size=args.batch_size, workers=args.workers, on_failure=skip
    )
    return find_neurons(subject, images, options, about=about, progress=start)


def _is_file(model: str) -> bool:
    """Whether MODEL is an ONNX file: by its suffix, or because it is a file at all."""
    return model.lower().endswith(".onnx") or Path(model).is_file()


_Opened = tuple["Subject", "Preprocessing", dict[str, Any]]


def _of_pytorch(args: argparse.Namespace) -> _Opened:
    for name in ("prefix", "output"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} is for ONNX files alone; MODEL is {args.model!r}")
    from regraft_export.finding.pytorch import PyTorchSubject
    from regraft_export.vit.structure import from_module

    loaded = load_model(args, also=", or a file IN.onnx")
    module = loaded.module.to(_device(args.device))
    about = {
        "model": loaded.source,
        "architecture": loaded.architecture,
        "weights_sha256": loaded.weights_sha256,
        "image_size": list(loaded.preprocessing.image_size),
        "preprocessing": loaded.preprocessing.to_json(),
    }
    vit = from_module(module, loaded.preprocessing.image_size)
    return PyTorchSubject(vit), loaded.preprocessing, about


def _of_file(args: argparse.Namespace) -> _Opened:
    wrong = {"--weights": args.weights is not None, "--trust-repo": args.trust_repo}
    for name in (name for name, given in wrong.items() if given):
        raise UsageError(
            f"{name} is for PyTorch models; {args.model} has its own weights and no code"
        )
    if args.device != "cpu":
        raise UsageError(
            f"--device is {args.device!r}; an ONNX file runs on the CPU here: leave it out"
        )
    from regraft_export.foreign.opening import open_file

    opened = open_file(
        args.model, preprocessing_overrides(args), prefix=args.prefix, output=args.output
    )
    return opened.subject, opened.preprocessing, opened.about


def _device_name(text: str) -> str:
    """An argument type: a device as torch names it."""
    if not re.fullmatch(r"(cpu|cuda)(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; expected cpu, cuda or cuda:N")
    return text


def _device(name: str) -> Any:
    """The torch device of this name.

    Raises:
        InputError: there is no such device here.
    """
    import torch

    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(
            f"--device is {name!r}; torch sees {counted(count, 'CUDA device')} here: use "
            "--device cpu"
        )
    return device


def _figures(args: argparse.Namespace, found: Found) -> dict[str, Any]:
    about = found.neurons.about
    return {
        "out": args.out,
        "neurons": [[n.layer, n.index] for n in found.neurons.neurons],
        "layers": list(found.neurons.layers),
        "detection_layer": about["detection_layer"],
        "threshold": about["threshold"],
        "images": about["images"],
        "report": about["report"],
        "seconds": dict(found.seconds),
        "selection_runs": found.runs,
    }


def _summary(args: argparse.Namespace, found: Found) -> Iterator[str]:
    neurons, about = found.neurons, found.neurons.about
    images, report = about["images"], about["report"]
    before = report["before"]
    where = ", ".join(f"{len(neurons.of(layer))} in layer {layer}" for layer in neurons.layers)
    yield f"{args.model}: {counted(len(neurons.neurons), 'register neuron')} ({where})"
    yield (
        f"outlier tokens: patch norm above {about['threshold']:.4g} at layer "
        f"{about['detection_layer']} (median {before['median_norm']:.4g}), "
        f"{before['outlier_share']:.2%} of the patches"
    )
    yield (
        f"images: {images['score']} to score, {images['select']} to select, {images['report']} "
        f"for this table ({report['output']} output)"
    )
    if about.get("precision") == "bf16":
        yield "run as its float32 twin: ONNX Runtime has no bfloat16 on the CPU"
    yield ""
    yield from _table(report)
    yield ""
    seconds = found.seconds
    yield (
        f"{sum(seconds.values()):.1f} s: detection {seconds['detection']:.1f}, scoring "
        f"{seconds['scoring']:.1f}, selection {seconds['selection']:.1f} "
        f"({counted(found.runs, 'image')} run), report {seconds['report']:.1f}"
    )
    yield f"written: {args.out}"


def _table(report: dict[str, Any]) -> Iterator[str]:
    rows = {
        "as it is": report["before"],
        "redirected": report["after"],
        "control: random neurons": report["controls"]["random_neurons"],
        "control: zero token alone": report["controls"]["zero_token"],
        "control: zeroed, no register": report["controls"]["zeroed_without_register"],
    }
    yield f"{'':<30}{'outliers':>10}{'largest/median':>16}{'median output cosine':>22}"
    for name, figures in rows.items():
        cosine = figures.get("output_cosine_median", 1.0)
        yield (
            f"{name:<30}{figures['outlier_tokens']:>10}{figures['largest_over_median']:>16.2f}"
            f"{cosine:>22.4f}"
        )
