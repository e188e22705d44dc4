"""What the patch does to the features: outlier tokens, norms, attention, similarity of the output.

Measured on the probe graphs, patched and baseline, on the same images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.manifest import Manifest
from regraft.parity import cosine

_Outputs = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Norms:
    """Norms of tokens at the detection layer.

    Attributes:
        outliers: patch tokens whose norm is above the threshold.
        median: of the patch norms.
        largest: of the patch norms.
    """

    outliers: int
    median: float
    largest: float


@dataclass(frozen=True)
class Effect:
    """What the patch does, over a set of images.

    Attributes:
        images: how many.
        patches: patch tokens in all.
        detection_layer: where norms were measured.
        threshold: norm above which a patch counts as an outlier.
        before: of the baseline.
        after: of the patched model.
        register_norm: median norm of the test-time registers at the detection layer; None in the
            variant kv, which has none.
        register_attention: {layer: share of CLS attention that goes to the registers, or to the
            constants in their place}, mean over heads and images. Without a class token: of the
            patches' attention.
        cosine_of: what the cosines compare: pooled, cls or patches (their mean).
        cosine_median: over images, of patched and baseline.
        cosine_smallest: over images.
    """

    images: int
    patches: int
    detection_layer: int
    threshold: float
    before: Norms
    after: Norms
    register_norm: float | None
    register_attention: dict[int, float]
    cosine_of: str
    cosine_median: float
    cosine_smallest: float

    @property
    def removed(self) -> float | None:
        """Share of outlier tokens that are gone; None where there were none to remove."""
        return 1 - self.after.outliers / self.before.outliers if self.before.outliers else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; null for figures that are not finite."""
        values: dict[str, Any] = _finite({**asdict(self), "removed": self.removed})
        return values


@dataclass
class EffectMeter:
    """Accumulates the effect over batches of probe outputs."""

    manifest: Manifest
    images: int = 0
    _before: list[NDArray[np.float32]] = field(default_factory=list)
    _after: list[NDArray[np.float32]] = field(default_factory=list)
    _registers: list[NDArray[np.float32]] = field(default_factory=list)
    _cosines: list[NDArray[np.float64]] = field(default_factory=list)
    _attention: dict[int, list[NDArray[np.float32]]] = field(default_factory=dict)

    def update(self, baseline: _Outputs, patched: _Outputs) -> None:
        """Adds one batch: outputs of ``probe_baseline`` and ``probe``."""
        tokens, layer = self.manifest.tokens, self.manifest.detection_layer
        patches = slice(tokens.prefix, tokens.count)
        self._before.append(baseline[f"norms.{layer}"][:, patches])
        self._after.append(patched[f"norms.{layer}"][:, patches])
        self._registers.append(patched[f"norms.{layer}"][:, tokens.count :])
        for i in range(tokens.depth):
            share = patched[f"attentions.{i}"][:, :, tokens.count :].sum(axis=2).mean(axis=1)
            self._attention.setdefault(i, []).append(share)
        a, b = self._image_vectors(baseline), self._image_vectors(patched)
        self._cosines.append(cosine(a.astype(np.float64), b.astype(np.float64)))
        self.images += len(a)

    def result(self) -> Effect:
        """The effect over everything seen so far; at least one image."""
        threshold = self.manifest.threshold
        before, after = np.concatenate(self._before), np.concatenate(self._after)
        cosines, registers = np.concatenate(self._cosines), np.concatenate(self._registers)
        return Effect(
            images=self.images,
            patches=before.size,
            detection_layer=self.manifest.detection_layer,
            threshold=threshold,
            before=_norms(before, threshold),
            after=_norms(after, threshold),
            register_norm=float(np.median(registers)) if registers.size else None,
            register_attention={
                i: float(np.concatenate(shares).mean()) for i, shares in self._attention.items()
            },
            cosine_of=self._kind(),
            cosine_median=float(np.median(cosines)),
            cosine_smallest=float(cosines.min()),
        )

    def _kind(self) -> str:
        if "pooler_output" in self.manifest.outputs:
            return "pooled"
        return "cls" if self.manifest.tokens.class_token else "patches"

    def _image_vectors(self, outputs: _Outputs) -> NDArray[np.float32]:
        kind, tokens = self._kind(), self.manifest.tokens
        if kind == "pooled":
            return outputs["pooler_output"]
        state = outputs["last_hidden_state"]
        if kind == "cls":
            return state[:, 0]
        return np.asarray(state[:, tokens.prefix :].mean(axis=1))


def _norms(norms: NDArray[np.float32], threshold: float) -> Norms:
    return Norms(
        outliers=int((~(norms <= threshold)).sum()),  # NaN is no normal token
        median=float(np.median(norms)),
        largest=float(norms.max()),
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
