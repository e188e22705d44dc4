"""What an engine is told: how to use the machine, and how to build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from regraft.errors import InputError

Shape = tuple[int | str, ...]
# Build option -> value, every one the engine has; part of the cache key.
BuildOptions = Mapping[str, int | str]
# Called with (what is being done, steps done, steps in all or None if nobody knows); from any
# thread, and it never raises.
BuildProgress = Callable[[str, int, int | None], None]
MOST_THREADS = 1024  # no machine gains from more, and to start them can bring one down


@dataclass(frozen=True)
class EngineOptions:
    """How an engine may use the machine.

    Attributes:
        threads: threads inside one run; None takes the cores this process may use.
        spinning: whether threads wait busily between operators. It shortens a run that has the
            machine for itself and starves whatever shares the cores, such as image decoding.
        optimize: whether the engine may rewrite the graph; False is for finding out which of two
            optimisers is wrong.
        precision: of the arithmetic, for engines that have a choice; None for the bundle's.
    """

    threads: int | None = None
    spinning: bool = False
    optimize: bool = True
    precision: str | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise InputError(f"threads is {self.threads}; expected 1 to {MOST_THREADS}")


@dataclass(frozen=True)
class BuildOption:
    """One option of an engine's build, as ``regraft build --option NAME=VALUE`` takes it.

    Attributes:
        name: in kebab case.
        default: its type, int or str, is the option's.
        help: one line.
        least: smallest value of an integer.
        choices: all values of a str; empty for any.
    """

    name: str
    default: int | str
    help: str
    least: int = 0
    choices: tuple[str, ...] = ()
