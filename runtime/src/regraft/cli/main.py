"""The command ``regraft``: reads the first word, imports that command alone, and runs it.

Exit codes: 0; 1 for bad input or a failed gate, with one line on stderr; 2 for wrong usage, whether
argparse or a command sees it; 130 after Ctrl-C; 129 and 143 after SIGHUP and SIGTERM; 141 if the
reader of stdout went away.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from regraft import __version__
from regraft.cli.signals import unwinding
from regraft.cli.table import Command, all_commands, find_command, module_of
from regraft.errors import RegraftError, UsageError

WRONG_USAGE = 2  # argparse's own
INTERRUPTED = 128 + signal.SIGINT
READER_GONE = 141  # 128 + SIGPIPE, which Windows does not have


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the words after ``regraft``; None for those of this process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with unwinding() as seen:
        try:
            with _warnings_in_one_line():
                code = _dispatch(words)
                sys.stdout.flush()
                seen.settle()
            return code
        except KeyboardInterrupt:
            return _interrupted()
        except BrokenPipeError:
            # The interpreter flushes stdout once more on its way out and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return READER_GONE
        except RegraftError as error:
            if seen.interrupt:  # what the interrupt broke, such as a half-done import, is no news
                return _interrupted()
            if "--traceback" in words:
                traceback.print_exc()
            else:
                print(f"regraft: {' '.join(str(error).split())}", file=sys.stderr)
            return WRONG_USAGE if isinstance(error, UsageError) else 1
        except Exception:
            if seen.interrupt:
                return _interrupted()
            raise


def program() -> NoReturn:
    """Runs the command line as this process.

    After Ctrl-C it ends at once. On its usual way out, Python tears native libraries down in which
    threads may have been interrupted, which can crash, and dies by the signal instead of ending
    with 130 where the signal came while generated code was run.
    """
    code = main()
    if code == INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _interrupted() -> int:
    print("regraft: interrupted", file=sys.stderr)
    return INTERRUPTED


def _dispatch(words: list[str]) -> int:
    top = _top_parser()
    name = next((word for word in words if not word.startswith("-")), None)
    command = None if name is None else find_command(name)
    if command is None:
        # Options alone, nothing at all, or a word that is no command: argparse says it.
        top.parse_args(words)
        top.print_help(sys.stderr)
        return WRONG_USAGE
    before, after = words[: words.index(command.name)], words[words.index(command.name) + 1 :]
    top.parse_args([*before, command.name])
    module = importlib.import_module(module_of(command))
    parser = _command_parser(command, module.__doc__ or command.help)
    module.add_arguments(parser)
    code: int = module.run(parser.parse_args(after))
    return code


def _top_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="regraft",
        description="Finds the register neurons of a Vision Transformer, rewrites its graph so "
        "that they write into a test-time register, and serves the cleaned features.",
        epilog="`regraft COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="regraft [--help] [--version] [--traceback] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"regraft {__version__}")
    _add_traceback(parser)
    parser.add_argument("command", nargs="?", metavar="COMMAND", type=_known, help="see below")
    return parser


def _command_parser(command: Command, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"regraft {command.name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_traceback(parser)
    return parser


class _Parser(argparse.ArgumentParser):
    """Lists the commands when help is asked for, and only then: it reads package metadata."""

    def format_help(self) -> str:
        rows = [f"  {command.name:<10}{command.help}" for command in all_commands()]
        return f"{super().format_help()}\ncommands:\n" + "\n".join(rows) + "\n"


def _known(name: str) -> str:
    if find_command(name) is None:
        names = ", ".join(command.name for command in all_commands())
        raise argparse.ArgumentTypeError(f"there is no command {name!r}; expected one of {names}")
    return name


def _add_traceback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the code an error arose"
    )


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Shows regraft's own warnings on stderr as `regraft: ...`."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("regraft: warning: %(message)s"))
    logger = logging.getLogger("regraft")
    if logger.handlers:  # a command that runs another one, or a program with its own wishes
        yield
        return
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures, damaged EXIF blocks, odd palettes: regraft refuses
            # them or takes them as documented. Here once: worker threads share the filters.
            warnings.filterwarnings("ignore", module=r"PIL\..*")
            yield
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    program()
