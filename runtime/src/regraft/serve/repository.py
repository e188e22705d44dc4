"""The models by name and version: which there are, which are loaded, and their exchange."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft import manifest as manifests
from regraft.errors import InputError, RegraftError, UsageError
from regraft.serve.checks import clip
from regraft.serve.model import Model
from regraft.serve.refusals import Kind, Refusal, invalid, unavailable
from regraft.serve.settings import Settings
from regraft.serve.signature import SUFFIX

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_log = logging.getLogger("regraft.serve")


@dataclass
class Entry:
    """One name of the command line.

    Attributes:
        folders: as given: bundles, or one folder of numbered bundles.
        models: version -> what is loaded.
        reason: why nothing is; empty if something is.
    """

    folders: list[Path]
    models: dict[str, Model] = field(default_factory=dict)
    reason: str = "loading"
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)

    def versions(self) -> dict[str, Path]:
        """Version -> bundle, as the disk says now.

        Raises:
            InputError: a folder holds no bundle, or several folders include one of versions.
        """
        if all((folder / manifests.NAME).is_file() for folder in self.folders):
            return {str(i): folder for i, folder in enumerate(self.folders, 1)}
        numbered = {
            child.name: child
            for folder in self.folders
            if folder.is_dir()
            for child in folder.iterdir()
            if _VERSION.fullmatch(child.name) and child.is_dir()
        }
        if len(self.folders) == 1 and numbered:
            return numbered
        wrong = next(f for f in self.folders if not (f / manifests.NAME).is_file())
        raise InputError(
            f"{wrong}: is not a bundle; expected a folder with {manifests.NAME}, as `regraft "
            "export` writes it, or, given once for its name, a folder of such folders with "
            "numbers for names"
        )


class Repository:
    """All models of a server.

    Args:
        arguments: the words of the command line, BUNDLE or NAME=BUNDLE each.
        settings: how models are opened and batched.
        pool: threads that decode images.

    Raises:
        InputError: a name is unfit, or two of them collide.
    """

    def __init__(
        self, arguments: Sequence[str], settings: Settings, pool: ThreadPoolExecutor
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._entries: dict[str, Entry] = {}
        self._closing: set[asyncio.Task[None]] = set()
        for argument in arguments:
            name, path = _split(argument)
            self._entries.setdefault(name, Entry([])).folders.append(path)
        for name in self._entries:
            if name + SUFFIX in self._entries:
                raise UsageError(
                    f"the names {name} and {name + SUFFIX} collide: {name} is served as both; "
                    "give another one, NAME=BUNDLE"
                )

    async def load_all(self) -> None:
        """Opens everything.

        Raises:
            RegraftError: a bundle or its engine cannot be opened.
        """
        for entry in self._entries.values():
            entry.versions()  # what is missing is said before anything large is opened
        for name in self._entries:
            await self._load(name)

    def find(self, name: str, version: str = "") -> Model:
        """A loaded model.

        Args:
            name: a public name, with or without ``_images``.
            version: empty for the highest.

        Raises:
            Refusal: it is unknown (not found), or known and not loaded (unavailable).
        """
        entry = self._entries.get(self._base(name))
        if entry is None:
            raise Refusal(Kind.NOT_FOUND, f"Request for unknown model: '{clip(name)}' is not found")
        if not entry.models:
            raise unavailable(f"model '{name}' is not ready: {entry.reason}")
        if not version:
            return entry.models[max(entry.models, key=int)]
        if version not in entry.models:
            raise Refusal(
                Kind.NOT_FOUND,
                f"Request for unknown model: '{name}' version {clip(version)} is not found; "
                f"there is {', '.join(sorted(entry.models, key=int))}",
            )
        return entry.models[version]

    def versions(self, name: str) -> list[str]:
        """The loaded versions of a public name, ascending."""
        return sorted(self._entries[self._base(name)].models, key=int)

    def loaded(self) -> Iterator[tuple[str, Model]]:
        """Every public name and version that answers."""
        for entry in self._entries.values():
            for version in sorted(entry.models, key=int):
                model = entry.models[version]
                for public in model.signatures:
                    yield public, model

    @property
    def ready(self) -> bool:
        """Whether every model is loaded."""
        return all(entry.models for entry in self._entries.values())

    def index(self, only_ready: bool) -> list[dict[str, str]]:
        """The repository index."""
        rows: list[dict[str, str]] = []
        for name, entry in self._entries.items():
            for public in (name, name + SUFFIX):
                rows += [
                    {"name": public, "version": version, "state": "READY"}
                    for version in sorted(entry.models, key=int)
                ]
                if not entry.models and not only_ready:
                    rows.append({"name": public, "state": "UNAVAILABLE", "reason": entry.reason})
        return rows

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Opens a name anew from disk; the models it replaces finish what they have begun.

        Raises:
            Refusal: it is unknown, or cannot be opened; what was loaded stays.
        """
        if parameters:
            raise invalid(f"load parameters are not supported: {', '.join(map(clip, parameters))}")
        base = self._known(name)
        try:
            await self._load(base)
        except RegraftError as error:
            _log.warning("%s was not loaded: %s", base, error)
            raise invalid(f"failed to load '{name}': {error}") from None

    async def unload(self, name: str) -> None:
        """Stops serving a name; requests that were accepted are answered.

        Raises:
            Refusal: it is unknown.
        """
        entry = self._entries[self._known(name)]
        async with entry.busy:
            self._replace(entry, {}, "unloaded")

    async def close(self) -> None:
        """Frees everything; waits for what is being answered."""
        for entry in self._entries.values():
            self._replace(entry, {}, "the server is shutting down")
        await asyncio.gather(*self._closing)

    async def _load(self, name: str) -> None:
        entry = self._entries[name]
        async with entry.busy:
            opened: dict[str, Model] = {}
            try:
                for version, path in entry.versions().items():
                    opened[version] = await Model.open(
                        name, version, path, self._settings, self._pool
                    )
            except BaseException:
                for model in opened.values():
                    await model.close()
                raise
            self._replace(entry, opened, "")

    def _replace(self, entry: Entry, models: dict[str, Model], reason: str) -> None:
        # Between two awaits: every request finds either the old models or the new ones.
        old, entry.models, entry.reason = entry.models, models, reason
        for model in old.values():
            task = asyncio.get_running_loop().create_task(model.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _base(self, name: str) -> str:
        return name if name in self._entries else name.removesuffix(SUFFIX)

    def _known(self, name: str) -> str:
        base = self._base(name)
        if base not in self._entries:
            raise Refusal(
                Kind.NOT_FOUND,
                f"failed to load '{clip(name)}': no such model; the server was started with "
                f"{', '.join(self._entries)}",
            )
        return base


def _split(argument: str) -> tuple[str, Path]:
    """Name and folder of one word of the command line."""
    name, equals, folder = argument.partition("=")
    if not equals or "/" in name:
        name, folder = Path(argument).resolve().name, argument
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{argument}: {name!r} cannot name a model; expected letters, digits, _ . -, as in "
            "NAME=BUNDLE"
        )
    return name, Path(folder)
