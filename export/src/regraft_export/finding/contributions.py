"""Contributions of units to the outlier tokens of one batch, with numpy; see ``score.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft_export.finding.subject import Contributions, Doubles, Floats


def contributions(
    tokens: Floats,
    hidden: Mapping[int, NDArray[Any]],
    writes: Mapping[int, Floats],
    patches: slice,
    threshold: float,
) -> Contributions | None:
    """The sums of one batch.

    Args:
        tokens: (B, T, D) at the detection layer's output.
        hidden: {layer: (B, T, m)}, inputs of the down-projections, float32 or float16.
        writes: {layer: (m, D)}, what each unit writes: the down-projection, with LayerScale.
        patches: where in T they lie.
        threshold: above it a patch is an outlier.

    Returns:
        They; None where no image has an outlier.
    """
    inner = tokens[:, patches]
    norms = np.linalg.norm(inner, axis=-1)
    is_outlier = norms > threshold
    per_image = is_outlier.sum(axis=1)
    has = per_image > 0
    if not has.any():
        return None
    image, position = np.nonzero(is_outlier)
    directions = inner[image, position] / norms[image, position][:, None]  # (n, D)
    mean = np.zeros((len(tokens), tokens.shape[-1]), np.float32)
    np.add.at(mean, image, directions)
    mean = mean[has] / np.linalg.norm(mean[has], axis=-1, keepdims=True)  # (B', D)
    # A weight per token picks the ordinary patches inside one product, without a copy of hidden.
    ordinary = (~is_outlier[has]).astype(np.float32)[:, None]  # (B', 1, patches)
    share = (1 / per_image[image])[:, None].astype(np.float32)  # of its image's mean
    sums: list[tuple[Doubles, ...]] = []
    for layer, h in sorted(hidden.items()):
        write = writes[layer]
        units = h[:, patches]
        at = units[image, position].astype(np.float32)  # (n, m)
        others = [
            w @ units[i].astype(np.float32, copy=False)
            for w, i in zip(ordinary, np.flatnonzero(has), strict=True)
        ]
        elsewhere = np.concatenate(others)  # (B', m)
        rows = (at * (directions @ write.T), elsewhere * (mean @ write.T), at, at * share)
        sums.append(tuple(r.sum(axis=0, dtype=np.float64) for r in rows))
    return Contributions.of_batch(sums, per_image, is_outlier.shape[1])
