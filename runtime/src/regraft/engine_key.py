"""What a built engine depends on, and where in the cache it therefore is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.bundle import WEIGHTS
from regraft.cache_trust import cache_root
from regraft.errors import EngineError
from regraft.json_values import digest

SCHEMA = 1


@dataclass(frozen=True)
class CacheKey:
    """What a built engine depends on; any difference gives another entry.

    Attributes:
        engine: name, such as ``tensorrt``.
        version: of the library that built it, and runs it.
        device: what it was built for, in the library's words.
        precision: fp32, fp16 or bf16: of its arithmetic.
        graph_sha256: of the ONNX file.
        weights_sha256: of the external data beside it; None if there is none.
        options: build option -> value, all of them, defaults included.
    """

    engine: str
    version: str
    device: str
    precision: str
    graph_sha256: str
    weights_sha256: str | None
    options: Mapping[str, int | str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of ``key.json``."""
        return {"schema": SCHEMA, **vars(self), "options": dict(self.options)}

    @property
    def group(self) -> Path:
        """The folder of all entries that differ from this one in nothing but build options."""
        identity = {name: v for name, v in self.to_json().items() if name != "options"}
        return cache_root() / "engines" / self.engine / digest(identity)

    @property
    def folder(self) -> Path:
        """Where the entry is, or would be."""
        return self.group / digest(self.to_json())


def graph_hashes(graph: Path) -> tuple[str, str | None]:
    """The sha256 of an ONNX file, and of :data:`WEIGHTS` beside it if that exists.

    Raises:
        EngineError: a file cannot be read.
    """
    weights = graph.parent / WEIGHTS
    return file_sha256(graph), file_sha256(weights) if weights.exists() else None


def file_sha256(path: Path) -> str:
    """The sha256 (hex) of a file.

    Raises:
        EngineError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror})") from None
