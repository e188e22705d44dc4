"""``manifest.json``: everything a bundle says of itself.

One dataclass per section; ``Manifest.from_json`` is the only reader. A schema newer than
:data:`SCHEMA` is refused, an older one is read. The file carries a sha256 of its own content, so
that a changed one is noticed like any other file of the bundle.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from regraft.constants import VARIANTS, Constants
from regraft.errors import BundleError, InputError
from regraft.preprocessing import Preprocessing
from regraft.redirect import RedirectOptions
from regraft.tokens import TokenLayout, integer

SCHEMA = 2  # 1 has no variants: all bundles are `token`
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
class Sites:
    """What the rewrite touched, counted: the proof that it happened.

    Attributes:
        token: where the register is appended (1; 0 in the variant kv).
        redirect: touched down-projections, one per touched layer.
        output: places where the register is removed (none in the variant kv).
        mended: baked token counts that became T + R, as ``node: before -> after``.
        attention: attentions that see constants (none in the variant token).
    """

    token: int
    redirect: int
    output: int
    mended: tuple[str, ...] = ()
    attention: int = 0


@dataclass(frozen=True)
class CudaFusions:
    """What the graph of ``ort-cuda`` has fused, counted.

    Attributes:
        attentions: MultiHeadAttention nodes; one for each block.
        norms: residual sums and norms in one.
        gelus: biases and GELUs in one.
        key_biases: dropped.
        value_biases: moved behind the output projection.
        layer_scales: folded into weights.
        patches: whether the patch embedding is one matrix product.
        tokens: whether the token entry is one Pad and one constant.
        redirects: touched layers whose register row does without a Mul over all tokens.
        constants: attentions that see constant keys and values (variant kv).
        shape_nodes: Shape nodes left, which ONNX Runtime runs on the CPU.
        operators: nodes of regraft's own, see :mod:`regraft.engines.ort_cuda.operators`.
    """

    attentions: int = 0
    norms: int = 0
    gelus: int = 0
    key_biases: int = 0
    value_biases: int = 0
    layer_scales: int = 0
    patches: bool = False
    tokens: bool = False
    redirects: int = 0
    constants: int = 0
    shape_nodes: int = 0
    operators: int = 0


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
            "sites": {**asdict(self.sites), "mended": list(self.sites.mended)},
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
            return {"cuda": asdict(self.cuda)}
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
        _expect_schema(data, origin)
        try:
            manifest = cls._read(data)
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
        sites = data["sites"]
        return cls(
            model={str(k): str(v) for k, v in data["model"].items()},
            preprocessing=Preprocessing.from_json(data["preprocessing"]),
            tokens=TokenLayout.from_json(data["tokens"]),
            redirect=RedirectOptions.from_json(data["redirect"]),
            layers=_layers(data["redirect"]["layers"]),
            detection_layer=integer(
                "outliers.detection_layer", data["outliers"]["detection_layer"]
            ),
            threshold=_threshold(data["outliers"]["threshold"]),
            outputs={name: _shape(name, shape) for name, shape in data["outputs"].items()},
            precision=str(data["precision"]),
            opset=integer("opset", data["opset"], 1),
            sites=Sites(
                token=integer("sites.token", sites["token"]),
                redirect=integer("sites.redirect", sites["redirect"]),
                output=integer("sites.output", sites["output"]),
                mended=tuple(str(line) for line in sites["mended"]),
                attention=integer("sites.attention", sites.get("attention", 0)),
            ),
            graphs={str(k): str(v) for k, v in data["graphs"].items()},
            files={
                str(name): FileRecord(
                    str(r["sha256"]), integer(f"files[{name!r}].bytes", r["bytes"])
                )
                for name, r in data["files"].items()
            },
            versions={str(k): str(v) for k, v in data["versions"].items()},
            verified=_truth("verified", data["verified"]),
            cuda=_fusions(data.get("cuda")),
            cuda_missing=str((data.get("cuda") or {}).get("missing", "")),
            constants=_constants(data),
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
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BundleError(
                f"{path}: cannot be read ({error.strerror}); expected the folder that "
                "`regraft export` wrote"
            ) from None
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path}: is not JSON ({error}); export again") from None
        _expect_schema(data, str(path))  # first: a newer schema may seal its content otherwise
        if "sha256" not in data:
            raise BundleError(f"{path}: the field 'sha256' is missing; export again")
        if data["sha256"] != digest(data):
            raise BundleError(f"{path}: was changed after export; export again")
        return cls.from_json(data, str(path))


def digest(content: Mapping[str, Any]) -> str:
    """The sha256 (hex) that a manifest of this content carries.

    Args:
        content: as :meth:`Manifest.to_json` gives it; its field ``sha256`` does not count.
    """
    bare = {name: value for name, value in content.items() if name != "sha256"}
    canonical = json.dumps(bare, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _expect_schema(data: Any, origin: str) -> None:
    if not isinstance(data, dict) or "schema" not in data:
        raise BundleError(f'{origin}: is not a manifest; expected a JSON object with "schema"')
    schema = data["schema"]
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise BundleError(f"{origin}: schema is {schema!r}; expected an integer from 1 on")
    if schema > SCHEMA:
        raise BundleError(
            f"{origin}: schema {schema} is newer than {SCHEMA}, the newest this "
            "version reads; upgrade regraft-runtime"
        )


def _layers(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"redirect.layers is {value!r}; expected a list of blocks")
    return tuple(integer("redirect.layers", layer) for layer in value)


def _constants(data: Mapping[str, Any]) -> Constants | None:
    if data["schema"] == 1:  # which knows the variant token alone
        return None
    variant, section = data["variant"], data["constants"]
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; expected one of {', '.join(VARIANTS)}")
    if (variant == "kv") != (section is not None):
        raise ValueError(f"constants is {section!r}; expected an object for the variant kv alone")
    return Constants.from_json(section) if variant == "kv" else None


def _threshold(value: object) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value <= sys.float_info.max
    ):
        raise ValueError(f"outliers.threshold is {value!r}; expected a finite number above 0")
    return float(value)


def _shape(name: str, value: object) -> tuple[int | str, ...]:
    if isinstance(value, list | tuple) and all(
        size == "batch" or (type(size) is int and size > 0) for size in value
    ):
        return tuple(value)
    raise ValueError(
        f'outputs["{name}"] is {value!r}; expected a list of positive integers and "batch"'
    )


_COUNTED_LATER = ("operators", "constants")  # bundles of schema 2 were written without, at first


def _fusions(value: Any) -> CudaFusions | None:
    if value is None or "missing" in value:
        return None
    found: dict[str, Any] = {}
    for f in fields(CudaFusions):
        read = _truth if isinstance(f.default, bool) else integer
        found[f.name] = read(
            f"cuda.{f.name}", value.get(f.name, 0) if f.name in _COUNTED_LATER else value[f.name]
        )
    return CudaFusions(**found)


def _truth(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected true or false")
    return value


def _json(value: object) -> str:
    return "missing" if value is None else json.dumps(value)


def _refuse_escape(name: str, origin: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise BundleError(f"{origin}: the file name {name!r} leaves the bundle; refused")
