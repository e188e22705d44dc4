"""Outputs that appear whole or not at all.

An output is written beside its place, in the same folder under a hidden name, and renamed once it
is complete. Whatever interrupts the work (an error, a full disk, Ctrl-C) removes the hidden one and
leaves what stood there before as it was.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from regraft.errors import InputError, OutputExistsError

# What the place of an output can answer while it is filled; any other OSError is not about it.
_REMEDIES = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "the quota is used up; free some space or choose another place",
    errno.EROFS: "choose another place",
    errno.EACCES: "choose a place you may write to",
    errno.EPERM: "choose a place you may write to",
    errno.EFBIG: "choose a file system that takes files of this size",
    errno.EIO: "the device fails; choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}

_RIVALS = 100  # how often another process may come between


def check_output(path: str | Path, force: bool = False, *, marker: str | None = None) -> Path:
    """Checks that an output may be written, before the work that fills it.

    Args:
        path: the file or folder that is to appear.
        force: whether an existing one may be replaced.
        marker: None if the output is a file; for a folder, a file that every such folder holds, as
            :func:`whole_folder` takes it.

    Returns:
        The path with symbolic links resolved, so that a link's target is replaced, not the link.

    Raises:
        OutputExistsError: it is there already, and not ``force``.
        InputError: it is there and of another kind, or the folder around it is missing or cannot
            be written to.
    """
    target = Path(os.path.realpath(path))
    hidden = _hidden(target)
    try:
        if target.exists():
            # Before --force is advised: it would not help.
            _expect_kind(path, target, marker)
            if not force:
                raise OutputExistsError(f"{path}: exists already; give --force to replace it")
        around = next(folder for folder in target.parents if folder.exists())
        if not around.is_dir():
            raise InputError(f"{path}: {around} is a file, not a folder; choose another place")
        if around != target.parent:
            raise InputError(
                f"{path}: the folder {Path(path).parent} does not exist; create it first"
            )
        # Only an attempt tells: root may write anywhere but on a read-only disk, quotas, ACLs.
        hidden.touch(exist_ok=False)
        hidden.unlink()
    except OSError as error:
        raise _refusal(path, error) from error
    return target


@contextmanager
def whole_file(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yields a hidden path to write at; the file appears at ``path`` when the block ends well.

    Args:
        path: the file that is to appear.
        force: whether an existing one may be replaced, which happens once the new one is whole.

    Raises:
        OutputExistsError: it is there already, and not ``force``.
        InputError: it cannot be written, for example on a full disk.
    """
    target = check_output(path, force)
    hidden = _hidden(target)
    try:
        with _named(path, hidden, target):
            yield hidden
            _sync(hidden)
            check_output(path, force)
            hidden.replace(target)
    finally:
        with suppress(OSError):
            hidden.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path, marker: str, force: bool = False) -> Iterator[Path]:
    """Yields a hidden, empty folder to fill; it appears at ``path`` when the block ends well.

    Args:
        path: the folder that is to appear.
        marker: a file that every such folder holds, such as ``manifest.json``. With ``force``, a
            folder without it is still not replaced: it may be somebody's home.
        force: whether an existing one may be replaced, which happens once the new one is whole.

    Raises:
        OutputExistsError: it is there already, and not ``force``.
        InputError: it cannot be written, for example on a full disk.
    """
    target = check_output(path, force, marker=marker)
    hidden = _hidden(target)
    try:
        with _named(path, hidden, target):
            hidden.mkdir()
            yield hidden
            for file in hidden.rglob("*"):
                _sync(file)
            check_output(path, force, marker=marker)
            swap_folders(hidden, target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yields a hidden, empty folder in the folder of ``beside``; it is removed in every case."""
    hidden = _hidden(beside)
    hidden.mkdir()
    try:
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def swap_folders(new: Path, target: Path) -> None:
    """Renames a folder to ``target``; what stood there is removed once that is done.

    Raises:
        InputError: other processes put theirs there all the time.
    """
    for _ in range(_RIVALS):
        try:
            _swap_once(new, target)
            return
        except OSError as error:
            # Another process put its own there, or took the old one away, between look and rename.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) or not new.exists():
                raise
    raise InputError(f"{target}: other processes write to it all the time; choose another place")


def _swap_once(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = _hidden(target)
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        # An interrupt may come before, between or after; only between has to be undone.
        if not target.exists():
            old.rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _expect_kind(path: str | Path, target: Path, marker: str | None) -> None:
    if not (target.is_file() or target.is_dir()):
        raise InputError(f"{path}: is a device or a pipe; expected the name of a file or folder")
    if marker is None:
        if target.is_dir():
            raise InputError(f"{path}: is a folder; expected the name of a file")
    elif not target.is_dir():
        raise InputError(f"{path}: is a file; expected the name of a folder")
    elif not (target / marker).is_file() and any(target.iterdir()):
        raise InputError(
            f"{path}: is a folder without {marker}, so --force does not replace it; "
            "choose another name or remove it yourself"
        )


def _hidden(target: Path) -> Path:
    # The suffix stays last: some writers choose the format by it. The name is cut, because 255
    # bytes is what most file systems take.
    stem = target.stem.encode()[:180].decode(errors="ignore")
    return target.parent / f".{stem}.{secrets.token_hex(4)}{target.suffix}"


def _sync(file: Path) -> None:
    # Rename may reach the disk before the content does, and network file systems report a full
    # disk only now.
    if file.is_file() and not file.is_symlink():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


@contextmanager
def _named(path: str | Path, hidden: Path, target: Path) -> Iterator[None]:
    """Turns an OSError of the output's place into one line that names the output."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES or not _concerns(error, hidden, target):
            raise
        raise _refusal(path, error) from error


def _refusal(path: str | Path, error: OSError) -> InputError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedy = _REMEDIES.get(error.errno or 0, "choose another place")
    return InputError(f"{path}: cannot be written ({reason}); {remedy}")


def _concerns(error: OSError, hidden: Path, target: Path) -> bool:
    # A write through an open file carries no name; then only the output can be meant, because
    # reading cannot fail for want of space.
    if error.filename is None:
        return error.errno not in (errno.EACCES, errno.EPERM)
    if error.filename == str(target):
        return True
    with suppress(TypeError, ValueError):
        place = Path(os.fsdecode(error.filename)).absolute().relative_to(hidden.parent)
        return hidden.stem in place.parts[0]  # the hidden one, or a scratch folder named after it
    return False
