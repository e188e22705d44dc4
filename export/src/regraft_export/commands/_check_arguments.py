"""``--check`` of ``regraft patch``: its arguments, its pictures, and what it found in words."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.cli.options import at_least
from regraft.errors import EngineError, InputError, ModelError, RewriteError, UsageError
from regraft.wording import counted, none_read
from regraft_export.commands._model_arguments import (
    add_preprocessing_arguments,
    preprocessing_overrides,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from regraft.neurons import Neurons
    from regraft.preprocessing import Preprocessing
    from regraft.redirect import RedirectOptions
    from regraft_export.foreign.check.checked import Checked
    from regraft_export.foreign.patching import Patched
    from regraft_export.foreign.survey import Survey
    from regraft_export.onnx_file.read import OnnxFile

_IMAGES = 8
_PREPARES = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares them."""
    group = parser.add_argument_group(
        "check (preprocessing: as in the neurons file, unless given here)"
    )
    group.add_argument(
        "--check",
        type=Path,
        metavar="DIR",
        help="a folder of images: the patched graph must give what the method gives, written in "
        "numpy on the unpatched file, or nothing is written; needs onnxruntime",
    )
    group.add_argument(
        "--check-images",
        type=at_least(1),
        metavar="N",
        help=f"take only the first N images (default: {_IMAGES})",
    )
    add_preprocessing_arguments(group)


def refuse_alone(args: argparse.Namespace) -> None:
    """Raises UsageError if something is said of a check that is not asked for."""
    names = ("check_images", *_PREPARES)
    given = [name for name in names if getattr(args, name) is not None]
    if args.check is None and given:
        option = given[0].replace("_", "-")
        raise UsageError(f"--{option} is given without --check DIR; give both or neither")


def images(args: argparse.Namespace, neurons: Neurons, found: Survey) -> NDArray[np.float32]:
    """The images to check on: float32 (N, 3, H, W).

    Raises:
        InputError: there are none, none can be read, or the preprocessing is not known.
        ModelError: the file takes no pictures of three channels.
    """
    import numpy as np

    from regraft.image_files import list_images
    from regraft.pipeline import Failure, batches
    from regraft.progress import Progress

    channels = found.image.shape[1]
    if channels not in (None, 3):
        raise ModelError(
            f"{found.file.path}: its input {found.image.name!r} has {channels} channels; --check "
            "prepares pictures of 3"
        )
    paths = list_images(args.check)[: args.check_images or _IMAGES]
    steps = _preprocessing(args, neurons, found)
    with Progress(len(paths), "images", "reading") as progress:

        def skip(failure: Failure) -> None:
            progress.leave_out(failure.message)

        read = [batch.pixels for batch in batches(paths, steps, len(paths), on_error=skip)]
    if not read:
        raise InputError(f"{args.check}: {none_read(len(paths))}, so nothing can be checked")
    return np.concatenate(read)


def _preprocessing(args: argparse.Namespace, neurons: Neurons, found: Survey) -> Preprocessing:
    from dataclasses import replace

    from regraft.neurons_about import preprocessing_of
    from regraft_export.sources.data_config import from_data_config, override

    # Whatever the neurons were found at, a file for one size takes that.
    sized = replace(preprocessing_overrides(args), image_size=found.image.size)
    own = preprocessing_of(neurons.about, neurons.origin)
    if own is None:
        cure = "take the file that `regraft find` wrote"
        return from_data_config(sized.over({}), str(args.neurons), cure)
    free = found.image.open_size and args.image_size is None
    return override(own, preprocessing_overrides(args) if free else sized, str(args.neurons))


def check(
    args: argparse.Namespace,
    file: OnnxFile,
    patched: Patched,
    neurons: Neurons,
    options: RedirectOptions,
    pixels: NDArray[np.float32],
) -> Checked:
    """Holds the patched graph to the method.

    Raises:
        RewriteError, EngineError, ModelError: see :func:`regraft_export.foreign.check.compare`.
    """
    from regraft.progress import Progress
    from regraft_export.foreign.check.compare import check as compare
    from regraft_export.foreign.survey import survey
    from regraft_export.onnx_file.read import OnnxFile as File

    # The first survey is used up by the rewrite.
    height, width = pixels.shape[2:]
    found = survey(file, prefix=args.prefix, image_size=(height, width))
    rewritten = File(file.path, patched.proto, patched.stored, file.external)
    with Progress(found.stack.depth, "blocks", "checking") as progress:
        try:
            return compare(found, rewritten, neurons, options, pixels, progress.advance)
        except RewriteError as error:
            raise RewriteError(f"{error}; without --check it is patched, unchecked") from None
        except EngineError as error:
            if not found.image.open_size:
                raise
            cure = "if the file does not take that, give a size it takes with --image-size"
            raise EngineError(f"{error}; the images were {height} x {width}: {cure}") from None


def lines(checked: Checked) -> Iterator[str]:
    """What was found in words and a table."""
    height, width = checked.image_size
    verdict = "passed" if checked.passed else "FAILED"
    images = counted(checked.images, "image")
    yield (
        f"check with the method in numpy, {images} of {height} x {width}, "
        f"batches of {checked.batch}: {verdict}"
    )
    yield (
        f"  {'graph':<20}{'output':<22}{'relative error':>15}{'token cosine':>14}{'image':>10}"
        f"{'patch changes':>15}"
    )
    for c in checked.parity:
        tokens = "" if c.token_cosine is None else f"{c.token_cosine:.6f}"
        image = "" if c.image_cosine is None else f"{c.image_cosine:.6f}"
        change = f"{checked.changes[c.output]:.1e}"
        figures = f"{c.relative_error:>15.1e}{tokens:>14}{image:>10}{change:>15}"
        yield f"  {c.graph:<20}{c.output:<22}{figures}{'' if c.passed else '  FAILED'}"
    if checked.precision == "bf16":
        yield (
            "  the file is bf16, which ONNX Runtime's CPU provider cannot run: its weights were "
            "checked in float32 arithmetic"
        )
    if checked.batch == 1:
        yield "  one image at a time: whether images of a batch are kept apart was not checked"
    for name, reads in checked.left_out.items():
        yield f"  not checked: {name} (reads {', '.join(reads)})"
