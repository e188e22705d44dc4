"""Where built engines live: the user's cache folder, never a bundle.

An entry is one folder, ``engines/ENGINE/IDENTITY/KEY`` below
:func:`regraft.cache_trust.cache_root`:

- ``key.json``: what it was built of and for, see :mod:`regraft.engine_key`; KEY is the sha256 of
  it, IDENTITY the sha256 of it without the build options.
- ``record.json``: when it was built, size and sha256 of every other file, and the report of the
  build (what was built, and the verification that it passed).
- whatever the engine's ``build`` wrote.

An entry that is damaged or of unknown origin is an error that names it, see
:mod:`regraft.cache_trust`; what was built is hashed, and hashed again before it is opened.

Processes may build and open at the same time: an entry is put into its place under a lock on the
folder IDENTITY, and whoever opens one holds that folder (:func:`held`) until it is open. Of one
identity the entry built last is used, whatever its build options, so a new one takes the place of
all others there.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from regraft.cache_trust import cache_root, make_private, refuse_bundle, refuse_foreign, refused
from regraft.engine_key import SCHEMA, CacheKey, file_sha256
from regraft.files import whole_folder
from regraft.json_values import digest

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

KEY, RECORD = "key.json", "record.json"
_ABANDONED = 24 * 3600.0  # seconds after which nobody is still filling a hidden folder


@dataclass(frozen=True)
class Entry:
    """A built engine in the cache, checked.

    Attributes:
        folder: where its files are.
        options: build option -> value.
        built: when, ISO 8601 in UTC.
        report: ``build`` (what the engine said of itself) and ``verification``.
    """

    folder: Path
    options: Mapping[str, int | str]
    built: str
    report: Mapping[str, Any]


@dataclass
class Draft:
    """An entry in the making: fill ``folder`` and ``report``."""

    folder: Path
    report: dict[str, Any] = field(default_factory=dict)


@contextmanager
def held(key: CacheKey) -> Iterator[None]:
    """Within it, no other process replaces or removes what is cached for a key.

    Args:
        key: its options are not looked at.
    """
    with _locked(key.group, exclusive=False):
        yield


def latest(key: CacheKey, graph: Path) -> Entry | None:
    """The entry that was built last for a key, whatever its build options; None without one.

    To open it, call this and open it within :func:`held`.

    Args:
        key: its options are not looked at.
        graph: the ONNX file, to refuse a cache inside its bundle.

    Raises:
        EngineError: an entry is damaged or of unknown origin.
    """
    refuse_bundle(graph)
    try:
        # From the outside: one of another user may not even be looked into.
        for folder in (cache_root(), *reversed(key.group.parents[:2]), key.group):
            refuse_foreign(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with held(key):
        # Hidden ones are being written by somebody else, or were when the power failed.
        folders = [f for f in sorted(key.group.iterdir()) if not f.name.startswith(".")]
        if not folders:
            return None
        found = [_read(folder, key) for folder in folders]
        entry, files = max(found, key=lambda pair: pair[0].built)
        _check_files(entry.folder, files)
        return entry


@contextmanager
def new_entry(key: CacheKey, graph: Path) -> Iterator[Draft]:
    """Yields a draft whose folder becomes the entry when the block ends well.

    Those that differ in build options alone are removed then, and not before: nothing would use
    them again.

    Args:
        key: with every build option.
        graph: the ONNX file, to refuse a cache inside its bundle.

    Raises:
        EngineError: the cache folder belongs to somebody else, or lies in the bundle.
        InputError: it cannot be written, for example on a full disk.
    """
    refuse_bundle(graph)
    make_private(key.group)
    target = key.folder
    with ExitStack() as lock:
        lock.enter_context(_locked(key.group, exclusive=True))
        if target.is_symlink() or (target.exists() and not (target / KEY).is_file()):
            _remove(target)  # of unknown origin; its name says that the place is ours
        with whole_folder(target, KEY, force=True) as hidden:
            lock.close()  # others may open and build while this one is filled
            hidden.chmod(0o700)
            draft = Draft(hidden)
            yield draft
            _seal(hidden, key, draft.report)
            lock.enter_context(_locked(key.group, exclusive=True))
        _remove_superseded(target)


def _remove_superseded(target: Path) -> None:
    """Removes the entries beside this one, and what builds that were killed left there."""
    for path in target.parent.iterdir():
        with suppress(OSError):  # it may be another user's; whoever reads it says so
            killed = time.time() - path.lstat().st_mtime > _ABANDONED
            if path != target and (killed or not path.name.startswith(".")):
                _remove(path)


@contextmanager
def _locked(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Holds a folder against other processes, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # not there yet, or Windows
        yield
        return
    try:
        if fcntl is not None:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def _seal(folder: Path, key: CacheKey, report: Mapping[str, Any]) -> None:
    files = {}
    for file in sorted(folder.rglob("*")):
        file.chmod(0o700 if file.is_dir() else 0o600)
        if file.is_file():
            name = file.relative_to(folder).as_posix()
            files[name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    built = datetime.now(UTC).isoformat(timespec="microseconds")
    record = {"schema": SCHEMA, "built": built, "files": files, "report": dict(report)}
    for name, content in ((KEY, key.to_json()), (RECORD, record)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
        (folder / name).chmod(0o600)


def _read(folder: Path, key: CacheKey) -> tuple[Entry, Mapping[str, Mapping[str, Any]]]:
    """An entry and the files it must have; their content is not looked at yet."""
    for path in (folder, *sorted(folder.rglob("*"))):
        refuse_foreign(path)
    try:
        found = json.loads((folder / KEY).read_text(encoding="utf-8"))
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        entry = Entry(folder, found["options"], record["built"], record["report"])
        files: Mapping[str, Mapping[str, Any]] = dict(record["files"])
    except OSError as error:
        name = Path(str(error.filename)).name
        raise refused(folder, f"is of unknown origin: {name} cannot be read") from None
    except (ValueError, KeyError, TypeError) as error:
        raise refused(folder, f"is damaged: {KEY} or {RECORD} is malformed ({error})") from None
    expected = {**key.to_json(), "options": found["options"]}
    if found != expected or folder.name != digest(found):
        raise refused(folder, f"is of unknown origin: {KEY} does not belong to this folder")
    return entry, files


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    present = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    if extra := sorted(present - {*files, KEY, RECORD}):
        raise refused(folder, f"is damaged: {', '.join(extra)} was not there when it was built")
    for name, expected in files.items():
        if name not in present:
            raise refused(folder, f"is damaged: {name} is missing")
        if file_sha256(folder / name) != expected.get("sha256"):
            raise refused(folder, f"is damaged: {name} was changed (its sha256 differs)")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
