"""Numeric parity of two runs of one model, per output and per token.

Limits are data, by precision. A comparison accumulates over batches, and comparing nothing is a
failure.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Limits:
    """What one precision may deviate from float32.

    Attributes:
        relative_error: largest ||candidate - reference|| / ||reference|| (Frobenius) of an output.
        token_cosine: smallest 1st percentile over tokens of their cosine.
        image_cosine: smallest cosine of an image's CLS token or pooled vector.
    """

    relative_error: float
    token_cosine: float
    image_cosine: float


LIMITS = {
    "fp32": Limits(1e-4, 0.9999, 0.999),
    "fp16": Limits(1e-2, 0.995, 0.999),
    "bf16": Limits(2e-2, 0.99, 0.999),
}


@dataclass(frozen=True)
class WorstToken:
    """The token that differs most in direction.

    Attributes:
        cosine: of the two sides.
        image: its image, from 0, in the order of comparison.
        token: its position, from 0, prefix tokens first.
    """

    cosine: float
    image: int
    token: int


@dataclass(frozen=True)
class Comparison:
    """How one output of one graph compares.

    Attributes:
        graph: model, baseline, probe or probe_baseline.
        output: ONNX name.
        relative_error: Frobenius, over all images.
        token_cosine: 1st percentile over all tokens; None for outputs that are not tokens.
        worst_token: the token with the smallest cosine, which no limit is put on; None likewise.
        image_cosine: smallest over images, of CLS or the pooled vector; None if there is neither.
        finite: whether every value of both sides is finite.
        images: how many were compared.
        failures: one line per limit that was missed; empty if passed.
    """

    graph: str
    output: str
    relative_error: float
    token_cosine: float | None
    image_cosine: float | None
    finite: bool
    images: int
    failures: tuple[str, ...]
    worst_token: WorstToken | None = None

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "failures": list(self.failures), "passed": self.passed}


@dataclass
class Meter:
    """Accumulates one output's comparison over batches.

    Attributes:
        graph: the graph's name.
        output: the output's name; it decides what is compared per token and per image.
        class_token: whether token 0 of ``last_hidden_state`` is CLS.
        kind: what the output is, where its name is none of a bundle's: ``tokens`` (B, T, D), of
            which token 0 is CLS if ``class_token`` says so, ``vectors`` (B, E), or ``numbers``.
    """

    graph: str
    output: str
    class_token: bool
    kind: Literal["tokens", "vectors", "numbers"] | None = None
    images: int = 0
    finite: bool = True
    _worst: WorstToken | None = None
    _squared_error: float = 0.0
    _squared_reference: float = 0.0
    _token_cosines: list[NDArray[np.float64]] = field(default_factory=list)
    _image_cosines: list[NDArray[np.float64]] = field(default_factory=list)
    _shapes: set[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)

    def update(self, reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> None:
        """Adds one batch; both (B, ...)."""
        self.images += len(reference)
        if reference.shape != candidate.shape:
            self._shapes.add((reference.shape, candidate.shape))
            return
        a, b = reference.astype(np.float64), candidate.astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            self.finite = False
            return
        self._squared_error += float(np.square(b - a).sum())
        self._squared_reference += float(np.square(a).sum())
        if self._is("tokens", ("last_hidden", "hidden.", "test_time_registers")):
            cosines = cosine(a, b)
            self._token_cosines.append(cosines.ravel())
            self._note_worst(cosines)
        if self.class_token and self._is("tokens", ("last_hidden_state",)):
            self._image_cosines.append(cosine(a[:, 0], b[:, 0]))
        if self._is("vectors", ("pooler_output",)):
            self._image_cosines.append(cosine(a, b))

    def _is(self, kind: str, names: tuple[str, ...]) -> bool:
        return self.output.startswith(names) if self.kind is None else self.kind == kind

    def _note_worst(self, cosines: NDArray[np.float64]) -> None:
        """Remembers the worst token of a batch, (B, T), if it is the worst so far."""
        row, token = np.unravel_index(int(cosines.argmin()), cosines.shape)
        value = float(cosines[row, token])
        if self._worst is None or value < self._worst.cosine:
            image = self.images - len(cosines) + int(row)
            self._worst = WorstToken(value, image, int(token))

    def result(self, limits: Limits) -> Comparison:
        """The comparison so far, held to limits."""
        # The floor keeps the ratio finite where the reference is zero; it is far below any float32.
        error = float(np.sqrt(self._squared_error / max(self._squared_reference, 1e-100)))
        tokens = _percentile(self._token_cosines, 1)
        image = _percentile(self._image_cosines, 0)
        return Comparison(
            graph=self.graph,
            output=self.output,
            relative_error=error,
            token_cosine=tokens,
            image_cosine=image,
            finite=self.finite,
            images=self.images,
            failures=tuple(self._failures(error, tokens, image, limits)),
            worst_token=self._worst,
        )

    def _failures(
        self, error: float, tokens: float | None, image: float | None, limits: Limits
    ) -> list[str]:
        name, failures = f"{self.graph} {self.output}", []
        if self.images == 0:
            failures.append(f"{name}: nothing was compared")
        for reference, candidate in sorted(self._shapes):
            failures.append(f"{name}: shape {candidate}; the reference has {reference}")
        if not self.finite:
            failures.append(f"{name}: NaN or infinity")
        if not error <= limits.relative_error:
            failures.append(
                f"{name}: relative error {error:.2e}; at most {limits.relative_error:.0e} allowed"
            )
        if tokens is not None and not tokens >= limits.token_cosine:
            failures.append(
                f"{name}: 1st-percentile token cosine {tokens:.6f}; at least "
                f"{limits.token_cosine} needed"
            )
        if image is not None and not image >= limits.image_cosine:
            failures.append(
                f"{name}: smallest image cosine {image:.6f}; at least {limits.image_cosine} needed"
            )
        return failures


def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine along the last axis; two zero vectors agree, a zero and another do not."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    equal = (a == b).all(axis=-1).astype(np.float64)
    dots = (a * b).sum(axis=-1)
    safe = np.where(norms > 0, norms, 1.0)
    return np.asarray(np.where(norms > 0, np.clip(dots / safe, -1.0, 1.0), equal))


def _percentile(parts: list[NDArray[np.float64]], percent: float) -> float | None:
    return float(np.percentile(np.concatenate(parts), percent)) if parts else None
