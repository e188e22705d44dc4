"""Which files are meant where a user names files and folders of images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from regraft.errors import InputError
from regraft.images import name_of

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".jp2", ".avif"}
)


def list_images(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    suffixes: Iterable[str] = SUFFIXES,
) -> list[Path]:
    """The image files behind paths and folders.

    Folders are searched with everything below them, by suffix in any case, and sorted by path;
    hidden files, hidden folders and links to folders are passed over. Files named one by one are
    taken whatever their suffix. The order of the arguments is kept.

    Args:
        sources: one path or several.
        suffixes: lower case, with the dot.

    Raises:
        InputError: a path does not exist, a folder holds no image, or nothing was named.
    """
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    wanted = frozenset(suffixes)
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            found += _search(source, wanted)
        elif source.exists():
            found.append(source)
        else:
            raise InputError(f"{name_of(source)}: no such file or folder; expected images")
    if not found:
        raise InputError("no images named; expected files or folders of images")
    return found


def evenly(paths: Sequence[Path], most: int) -> list[Path]:
    """At most ``most`` paths, evenly spaced: a folder is often sorted by class."""
    if len(paths) <= most:
        return list(paths)
    return [paths[i * len(paths) // most] for i in range(most)]


def _search(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        name = name_of(error.filename)
        raise InputError(f"{name}: cannot be read ({error.strerror})") from error

    for base, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(base, name)
            for name in names
            if Path(name).suffix.lower() in suffixes and not name.startswith(".")
        ]
    if not found:
        raise InputError(
            f"{name_of(folder)}: the folder holds no images; expected files with one of the "
            f"suffixes {' '.join(sorted(suffixes))}"
        )
    return sorted(found)
