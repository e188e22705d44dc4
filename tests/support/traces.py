"""Traced graphs of the small models, each traced once per test run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import models, shared

from regraft.neurons import Neurons
from regraft.redirect import RedirectOptions
from regraft_export.graph.patch import Traced
from regraft_export.reference import PyTorchReference
from regraft_export.trace import trace


def traced(factory: pytest.TempPathFactory, family: str, precision: str = "fp32") -> Traced:
    """The trace of a family's small model; shared, so leave it as it is."""

    def make(_: object) -> Traced:
        return trace(models.vit(family), models.FAMILIES[family].size, precision)

    result: Traced = shared.once(factory, f"trace-{family}-{precision}", make)
    return result


def right(
    family: str,
    graph: str,
    pixels: NDArray[np.float32],
    outputs: Sequence[str],
    neurons: Neurons,
    options: RedirectOptions,
) -> dict[str, NDArray[np.float32]]:
    """What PyTorch with hooks says the outputs of a graph are."""
    reference = PyTorchReference(models.vit(family), neurons, options)
    return dict(reference.run(graph, pixels, outputs))


def error(value: NDArray[np.generic], reference: NDArray[np.generic]) -> float:
    """Relative Frobenius error; shapes must be equal."""
    assert value.shape == reference.shape
    a, b = value.astype(np.float64), reference.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
