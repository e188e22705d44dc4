from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support import traces

from regraft_export.graph.patch import Traced


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Traced]:
    """``traced(family, precision="fp32")``."""

    def get(family: str, precision: str = "fp32") -> Traced:
        return traces.traced(tmp_path_factory, family, precision)

    return get
