"""A bundle: the folder that goes to production, checked before anything in it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft import manifest as manifest_module
from regraft.errors import BundleError
from regraft.json_values import read_json
from regraft.manifest import FileRecord, Manifest
from regraft.neurons import Neurons

NEURONS = "neurons.json"
VERIFY = "verify.json"
WEIGHTS = "weights.data"  # the one external-data file of every graph


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; :meth:`open` is the way to one.

    Attributes:
        path: the folder.
        manifest: the content of its ``manifest.json``.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, verify_hashes: bool = True) -> Bundle:
        """Opens a bundle and checks it: schema first, then the manifest's own
        sha256 and what it lists, then size and sha256 of every file.

        Args:
            path: the folder that ``regraft export`` wrote.
            verify_hashes: False leaves out the sha256 (sizes are still compared): for a bundle
                that was checked a moment ago.

        Raises:
            BundleError: it is not a bundle, its schema is newer, its manifest was changed or lists
                not all it must, or a file is missing, changed or of another length; the message
                names every such file.
        """
        path = Path(path)
        _expect_bundle(path)
        manifest = Manifest.load(path / manifest_module.NAME)
        if "model" not in manifest.graphs:
            raise BundleError(f"{path}: its manifest names no graph 'model'; export again")
        unlisted = sorted(_required(path, manifest) - set(manifest.files))
        if unlisted:
            raise BundleError(
                f"{path}: its manifest has no sha256 for {', '.join(unlisted)}; export again"
            )
        faults = list(_faults(path, manifest, verify_hashes))
        if faults:
            raise BundleError(f"{path}: {'; '.join(faults)}; copy the bundle again or export again")
        return cls(path, manifest)

    def graph(self, name: str) -> Path:
        """The ONNX file of a graph.

        Args:
            name: one of :data:`regraft.manifest.GRAPHS`.

        Raises:
            BundleError: this bundle does not hold it.
        """
        if name in self.manifest.graphs:
            return self.path / self.manifest.graphs[name]
        if name in manifest_module.CUDA_GRAPHS.values():
            reason = self.manifest.cuda_missing or "it was exported before there were any"
            raise BundleError(f"{self.path}: holds no graph {name!r}: {reason}")
        if name in manifest_module.GRAPHS:
            raise BundleError(
                f"{self.path}: holds no graph {name!r}, because it was exported with "
                "--no-baseline; export it again without"
            )
        raise BundleError(
            f"{self.path}: there is no graph {name!r}; "
            f"expected one of {', '.join(manifest_module.GRAPHS)}"
        )

    def variants(self, name: str) -> dict[str, Path]:
        """The forms of a graph that engines may prefer to it: ``cuda``, where the bundle has it."""
        cuda = manifest_module.CUDA_GRAPHS.get(name)
        return {"cuda": self.graph(cuda)} if cuda and cuda in self.manifest.graphs else {}

    def neurons(self) -> Neurons:
        """The register neurons that the graphs redirect.

        Raises:
            NeuronsError: the file is not a neurons file.
        """
        return Neurons.load(self.path / NEURONS)

    def verification(self) -> dict[str, Any]:
        """What ``verify.json`` says: parity and effect, as measured at export.

        Raises:
            BundleError: the bundle has none, or it is not JSON.
        """
        path = self.path / VERIFY
        data = read_json(path, BundleError, missing="export again", broken="export again")
        if not isinstance(data, dict):
            raise BundleError(f"{path}: is not a JSON object; export again")
        return data


def record(path: Path) -> FileRecord:
    """The size and sha256 of a file, as the manifest keeps them."""
    return FileRecord(sha256=_sha256(path), bytes=path.stat().st_size)


def _expect_bundle(path: Path) -> None:
    expected = f"expected a folder with {manifest_module.NAME}, as `regraft export` writes it"
    try:
        if not path.exists():
            raise BundleError(f"{path}: no such folder; {expected}")
        if not path.is_dir():
            raise BundleError(f"{path}: is a file, not a bundle; {expected}")
        if not (path / manifest_module.NAME).is_file():
            raise BundleError(f"{path}: is not a bundle; {expected}")
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); {expected}") from None


def _required(path: Path, manifest: Manifest) -> set[str]:
    # Graphs without external weights have no weights file; one that is there may be read by them.
    weights = {WEIGHTS} if (path / WEIGHTS).exists() else set()
    return {*manifest.graphs.values(), NEURONS, VERIFY, *weights}


def _faults(path: Path, manifest: Manifest, verify_hashes: bool) -> Iterator[str]:
    intact = []
    for name, expected in sorted(manifest.files.items()):
        file = path / name
        if not file.is_file():
            yield f"{name} is missing"
        elif (got := file.stat().st_size) != expected.bytes:
            yield f"{name} has {got} bytes, expected {expected.bytes}"
        else:
            intact.append(name)
    for name in intact if verify_hashes else ():
        if _sha256(path / name) != manifest.files[name].sha256:
            yield f"{name} was changed (its sha256 differs)"


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
