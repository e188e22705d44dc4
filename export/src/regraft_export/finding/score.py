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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from regraft.errors import InputError, ModelError
from regraft_export.finding.norms import NormStatistics
from regraft_export.finding.outliers import Detection
from regraft_export.finding.passes import (
    Partial,
    norms_recorded,
    patch_norms,
    run_until,
    to_input,
)
from regraft_export.vit.structure import VisionTransformer

Score = Literal["contribution", "activation"]
MAX_KEPT_BYTES = 1 << 30


def gather_norms(vit: VisionTransformer, batches: Iterable[Tensor]) -> NormStatistics:
    """Plain passes over ``batches`` of (B, 3, H, W): patch norms at every block's output."""
    stats = NormStatistics(len(vit.blocks))
    with norms_recorded(vit) as norms, torch.inference_mode():
        for pixels in batches:
            vit.module(to_input(vit, pixels))
            stats.add(torch.stack(norms).cpu().numpy())
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
    """Sums over tokens and images, per layer, float64 on the model's device."""

    def __init__(self, vit: VisionTransformer, layers: int) -> None:
        sizes = [vit.blocks[i].down.in_features for i in range(layers)]

        def zeros() -> list[Tensor]:
            return [torch.zeros(m, dtype=torch.float64, device=vit.device) for m in sizes]

        self.at_outliers, self.elsewhere = zeros(), zeros()
        self.activation, self.activation_by_image = zeros(), zeros()
        self.outliers = self.ordinary = self.images = self.images_with_outliers = 0


def score_neurons(
    vit: VisionTransformer,
    batches: Iterable[Tensor],
    detection: Detection,
    *,
    kind: Score = "contribution",
    max_layer: int | None = None,
) -> Scores:
    """Scores every unit up to the detection layer.

    Args:
        vit: the model.
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
    sums = _Sums(vit, cap + 1)
    for pixels in _small_enough(vit, batches, cap + 1):
        _add(sums, vit, run_until(vit, pixels, detection.layer, range(cap + 1)), detection)
    if sums.outliers == 0:
        raise ModelError(
            f"no outlier tokens: no patch norm above {detection.threshold:.4g} at layer "
            f"{detection.layer} in the {sums.images} images used for scoring"
        )
    return _means(sums, kind)


def _small_enough(
    vit: VisionTransformer, batches: Iterable[Tensor], layers: int
) -> Iterator[Tensor]:
    """Cuts batches so that the kept activations stay under :data:`MAX_KEPT_BYTES`."""
    hidden = sum(vit.blocks[i].down.in_features for i in range(layers))
    per_image = vit.layout.count * hidden * vit.dtype.itemsize
    size = max(1, MAX_KEPT_BYTES // per_image)
    for pixels in batches:
        yield from torch.split(pixels, size)


@torch.inference_mode()
def _add(sums: _Sums, vit: VisionTransformer, partial: Partial, detection: Detection) -> None:
    """Adds one batch. The caller keeps no reference to ``partial``, which may be large."""
    tokens = partial.tokens
    prefix, count = vit.layout.prefix, vit.layout.count
    is_outlier = patch_norms(vit, tokens) > detection.threshold
    per_image = is_outlier.sum(dim=1)
    has = per_image > 0
    sums.images += len(tokens)
    if not bool(has.any()):
        return
    image, position = is_outlier.nonzero(as_tuple=True)
    position = position + prefix
    directions = F.normalize(tokens[image, position].float(), dim=-1)  # (n, D)
    mean = directions.new_zeros(len(tokens), directions.shape[1])
    mean = F.normalize(mean.index_add(0, image, directions), dim=-1)[has]  # (B', D)
    # A weight per token picks the ordinary patches inside one product, without a copy of hidden.
    ordinary = tokens.new_zeros(tokens.shape[:2])
    ordinary[:, prefix:count] = (~is_outlier).to(ordinary.dtype)
    ordinary = ordinary[has].unsqueeze(1)  # (B', 1, T)
    share = (1 / per_image[image])[:, None]  # of its image's mean, (n, 1)
    for layer, h in partial.hidden.items():
        block = vit.blocks[layer]
        weight = block.down.weight.float()  # (D, m)
        gamma = 1.0 if block.scale is None else block.scale.float()
        at = h[image, position].float()  # (n, m)
        elsewhere = torch.bmm(ordinary, h if bool(has.all()) else h[has]).squeeze(1).float()
        sums.at_outliers[layer] += _total(at * ((directions * gamma) @ weight))
        sums.elsewhere[layer] += _total(elsewhere * ((mean * gamma) @ weight))
        sums.activation[layer] += _total(at)
        sums.activation_by_image[layer] += _total(at * share)
    sums.outliers += len(image)
    sums.images_with_outliers += int(has.sum())
    sums.ordinary += int(has.sum()) * is_outlier.shape[1] - len(image)


def _total(rows: Tensor) -> Tensor:
    return rows.sum(dim=0, dtype=torch.float64)


def _means(sums: _Sums, kind: Score) -> Scores:
    activation = [(a / sums.outliers).cpu().numpy() for a in sums.activation]
    if kind == "activation":
        by_image = [a / sums.images_with_outliers for a in sums.activation_by_image]
        score = [a.cpu().numpy() for a in by_image]
    else:
        pairs = zip(sums.at_outliers, sums.elsewhere, strict=True)
        ordinary = max(1, sums.ordinary)
        score = [(at / sums.outliers - other / ordinary).cpu().numpy() for at, other in pairs]
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
