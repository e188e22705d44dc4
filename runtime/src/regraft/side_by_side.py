"""Two bundles of one model side by side, as of the variants ``token`` and ``kv``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.bundle import Bundle
from regraft.effect import Effect, Norms
from regraft.errors import InputError
from regraft.manifest import Manifest
from regraft.parity import cosine
from regraft.tokens import TokenLayout
from regraft.verification import Verification

_DASH = "-"


@dataclass(frozen=True)
class Agreement:
    """Cosines of what two bundles give for the same tokens or images.

    Attributes:
        what: cls, patches or pooled.
        median: over tokens of all images.
        low: the 1st percentile.
        smallest: of all.
    """

    what: str
    median: float
    low: float
    smallest: float


@dataclass
class AgreementMeter:
    """Accumulates the agreement of two bundles over batches of their outputs."""

    tokens: TokenLayout
    _cosines: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)

    def update(
        self, a: Mapping[str, NDArray[np.float32]], b: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Adds one batch: the outputs of both graphs ``model``."""
        for (what, one), (_, other) in zip(self._parts(a), self._parts(b), strict=True):
            found = cosine(one.astype(np.float64), other.astype(np.float64))
            self._cosines.setdefault(what, []).append(found.ravel())

    def _parts(
        self, outputs: Mapping[str, NDArray[np.float32]]
    ) -> Iterator[tuple[str, NDArray[np.float32]]]:
        state = outputs["last_hidden_state"]
        if self.tokens.class_token:
            yield "cls", state[:, 0]
        yield "patches", state[:, self.tokens.prefix :]
        if "pooler_output" in outputs:
            yield "pooled", outputs["pooler_output"]

    def result(self) -> list[Agreement]:
        """The agreement over everything seen so far."""
        joined = {what: np.concatenate(parts) for what, parts in self._cosines.items()}
        return [
            Agreement(what, float(np.median(c)), float(np.percentile(c, 1)), float(c.min()))
            for what, c in joined.items()
        ]


def expect_one_model(bundle: Bundle, other: Bundle) -> None:
    """Raises InputError unless both bundles were made from one model, for the same images."""
    a, b = bundle.manifest, other.manifest
    for what, one, two in (
        ("weights", a.model.get("weights_sha256"), b.model.get("weights_sha256")),
        ("preprocessing", a.preprocessing, b.preprocessing),
        ("tokens", _bare(a), _bare(b)),
        ("outlier level", (a.detection_layer, a.threshold), (b.detection_layer, b.threshold)),
    ):
        if one != two:
            raise InputError(
                f"{bundle.path} and {other.path} differ in their {what} ({one} and {two}); "
                "expected two exports of one model with one neurons file"
            )


def _bare(manifest: Manifest) -> TokenLayout:
    return replace(manifest.tokens, test_time_registers=0)


@dataclass(frozen=True)
class Side:
    """One of the two: its manifest and what verification found."""

    manifest: Manifest
    found: Verification

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"variant": self.manifest.variant, **self.found.to_json()}


def lines(sides: tuple[Side, Side], agreement: list[Agreement]) -> Iterator[str]:
    """A table of the effects, and how well the two agree."""
    effects = [side.found.effect for side in sides]
    names = [side.manifest.variant for side in sides]
    if names[0] == names[1]:
        names = ["BUNDLE", "--against"]
    yield f"{'side by side':<34}{'baseline':>12}{names[0]:>12}{names[1]:>12}"
    verdicts = ["passed" if side.found.passed else "FAILED" for side in sides]
    yield _row("parity", _DASH, *verdicts)
    if effects[0] is not None and effects[1] is not None:
        yield from _effects(effects[0], effects[1])
    for a in agreement:
        yield (
            f"agreement of the two, cosine of {a.what}: median {a.median:.4f}, 1st percentile "
            f"{a.low:.4f}, smallest {a.smallest:.4f}"
        )


def _effects(a: Effect, b: Effect) -> Iterator[str]:
    layer = a.detection_layer
    norms = (a.before, a.after, b.after)
    yield _row(f"outlier tokens of {a.patches}", *(str(n.outliers) for n in norms))
    yield _row("largest patch norm over median", *map(_over_median, norms))
    for name, before, one, two in (
        ("register norm", None, a.register_norm, b.register_norm),
        (
            f"attention on it, layer {layer}",
            None,
            a.register_attention[layer],
            b.register_attention[layer],
        ),
        (f"cosine of {a.cosine_of} to baseline, median", 1.0, a.cosine_median, b.cosine_median),
        ("  smallest", 1.0, a.cosine_smallest, b.cosine_smallest),
    ):
        yield _row(name, *(_DASH if v is None else f"{v:.4g}" for v in (before, one, two)))


def _over_median(norms: Norms) -> str:
    return f"{norms.largest / norms.median:.2f}" if norms.median else _DASH


def _row(name: str, *cells: str) -> str:
    return f"  {name:<32}" + "".join(f"{cell:>12}" for cell in cells)


def to_json(side: Side, agreement: list[Agreement]) -> dict[str, Any]:
    """What ``--json`` adds: the other side and the agreement."""
    return {"against": side.to_json(), "agreement": [asdict(a) for a in agreement]}
