"""How much each MLP unit contributes to the outlier tokens.

``contribution`` (default): unit ``j`` of layer ``l`` adds ``a_j * gamma * W2[j]`` to a token, ``a``
the input of the down-projection, ``W2[j]`` its row, gamma LayerScale's (1 without). Of that, the
part along ``u``, the unit vector of the outlier token at the detection layer, makes the norm:
``a_j * ((gamma * W2[j]) . u)``, averaged over all outlier tokens, less the same over the ordinary
patches of images that have outliers, for which ``u`` is the image's mean outlier direction (the
normalised mean of the unit vectors). Layers after the detection layer cannot have written it.

``activation``: the paper's score (arXiv 2506.08010, Algorithm 1): mean signed activation at the
outlier tokens of an image, averaged over the images that have some. It needs a layer cap, because
later layers read outliers with large activations too, and never finds units that act through
negative activations.

One pass over the images, to the detection layer only, keeping sums: memory does not depend on the
number of images, and batches are cut so that the activations kept of one stay under 1 GiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from regraft.errors import InputError, ModelError
from regraft.wording import counted
from regraft_export.finding.norms import NormStatistics
from regraft_export.finding.outliers import Detection
from regraft_export.finding.subject import Contributions, Doubles, Floats, Subject

Score = Literal["contribution", "activation"]
MAX_KEPT_BYTES = 1 << 30


def gather_norms(subject: Subject, batches: Iterable[Floats]) -> NormStatistics:
    """Plain passes over ``batches`` of (B, 3, H, W): patch norms at every block's output."""
    stats = NormStatistics(len(subject.hidden))
    for pixels in batches:
        stats.add(subject.norms(pixels))
    return stats


@dataclass(frozen=True)
class Scores:
    """Scores of all units of the layers 0 to the cap.

    Attributes:
        kind: which score it is.
        score: per layer, float64 (m,).
        activation: per layer, float64 (m,): mean activation at outlier tokens, whose sign is the
            unit's.
        outliers: outlier tokens seen.
        images: images seen.
        images_with_outliers: of these, those with at least one.
    """

    kind: Score
    score: tuple[NDArray[np.float64], ...]
    activation: tuple[NDArray[np.float64], ...]
    outliers: int
    images: int
    images_with_outliers: int

    def ranking(self) -> list[tuple[int, int]]:
        """(layer, index) of all units with a positive score, best first."""
        layers = np.concatenate([np.full(len(s), i) for i, s in enumerate(self.score)])
        indices = np.concatenate([np.arange(len(s)) for s in self.score])
        scores = np.concatenate(self.score)
        # lexsort's last key comes first: by score, then layer, then index.
        order = np.lexsort((indices, layers, -scores))
        return [(int(layers[i]), int(indices[i])) for i in order if scores[i] > 0]


class _Sums:
    """Sums over batches, per layer."""

    def __init__(self, hidden: Sequence[int]) -> None:
        def zeros() -> list[Doubles]:
            return [np.zeros(m) for m in hidden]

        self.at_outliers, self.elsewhere = zeros(), zeros()
        self.activation, self.activation_by_image = zeros(), zeros()
        self.outliers = self.ordinary = self.images = self.images_with_outliers = 0

    def add(self, part: Contributions) -> None:
        """Adds one batch."""
        for sums, values in (
            (self.at_outliers, part.at_outliers),
            (self.elsewhere, part.elsewhere),
            (self.activation, part.activation),
            (self.activation_by_image, part.activation_by_image),
        ):
            for total, value in zip(sums, values, strict=True):
                total += value
        self.outliers += part.outliers
        self.ordinary += part.ordinary
        self.images_with_outliers += part.images_with_outliers


def score_neurons(
    subject: Subject,
    batches: Iterable[Floats],
    detection: Detection,
    *,
    kind: Score = "contribution",
    max_layer: int | None = None,
) -> Scores:
    """Scores every unit up to the detection layer.

    Args:
        subject: the model.
        batches: (B, 3, H, W) each, any number of them.
        detection: which tokens are outliers.
        kind: which score.
        max_layer: last layer to score; None for the detection layer.

    Raises:
        InputError: ``max_layer`` is out of range.
        ModelError: activations are not finite, or no outlier token was seen.
    """
    cap = detection.layer if max_layer is None else max_layer
    if not 0 <= cap <= detection.layer:
        raise InputError(
            f"max layer is {cap}; expected 0 to {detection.layer}, the detection layer: later "
            "layers cannot have written what is there"
        )
    sums = _Sums(subject.hidden[: cap + 1])
    for pixels in _small_enough(batches, subject.activation_bytes(cap + 1)):
        part = subject.contributions(pixels, detection.layer, detection.threshold, cap + 1)
        sums.images += len(pixels)
        if part is not None:
            sums.add(part)
    if sums.outliers == 0:
        raise ModelError(
            f"no outlier tokens: no patch norm above {detection.threshold:.4g} at layer "
            f"{detection.layer} in the {counted(sums.images, 'image')} used for scoring"
        )
    return _means(sums, kind)


def _small_enough(batches: Iterable[Floats], per_image: int) -> Iterator[Floats]:
    """Cuts batches so that the kept activations stay under :data:`MAX_KEPT_BYTES`."""
    size = max(1, MAX_KEPT_BYTES // per_image)
    for pixels in batches:
        for start in range(0, len(pixels), size):
            yield pixels[start : start + size]


def _means(sums: _Sums, kind: Score) -> Scores:
    activation = [a / sums.outliers for a in sums.activation]
    if kind == "activation":
        score = [a / sums.images_with_outliers for a in sums.activation_by_image]
    else:
        pairs = zip(sums.at_outliers, sums.elsewhere, strict=True)
        ordinary = max(1, sums.ordinary)
        score = [at / sums.outliers - other / ordinary for at, other in pairs]
    for layer, values in enumerate(score):
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise ModelError(
                f"layer {layer}: the scores of {bad} of {len(values)} units are NaN or infinite; "
                "expected finite activations: check the weights"
            )
    return Scores(
        kind=kind,
        score=tuple(score),
        activation=tuple(activation),
        outliers=sums.outliers,
        images=sums.images,
        images_with_outliers=sums.images_with_outliers,
    )
