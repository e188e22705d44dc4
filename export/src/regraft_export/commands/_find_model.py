"""MODEL of ``regraft find``: a PyTorch model, or an ONNX file that somebody else exported.

Arguments that only one of the two has, and opening either as a subject.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import InputError, UsageError
from regraft.wording import counted
from regraft_export.commands._model_arguments import load_model, preprocessing_overrides

if TYPE_CHECKING:
    from regraft.preprocessing import Preprocessing
    from regraft_export.finding.subject import Subject

_Opened = tuple["Subject", "Preprocessing", dict[str, Any]]


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what is for ONNX files alone."""
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


def device_name(text: str) -> str:
    """An argument type: a device as torch names it."""
    if not re.fullmatch(r"(cpu|cuda)(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; expected cpu, cuda or cuda:N")
    return text


def open_model(args: argparse.Namespace) -> _Opened:
    """Opens what the arguments name; imports torch only for a PyTorch model.

    Returns:
        The subject, its preprocessing, and what the neurons file says of both.

    Raises:
        UsageError: an argument is for the other kind of model.
        ModelError: see :func:`load_model` and :func:`regraft_export.foreign.opening.open_file`.
        RewriteError: no register can be appended to what the file holds.
        InputError: ``--output`` does not do, or there is no such device here.
    """
    return _of_file(args) if _is_file(args.model) else _of_pytorch(args)


def _is_file(model: str) -> bool:
    """Whether MODEL is an ONNX file: by its suffix, or because it is a file at all."""
    return model.lower().endswith(".onnx") or Path(model).is_file()


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
