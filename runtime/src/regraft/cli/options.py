"""Arguments that several commands share, so that they are spelled and checked alike."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

MOST_IN_BATCH = 4096  # of a ViT at 224 px 2.4 GB, before anything is computed


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Adds ``--engine``, ``--precision`` and ``--threads``."""
    from regraft.engines import AUTO, NAMES

    parser.add_argument(
        "--engine",
        choices=NAMES,
        default=AUTO,
        help="what executes the graph; auto (the default) takes the first that can run here of "
        "tensorrt (if built), ort-cuda and ort-cpu, never openvino",
    )
    add_precision(parser)
    parser.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="threads inside one run of the engine (default: the cores that may be used)",
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Adds ``--precision``."""
    from regraft.parity import LIMITS

    parser.add_argument(
        "--precision",
        choices=tuple(LIMITS),
        help="of the arithmetic (default: the bundle's; openvino can compute fp32 ones in bf16)",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """Adds ``--force``."""
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argument type: an integer from ``least``, and no more than ``most``."""

    def integer(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            upwards = "" if most is None else f" to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least}{upwards}")
        return number

    return integer


def batch_size(text: str) -> int:
    """An argument type: images in one run; all of them are in memory at a time."""
    return at_least(1, MOST_IN_BATCH)(text)


def thread_count(text: str) -> int:
    """An argument type: how many threads or processes; a slip of the finger shall not start all."""
    from regraft.engines.options import MOST_THREADS

    return at_least(1, MOST_THREADS)(text)


def words(text: str) -> tuple[str, ...]:
    """An argument type: words separated by commas."""
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    if not found:
        raise argparse.ArgumentTypeError("it is empty; expected words separated by commas")
    return found


def integers(least: int, most: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """An argument type: integers from ``least`` to ``most``, separated by commas."""
    one = at_least(least, most)

    def several(text: str) -> tuple[int, ...]:
        return tuple(one(word) for word in words(text))

    return several


def duration(text: str) -> float:
    """An argument type: seconds, from 0, finite."""
    seconds = _float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0")
    return seconds


def number(above: float | None = None, most: float | None = None) -> Callable[[str], float]:
    """An argument type: a finite number, larger than ``above`` and no larger than ``most``."""
    bounds = [f"above {above:g}"] if above is not None else []
    bounds += [f"at most {most:g}"] if most is not None else []

    def one(text: str) -> float:
        value = _float(text)
        outside = (above is not None and value <= above) or (most is not None and value > most)
        if outside or not math.isfinite(value):
            wanted = f" {', '.join(bounds)}" if bounds else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number{wanted}")
        return value

    return one


def file_name(*suffixes: str) -> Callable[[str], str]:
    """An argument type: the name of a file to write, which ends in one of the suffixes."""

    def name(text: str) -> str:
        suffix = Path(text).suffix
        got = f"ends in {suffix!r}" if suffix else "has no suffix"
        if text.endswith(os.sep):  # which Path would drop
            got = f"ends in {os.sep!r}, as a folder does"
        elif suffix.lower() in suffixes:
            return text
        raise argparse.ArgumentTypeError(f"{text}: {got}; expected {' or '.join(suffixes)}")

    return name


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
