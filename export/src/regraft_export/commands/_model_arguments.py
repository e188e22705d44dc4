"""Arguments that say which model and how its images are preprocessed; shared by commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.cli.options import integers, number
from regraft.errors import UsageError

if TYPE_CHECKING:
    from regraft_export.sources import LoadedModel, PreprocessingOverrides

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_CROP_MODES = ("center", "squash", "border")


def add_model_arguments(parser: argparse.ArgumentParser, *, also: str = "") -> None:
    """Declares MODEL, ``--weights`` and what overrides the model's own preprocessing.

    Args:
        parser: of the command.
        also: what else MODEL may be there, for its help.
    """
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="timm:NAME, hf:REPO_OR_FOLDER, open_clip:ARCH/PRETRAINED, hub:REPO:ENTRY (torch.hub; "
        "runs the repository's code), or python:FILE.py:FUNCTION, a function that returns an "
        "nn.Module, or a pair of it and a dict with timm's data-config names (models of "
        f"timm.create_model bring their own){also}",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="safetensors, or a checkpoint of tensors alone, instead of the download",
    )
    parser.add_argument(
        "--trust-repo",
        action="store_true",
        help="let hub: run the code of a repository that torch.hub does not trust yet",
    )
    group = parser.add_argument_group("preprocessing (default: the model's own)")
    group.add_argument(
        "--image-size", type=image_size, metavar="N", help="one number, or height,width"
    )
    add_preprocessing_arguments(group)


def add_preprocessing_arguments(group: argparse._ArgumentGroup) -> None:
    """Declares what overrides the preprocessing, but for the image size."""
    group.add_argument("--mean", type=number(), nargs=3, metavar=("R", "G", "B"))
    group.add_argument("--std", type=number(above=0), nargs=3, metavar=("R", "G", "B"))
    group.add_argument("--interpolation", choices=_INTERPOLATIONS)
    group.add_argument(
        "--crop-pct",
        type=number(above=0, most=1),
        metavar="SHARE",
        help="share of the resized picture that is kept, at most 1",
    )
    group.add_argument("--crop-mode", choices=_CROP_MODES)


def load_model(args: argparse.Namespace, *, also: str = "") -> LoadedModel:
    """Loads what the arguments name; imports torch.

    Args:
        args: as :func:`add_model_arguments` declares them.
        also: as of :func:`regraft_export.sources.load`.

    Raises:
        UsageError: ``--trust-repo`` for a model of another source.
        ModelError: see :func:`regraft_export.sources.load`.
    """
    from regraft_export.sources import load

    if args.trust_repo and not args.model.startswith("hub:"):
        raise UsageError(
            f"--trust-repo is for models of hub:REPO:ENTRY alone; MODEL is {args.model!r}"
        )
    overrides = preprocessing_overrides(args)
    return load(
        args.model,
        weights=args.weights,
        overrides=overrides,
        trust_repo=args.trust_repo,
        also=also,
    )


def preprocessing_overrides(args: argparse.Namespace) -> PreprocessingOverrides:
    """What the arguments say of the preprocessing."""
    from regraft_export.sources import PreprocessingOverrides

    return PreprocessingOverrides(
        image_size=args.image_size,
        mean=None if args.mean is None else (args.mean[0], args.mean[1], args.mean[2]),
        std=None if args.std is None else (args.std[0], args.std[1], args.std[2]),
        interpolation=args.interpolation,
        crop_pct=args.crop_pct,
        crop_mode=args.crop_mode,
    )


def image_size(text: str) -> tuple[int, int]:
    """An argument type: (H, W), of one number or two."""
    from regraft.preprocessing import MAX_EDGE

    given = integers(1, MAX_EDGE)(text)
    if len(given) > 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} has {len(given)} numbers; expected one, or two: height,width"
        )
    return given[0], given[-1]
