"""Constants of the variant kv for the small models, and the same arithmetic said with loops."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from regraft_export.register_constants import RegisterConstants
from regraft_export.vit.structure import VisionTransformer


def drawn(
    vit: VisionTransformer, first: int = 1, registers: int = 1, seed: int = 0
) -> RegisterConstants:
    """Random constants from a block on, large enough to draw attention."""
    rng = np.random.default_rng(seed)
    layout = vit.layout
    shape = (layout.heads, registers, layout.width // layout.heads)
    layers = range(first, layout.depth)
    return RegisterConstants(
        {i: (2 * rng.standard_normal(shape)).astype(np.float32) for i in layers},
        {i: (2 * rng.standard_normal(shape)).astype(np.float32) for i in layers},
    )


def attention(
    query: NDArray[np.floating],
    key: NDArray[np.floating],
    value: NDArray[np.floating],
    constant_key: NDArray[np.floating],
    constant_value: NDArray[np.floating],
) -> NDArray[np.float64]:
    """What attention with constants gives; loops over images, heads and queries.

    Args:
        query: (B, heads, T, size); keys and values likewise.
        key: see above.
        value: see above.
        constant_key: (heads, R, size); values likewise.
        constant_value: see above.
    """
    result = np.zeros(query.shape, dtype=np.float64)
    images, heads, tokens, size = query.shape
    for b in range(images):
        for h in range(heads):
            keys = [*key[b, h].astype(np.float64), *constant_key[h].astype(np.float64)]
            values = [*value[b, h].astype(np.float64), *constant_value[h].astype(np.float64)]
            for t in range(tokens):
                scores = np.array([query[b, h, t].astype(np.float64) @ k for k in keys])
                weights = np.exp((scores - scores.max()) / np.sqrt(size))
                weights /= weights.sum()
                result[b, h, t] = sum(w * v for w, v in zip(weights, values, strict=True))
    return result
