"""Where the cache is, and what in it may be trusted.

A built engine is executed, not merely read, so that nobody but the user may have written it:
folders are made 0700 and files 0600, and what another user owns or could write to, what is reached
through a symbolic link, and what lies in a bundle (copied from machine to machine) is refused.
"""

from __future__ import annotations

import os
from pathlib import Path

from regraft.errors import EngineError

VARIABLE = "REGRAFT_CACHE"


def cache_root() -> Path:
    """The cache folder: ``REGRAFT_CACHE``, else ``regraft`` in the user's cache folder."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore relative values.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "regraft"


def refused(path: Path, reason: str) -> EngineError:
    """The error for something in the cache that must not be loaded."""
    return EngineError(f"{path}: {reason}; remove it and build again with `regraft build`")


def refuse_foreign(path: Path) -> None:
    """Refuses what another user wrote or could write.

    Raises:
        EngineError: it is of unknown origin.
        FileNotFoundError: it is not there.
    """
    if path.is_symlink() and path != cache_root():  # the user may put the whole cache elsewhere
        raise refused(path, "is of unknown origin: a symbolic link")
    try:
        status = path.stat()
    except PermissionError as error:
        raise refused(path, f"cannot be looked at ({error.strerror})") from None
    if os.name != "posix":
        return
    if status.st_uid != os.geteuid():
        raise refused(
            path, f"is of unknown origin: user {status.st_uid} owns it, this is {os.geteuid()}"
        )
    if status.st_mode & 0o022:
        mode = f"{status.st_mode & 0o777:o}"
        raise refused(path, f"is of unknown origin: others may write to it (mode {mode})")


def refuse_bundle(graph: Path) -> None:
    """Refuses a cache inside the bundle of a graph.

    Raises:
        EngineError: it lies there.
    """
    root, bundle = cache_root().resolve(), graph.parent.resolve()
    if root.is_relative_to(bundle):
        raise EngineError(
            f"{root}: the cache of built engines lies in the bundle {graph.parent}, which is "
            f"copied from machine to machine; set {VARIABLE} to a folder outside"
        )


def make_private(folder: Path) -> None:
    """Makes a folder of the cache and those around it, for this user alone.

    Raises:
        EngineError: one of them is of unknown origin or cannot be made.
    """
    root = cache_root()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for path in reversed([folder, *folder.parents]):
            if path.is_relative_to(root):
                path.mkdir(mode=0o700, exist_ok=True)
                refuse_foreign(path)
    except OSError as error:
        raise EngineError(
            f"{root}: the cache of built engines cannot be written ({error.strerror}); set "
            f"{VARIABLE} to a folder that can"
        ) from None
