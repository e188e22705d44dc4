"""Planted ViTs and pictures for them, an exported bundle, exports without tracing, and the command
line in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.support import bundles, shared
from tests.support.planting import Planted, flagged_pictures, plant
from torch import Tensor

from regraft_export.graph.patch import Traced
from regraft_export.trace import trace


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small run faster on one thread, and much faster where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pictures() -> Callable[..., Tensor]:
    """See :func:`flagged_pictures`."""
    return flagged_pictures


@pytest.fixture(scope="session")
def planter() -> Callable[..., Planted]:
    """See :func:`plant`."""
    return plant


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with every kind of output; do not change it."""
    return bundles.exported(tmp_path_factory)


@pytest.fixture
def quick_trace(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take the planted model's trace from a store; tracing has tests of its own."""

    def stored(vit: object, size: tuple[int, int], precision: str = "fp32") -> Traced:
        assert size == bundles.SIZE
        name = f"trace-planted-{precision}"
        return shared.once(
            tmp_path_factory, name, lambda _: trace(bundles.vit(), bundles.SIZE, precision)
        )

    monkeypatch.setattr("regraft_export.exporting.trace", stored)
