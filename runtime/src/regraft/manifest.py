"""``manifest.json``: everything a bundle says of itself.

One dataclass per section; ``Manifest.from_json`` is the only reader. Schema and sha256 of the file
are those of :mod:`regraft.manifest_file`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from regraft.constants import Constants
from regraft.errors import BundleError, InputError
from regraft.json_values import integer, positive, shape, truth
from regraft.manifest_file import SCHEMA, digest, expect_schema, read_content
from regraft.preprocessing import Preprocessing
from regraft.redirect import RedirectOptions
from regraft.rewrite_counts import CudaFusions, Sites
from regraft.tokens import TokenLayout

NAME = "manifest.json"
# The graphs of `ort-cuda`: the same function as the one each is named after, in other operators.
CUDA_GRAPHS = {"model": "model_cuda", "baseline": "baseline_cuda"}
GRAPHS = ("model", "baseline", "probe", "probe_baseline", *CUDA_GRAPHS.values())
INPUT = "pixel_values"
SECTIONS = (
    *("model", "preprocessing", "tokens", "redirect", "outliers", "outputs", "sites"),
    *("graphs", "files", "versions"),
)
PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class FileRecord:
    """One file of the bundle: its sha256 (hex) and size in bytes."""

    sha256: str
    bytes: int


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
        cuda: what the patched graph of ``ort-cuda`` has fused; None where there is no such graph.
        cuda_missing: why there is none, in one line; empty if there is one, or if the bundle was
            written before there were any.
        constants: of the variant kv; None in the variant token.
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
    cuda: CudaFusions | None = None
    cuda_missing: str = ""
    constants: Constants | None = None

    @property
    def variant(self) -> str:
        """``token``: a register runs through the network; ``kv``: constants stand in for it."""
        return "token" if self.constants is None else "kv"

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of ``pixel_values``."""
        return self.preprocessing.image_size

    def to_json(self) -> dict[str, Any]:
        """The file's content as plain JSON values, its sha256 included."""
        content = {
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
            "sites": self.sites.to_json(),
            "graphs": dict(self.graphs),
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
            "versions": dict(self.versions),
            "verified": self.verified,
            **self._cuda_json(),
            "variant": self.variant,
            "constants": None if self.constants is None else self.constants.to_json(),
        }
        return {**content, "sha256": digest(content)}

    def _cuda_json(self) -> dict[str, Any]:
        if self.cuda is not None:
            return {"cuda": self.cuda.to_json()}
        return {"cuda": {"missing": self.cuda_missing}} if self.cuda_missing else {}

    def text(self) -> str:
        """The file as it is written."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: Any, origin: str = NAME) -> Manifest:
        """Reads what :meth:`to_json` wrote; :meth:`load` alone looks at its sha256.

        Raises:
            BundleError: not a manifest, a newer schema, a missing or malformed field, or a file
                name that leaves the bundle.
        """
        content = expect_schema(data, origin)
        try:
            manifest = cls._read(content)
            manifest._check()
        except KeyError as error:
            raise BundleError(f"{origin}: the field {error} is missing; export again") from None
        except (TypeError, ValueError, AttributeError, OverflowError, InputError) as error:
            raise BundleError(f"{origin}: a field is malformed ({error}); export again") from None
        for name in (*manifest.files, *manifest.graphs.values()):
            _refuse_escape(name, origin)
        return manifest

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Manifest:
        for name in SECTIONS:
            if not isinstance(data[name], Mapping):
                raise ValueError(f"{name} is {data[name]!r}; expected an object")
        return cls(
            model={str(k): str(v) for k, v in data["model"].items()},
            preprocessing=Preprocessing.from_json(data["preprocessing"]),
            tokens=TokenLayout.from_json(data["tokens"]),
            redirect=RedirectOptions.from_json(data["redirect"]),
            layers=_layers(data["redirect"]["layers"]),
            detection_layer=integer(
                "outliers.detection_layer", data["outliers"]["detection_layer"]
            ),
            threshold=positive("outliers.threshold", data["outliers"]["threshold"]),
            outputs={
                name: shape(f'outputs["{name}"]', sizes) for name, sizes in data["outputs"].items()
            },
            precision=str(data["precision"]),
            opset=integer("opset", data["opset"], 1),
            sites=Sites.from_json(data["sites"]),
            graphs={str(k): str(v) for k, v in data["graphs"].items()},
            files={
                str(name): FileRecord(
                    str(r["sha256"]), integer(f"files[{name!r}].bytes", r["bytes"])
                )
                for name, r in data["files"].items()
            },
            versions={str(k): str(v) for k, v in data["versions"].items()},
            verified=truth("verified", data["verified"]),
            cuda=_fusions(data.get("cuda")),
            cuda_missing=str((data.get("cuda") or {}).get("missing", "")),
            constants=Constants.of_manifest(data),
        )

    def _check(self) -> None:
        """Raises ValueError, naming the field, unless the fields fit each other."""
        tokens = self.tokens
        registers = self.redirect.registers if self.constants is None else 0
        for name, got, expected in (
            ("tokens.test_time_registers", tokens.test_time_registers, registers),
            (
                'outputs["last_hidden_state"]',
                self.outputs.get("last_hidden_state"),
                ("batch", tokens.count, tokens.width),
            ),
        ):
            if got != expected:
                raise ValueError(f"{name} is {_json(got)}; expected {_json(expected)}")
        if self.precision not in PRECISIONS:
            allowed = ", ".join(PRECISIONS)
            raise ValueError(f"precision is {self.precision!r}; expected one of {allowed}")
        blocks = f"of the {tokens.depth} blocks, 0 to {tokens.depth - 1}"
        if self.detection_layer >= tokens.depth:
            raise ValueError(
                f"outliers.detection_layer is {self.detection_layer}; expected one {blocks}"
            )
        ascending = list(self.layers) == sorted(set(self.layers))
        if not ascending or any(i >= tokens.depth for i in self.layers):
            raise ValueError(
                f"redirect.layers is {_json(self.layers)}; expected some {blocks}, ascending"
            )
        if self.constants is not None and self.constants.first_layer > tokens.depth:
            raise ValueError(
                f"constants.first_layer is {self.constants.first_layer}; expected one {blocks}, or "
                f"{tokens.depth} for none"
            )

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads a manifest file.

        Raises:
            BundleError: it is missing, not JSON, not a manifest this version reads, or not as
                :meth:`text` gave it.
        """
        return cls.from_json(read_content(path), str(path))


def _layers(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"redirect.layers is {value!r}; expected a list of blocks")
    return tuple(integer("redirect.layers", layer) for layer in value)


def _fusions(value: Any) -> CudaFusions | None:
    return None if value is None or "missing" in value else CudaFusions.from_json(value)


def _json(value: object) -> str:
    return "missing" if value is None else json.dumps(value)


def _refuse_escape(name: str, origin: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise BundleError(f"{origin}: the file name {name!r} leaves the bundle; refused")
