"""Numbers by which a down-projection is recognised in another file, rounded or transposed.

A fingerprint holds the shape, the Frobenius norm and sixteen projections ``r' W c`` of the weight
onto vectors of signs, and eight projections of the bias. Rounding to bfloat16 moves a projection
by about 0.1 % of the Frobenius norm (each weight by at most 2**-9 of itself, at random), a
fine-tune that moves the weights by 1 % moves it by 1 %: the limit lies between, at 0.4 %.

Needs numpy alone, so that an ONNX file can be matched where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.neurons_about import BIAS_PROJECTIONS, PROJECTIONS

TOLERANCE = 0.004
_SEED = 250608010


def fingerprint(weight: NDArray[Any], bias: NDArray[Any] | None) -> dict[str, Any]:
    """The fingerprint of one down-projection, as plain JSON values.

    Args:
        weight: (hidden, D), or transposed (D, hidden): the longer side is hidden.
        bias: (D,), or None.
    """
    matrix = _hidden_first(weight)
    rows = _signs(0, PROJECTIONS, matrix.shape[0])
    columns = _signs(1, PROJECTIONS, matrix.shape[1])
    return {
        "shape": list(matrix.shape),
        "norm": _rounded(np.linalg.norm(matrix)),
        "projections": [_rounded(p) for p in np.einsum("kd,kd->k", rows @ matrix, columns)],
        "bias": None if bias is None else _of_bias(np.asarray(bias, np.float64)),
    }


def difference(
    expected: Mapping[str, Any], weight: NDArray[Any], bias: NDArray[Any] | None
) -> float:
    """How far a down-projection is from a fingerprint: 0 for the same, about 1 for another one.

    Args:
        expected: what :func:`fingerprint` gave.
        weight: (hidden, D) or (D, hidden).
        bias: (D,), or None if unknown or none; then the bias is not compared.

    Returns:
        The larger of the root mean square difference of the projections of weight and bias, each
        relative to its norm; infinite where shapes or numbers of projections differ, or values
        are not finite.
    """
    if weight.ndim != 2 or sorted(weight.shape) != sorted(expected["shape"]):
        return float("inf")
    got = fingerprint(weight, bias)
    parts = [(expected, got)]
    if expected.get("bias") is not None and got["bias"] is not None:
        parts.append((expected["bias"], got["bias"]))
    worst = float(np.max([_relative(a, b) for a, b in parts]))  # NaN, if there is one
    return worst if np.isfinite(worst) else float("inf")


def matches(
    expected: Mapping[str, Any],
    weight: NDArray[Any],
    bias: NDArray[Any] | None = None,
    tolerance: float = TOLERANCE,
) -> bool:
    """Whether a down-projection is the one of a fingerprint, up to rounding and transposition."""
    return difference(expected, weight, bias) <= tolerance


def _relative(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    given, got = (np.asarray(side["projections"], np.float64) for side in (a, b))
    if given.shape != got.shape:  # numpy would repeat the shorter one
        return float("inf")
    apart = given - got
    norms = max(float(a["norm"]), float(b["norm"]))
    if norms == 0:
        return 0.0
    # The norm itself is compared too: a rescaled weight has a small effect on small projections.
    of_norms = abs(float(a["norm"]) - float(b["norm"])) / norms
    return max(float(np.sqrt(np.mean(apart**2))) / norms, of_norms)


def _hidden_first(weight: NDArray[Any]) -> NDArray[np.float64]:
    hidden_first = weight if weight.shape[0] >= weight.shape[1] else weight.T
    return np.asarray(hidden_first, np.float64)


def _of_bias(bias: NDArray[np.float64]) -> dict[str, Any]:
    signs = _signs(2, BIAS_PROJECTIONS, bias.shape[0])
    return {
        "norm": _rounded(np.linalg.norm(bias)),
        "projections": [_rounded(p) for p in signs @ bias],
    }


def _signs(stream: int, count: int, length: int) -> NDArray[np.float64]:
    # Raw bits of a bit generator are promised to stay the same in every numpy version; the
    # distributions drawn from them are not.
    words = -(-count * length // 64)
    raw = np.random.PCG64([_SEED, stream]).random_raw(words)
    bits = np.unpackbits(raw.astype("<u8").view(np.uint8))[: count * length]
    return bits.reshape(count, length).astype(np.float64) * 2 - 1


def _rounded(value: Any) -> float:
    return float(f"{float(value):.7g}")
