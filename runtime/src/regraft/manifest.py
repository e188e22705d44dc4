"""``manifest.json``: everything a bundle says of itself.

One dataclass per section; ``Manifest.from_json`` is the only reader. A schema newer than
:data:`SCHEMA` is refused, an older one is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from regraft.errors import BundleError
from regraft.preprocessing import Preprocessing
from regraft.redirect import RedirectOptions
from regraft.tokens import TokenLayout

SCHEMA = 1
NAME = "manifest.json"
GRAPHS = ("model", "baseline", "probe", "probe_baseline")
INPUT = "pixel_values"


@dataclass(frozen=True)
class FileRecord:
    """One file of the bundle: its sha256 (hex) and size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Sites:
    """What the rewrite touched, counted: the proof that it happened.

    Attributes:
        token: where the register is appended (1).
        redirect: touched down-projections, one per touched layer.
        output: places where the register is removed.
        mended: baked token counts that became T + R, as ``node: before -> after``.
    """

    token: int
    redirect: int
    output: int
    mended: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        model: ``source`` (MODEL as given), ``architecture`` (class name), ``weights_sha256``.
        preprocessing: from decoded image to ``pixel_values``.
        tokens: token layout of the patched graph.
        redirect: options of the redirect.
        layers: touched layers, ascending.
        detection_layer: the block at whose raw output outlier tokens are counted.
        threshold: patch norm above which a token is an outlier there.
        outputs: ONNX output name -> shape, "batch" for the free axis; of ``model``. Those of
            ``baseline`` are the same without ``test_time_registers``.
        precision: fp32, fp16 or bf16: of weights and arithmetic; inputs and outputs are float32.
        opset: of the graphs' default domain.
        sites: what the rewrite touched.
        graphs: graph name (:data:`GRAPHS`) -> file name, for those the bundle has.
        files: file name -> record, every file but the manifest.
        versions: package -> version that wrote the bundle.
        verified: whether export verified this very precision (bf16 cannot be, on a CPU).
    """

    model: Mapping[str, str]
    preprocessing: Preprocessing
    tokens: TokenLayout
    redirect: RedirectOptions
    layers: tuple[int, ...]
    detection_layer: int
    threshold: float
    outputs: Mapping[str, tuple[int | str, ...]]
    precision: str
    opset: int
    sites: Sites
    graphs: Mapping[str, str]
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    verified: bool = True

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of ``pixel_values``."""
        return self.preprocessing.image_size

    def to_json(self) -> dict[str, Any]:
        """The file's content as plain JSON values."""
        return {
            "schema": SCHEMA,
            "model": dict(self.model),
            "input": {"name": INPUT, "shape": ["batch", 3, *self.image_size], "dtype": "float32"},
            "preprocessing": self.preprocessing.to_json(),
            "tokens": self.tokens.to_json(),
            "redirect": {**self.redirect.to_json(), "layers": list(self.layers)},
            "outliers": {"detection_layer": self.detection_layer, "threshold": self.threshold},
            "outputs": {name: list(shape) for name, shape in self.outputs.items()},
            "precision": self.precision,
            "opset": self.opset,
            "sites": {**asdict(self.sites), "mended": list(self.sites.mended)},
            "graphs": dict(self.graphs),
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
            "versions": dict(self.versions),
            "verified": self.verified,
        }

    @classmethod
    def from_json(cls, data: Any, origin: str = NAME) -> Manifest:
        """Reads what :meth:`to_json` wrote.

        Raises:
            BundleError: not a manifest, a newer schema, a missing field, or a file name that
                leaves the bundle.
        """
        if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
            raise BundleError(f'{origin}: is not a manifest; expected a JSON object with "schema"')
        if data["schema"] > SCHEMA:
            raise BundleError(
                f"{origin}: schema {data['schema']} is newer than {SCHEMA}, the newest this "
                "version reads; upgrade regraft-runtime"
            )
        try:
            manifest = cls._read(data)
        except KeyError as error:
            raise BundleError(f"{origin}: the field {error} is missing; export again") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{origin}: a field is malformed ({error}); export again") from None
        for name in (*manifest.files, *manifest.graphs.values()):
            _refuse_escape(name, origin)
        return manifest

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Manifest:
        sites = data["sites"]
        return cls(
            model={str(k): str(v) for k, v in data["model"].items()},
            preprocessing=Preprocessing.from_json(data["preprocessing"]),
            tokens=TokenLayout.from_json(data["tokens"]),
            redirect=RedirectOptions.from_json(data["redirect"]),
            layers=tuple(int(layer) for layer in data["redirect"]["layers"]),
            detection_layer=int(data["outliers"]["detection_layer"]),
            threshold=float(data["outliers"]["threshold"]),
            outputs={name: tuple(shape) for name, shape in data["outputs"].items()},
            precision=str(data["precision"]),
            opset=int(data["opset"]),
            sites=Sites(
                token=int(sites["token"]),
                redirect=int(sites["redirect"]),
                output=int(sites["output"]),
                mended=tuple(sites["mended"]),
            ),
            graphs={str(k): str(v) for k, v in data["graphs"].items()},
            files={
                str(name): FileRecord(sha256=str(r["sha256"]), bytes=int(r["bytes"]))
                for name, r in data["files"].items()
            },
            versions={str(k): str(v) for k, v in data["versions"].items()},
            verified=bool(data["verified"]),
        )

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads a manifest file.

        Raises:
            BundleError: it is missing, not JSON, or not a manifest this version reads.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BundleError(
                f"{path}: cannot be read ({error.strerror}); expected the folder that "
                "`regraft export` wrote"
            ) from None
        except ValueError as error:
            raise BundleError(f"{path}: is not JSON ({error}); export again") from None
        return cls.from_json(data, str(path))


def _refuse_escape(name: str, origin: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise BundleError(f"{origin}: the file name {name!r} leaves the bundle; refused")
