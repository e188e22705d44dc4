"""Arguments that say how activations are redirected; shared by commands."""

from __future__ import annotations

import argparse

from regraft.cli.options import at_least, number
from regraft.errors import UsageError
from regraft.redirect import MOST_REGISTERS, SCALES, RedirectOptions
from regraft.wording import counted


def add_redirect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares them."""
    group = parser.add_argument_group("redirect (default: the paper's)")
    group.add_argument("--value", choices=("per-neuron", "per-layer", "constant"))
    group.add_argument("--cls", choices=("zero", "keep"))
    group.add_argument("--patches", choices=("zero", "mean", "only-outliers", "keep"))
    group.add_argument("--registers", type=at_least(1, MOST_REGISTERS), default=1, metavar="R")
    group.add_argument(
        "--scale",
        type=_scale,
        nargs="+",
        metavar="S",
        help=f"factor on the value, per register (default: 1): {_bounds()}, the normal numbers of "
        "fp16; what a large one makes of the value may still be more than fp16 can hold",
    )


def redirect_options(args: argparse.Namespace) -> RedirectOptions:
    """What they say.

    Raises:
        UsageError: there are not as many scales as registers.
    """
    if args.scale and len(args.scale) != args.registers:
        raise UsageError(
            f"--scale has {counted(len(args.scale), 'number')} for "
            f"{counted(args.registers, 'register')}; expected one per register"
        )
    given = {
        name: getattr(args, name)
        for name in ("value", "cls", "patches")
        if getattr(args, name) is not None
    }
    scale = tuple(args.scale) if args.scale else (1.0,) * args.registers
    return RedirectOptions(registers=args.registers, scale=scale, **given)


def _scale(text: str) -> float:
    """An argument type: a factor. 0 would leave the register empty, less than 0 turn it round."""
    least, most = SCALES
    value = number()(text)
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {_bounds()}")
    return value


def _bounds() -> str:
    """Both ends, in full: what is printed here may be typed."""
    least, most = SCALES
    return f"{least!r} to {most:g}"
