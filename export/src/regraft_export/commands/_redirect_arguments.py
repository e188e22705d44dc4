"""Arguments that say how activations are redirected; shared by commands."""

from __future__ import annotations

import argparse

from regraft.cli.options import at_least
from regraft.redirect import RedirectOptions


def add_redirect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares them."""
    group = parser.add_argument_group("redirect (default: the paper's)")
    group.add_argument("--value", choices=("per-neuron", "per-layer", "constant"))
    group.add_argument("--cls", choices=("zero", "keep"))
    group.add_argument("--patches", choices=("zero", "mean", "only-outliers", "keep"))
    group.add_argument("--registers", type=at_least(1), default=1, metavar="R")
    group.add_argument(
        "--scale", type=float, nargs="+", metavar="S", help="factor on the value, per register"
    )


def redirect_options(args: argparse.Namespace) -> RedirectOptions:
    """What they say.

    Raises:
        InputError: a number is out of range.
    """
    given = {
        name: getattr(args, name)
        for name in ("value", "cls", "patches")
        if getattr(args, name) is not None
    }
    scale = tuple(args.scale) if args.scale else (1.0,) * args.registers
    return RedirectOptions(registers=args.registers, scale=scale, **given)
