"""What a bulk extraction was asked for, written beside its shards.

A run continues another one only if it was asked for the same; otherwise the error says what
differs. What changes speed alone (batch size, threads, processes, Ray) is not part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regraft import __version__
from regraft.errors import InputError

SCHEMA = 1
# Readers of Parquet folders pass over names that begin with an underscore.
JOB, IMAGES = "_run.json", "_images.jsonl"
UNFINISHED = f"{JOB}.new"
_WORDS = {
    "bundle": "the bundle (its manifest's sha256)",
    "engine": "--engine",
    "precision": "--precision",
    "outputs": "--outputs",
    "dtype": "--dtype",
    "draft": "--draft",
    "images": "the number of images",
    "images_sha256": "the list of images",
    "folder": "the folder that relative paths start from",
    "shard_size": "--shard-size",
}


@dataclass(frozen=True)
class Job:
    """What was asked for.

    Attributes:
        bundle: sha256 of the bundle's manifest, which has that of every other file.
        engine: its name.
        precision: of its arithmetic.
        outputs: fields of :class:`regraft.features.Features`.
        dtype: of the features in the shards.
        draft: whether large JPEG files are decoded at a reduced size.
        images: how many were named.
        images_sha256: of their names, in order.
        folder: where relative names start; None if all are absolute.
        shard_size: images in a shard; the last one may hold fewer.
    """

    bundle: str
    engine: str
    precision: str
    outputs: tuple[str, ...]
    dtype: str
    draft: bool
    images: int
    images_sha256: str
    folder: str | None
    shard_size: int

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.images // self.shard_size)

    @property
    def digest(self) -> str:
        """A sha256 that every shard carries."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def span(self, shard: int) -> range:
        """The images of a shard, as positions in the list."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.images))

    def write(self, folder: Path, names: Sequence[str]) -> None:
        """Writes ``_run.json`` and ``_images.jsonl`` (one JSON string a line) into a folder."""
        with (folder / IMAGES).open("w", encoding="ascii") as lines:
            lines.writelines(json.dumps(name) + "\n" for name in names)
        content = {"schema": SCHEMA, **asdict(self), "versions": {"regraft": __version__}}
        text = json.dumps(content, indent=1) + "\n"
        # Last and at once: a folder with this file has both.
        beside = folder / UNFINISHED
        beside.write_text(text, encoding="ascii")
        beside.replace(folder / JOB)

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Reads what :meth:`write` wrote.

        Raises:
            InputError: the file is not one, or a newer version wrote it.
        """
        path = folder / JOB
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] > SCHEMA:
                raise InputError(
                    f"{path}: schema {data['schema']} is newer than {SCHEMA}, the newest this "
                    "version reads; upgrade regraft-runtime"
                )
            return cls(**{name: _plain(data[name]) for name in _WORDS})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}: is not what `regraft extract` writes ({error!r}); remove the folder or "
                "choose another --out"
            ) from None

    def differences(self, other: Job) -> Iterator[str]:
        """In words, what another job was asked for differently."""
        for name, words in _WORDS.items():
            mine, others = getattr(self, name), getattr(other, name)
            if mine == others or (name == "images_sha256" and self.images != other.images):
                continue
            if name in ("bundle", "images_sha256"):
                yield f"{words} differs"
            else:
                yield f"{words} was {_word(mine)} and is {_word(others)}"


def hash_names(names: Sequence[str]) -> str:
    """The sha256 of a list of names."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()


def start_of(names: Sequence[str]) -> str | None:
    """Where relative names start: the current folder; None if all are absolute."""
    return None if all(map(os.path.isabs, names)) else str(Path.cwd())


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _word(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
