"""Families at their published sizes, through the command line; less deep where that is named.

Each takes two minutes to twelve on two shared cores, and up to 17 GiB of memory; with
MALLOC_MMAP_THRESHOLD_=1048576, by which glibc gives back what is freed, an L took 11. So
``make test-all`` runs them in one worker (``--dist loadgroup``). Where there is more memory, plain
``-n 8`` runs eight at a time: other modes of pytest-xdist do not look at groups.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.families import cases
from tests.support.real_families import REAL
from tests.support.whole_path import Regraft, whole_path

# In one worker, one after another: two at a time want more memory than 24 GiB.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real_sizes")]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", cases(REAL))
def test_from_finding_to_features(name: str, regraft: Regraft, tmp_path: Path) -> None:
    # LLaVA reads CLIP at the output of the block before the last.
    layers = (22,) if name.endswith("clip_l14_336") else ()
    whole_path(regraft, REAL[name], tmp_path, pictures=6, layers=layers)
    if layers:
        hidden = np.load(tmp_path / "features.npz")["hidden.22"]
        assert hidden.shape == (2, 577, 1024)
