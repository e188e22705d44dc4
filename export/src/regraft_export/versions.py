"""Which packages, in which versions, made a result."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from regraft import __version__


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Package -> version of regraft and of those of ``packages`` that are installed."""
    found = {"regraft": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
