"""Which subcommands there are and in which module each lives, known without importing any.

The runtime's are listed here. Those of other distributions come from the entry-point group
``regraft.commands``, whose values are modules of the same form (see :mod:`regraft.commands`).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from regraft.errors import InputError, how_to_install

GROUP = "regraft.commands"
EXPORT = "regraft-export"


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        name: as typed.
        help: one line.
        module: where it lives; None if the distribution that has it is not installed.
    """

    name: str
    help: str
    module: str | None


RUNTIME = {
    "verify": "parity and effect again, on any images and engine",
    "build": "builds, verifies and caches an engine for this machine",
    "extract": "features of many images, into a file or a folder",
    "bench": "latency and throughput, baseline and patched",
    "report": "pictures before and after, as one HTML file",
    "inspect": "what is in a bundle, in words",
    "serve": "inference server, Open Inference Protocol over HTTP and gRPC",
    "triton": "a model repository for the Triton Inference Server",
}

# Their modules belong to regraft-export; the words are here, so that a runtime alone can say what
# to install, and --help imports nothing.
EXPORTING = {
    "demo": "the whole path on a small model that ships along",
    "find": "finds a model's register neurons",
    "export": "traces, rewrites, verifies and writes a bundle",
    "patch": "rewrites an ONNX file that somebody else exported",
}


def all_commands() -> list[Command]:
    """Every subcommand, those of regraft-export first, in the order in which a user meets them."""
    installed = _installed()
    exporting = [_foreign(name, installed.get(name)) for name in EXPORTING]
    others = [_foreign(n, e) for n, e in sorted(installed.items()) if n not in EXPORTING]
    return [*exporting, *(_own(name) for name in RUNTIME), *others]


def find_command(name: str) -> Command | None:
    """The subcommand of this name; None if there is none."""
    if name in RUNTIME:  # without a look at the metadata, which takes time
        return _own(name)
    entry = _installed().get(name)
    return _foreign(name, entry) if entry or name in EXPORTING else None


def module_of(command: Command) -> str:
    """The module of a command.

    Raises:
        InputError: its distribution is not installed.
    """
    if command.module is None:
        raise InputError(
            f"`regraft {command.name}` needs the export distribution, which is not installed; "
            f"{how_to_install(EXPORT)}"
        )
    return command.module


def _own(name: str) -> Command:
    return Command(name, RUNTIME[name], f"regraft.commands.{name}")


def _foreign(name: str, entry: EntryPoint | None) -> Command:
    if entry is None:
        return Command(name, f"{EXPORTING[name]} (needs {EXPORT})", None)
    origin = entry.dist.name if entry.dist else "elsewhere"
    return Command(name, EXPORTING.get(name, f"from {origin}"), entry.value)


def _installed() -> dict[str, EntryPoint]:
    # The runtime's names win: a distribution cannot replace them.
    return {e.name: e for e in entry_points(group=GROUP) if e.name not in RUNTIME}
