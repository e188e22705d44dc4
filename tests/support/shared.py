"""What is expensive is made once per test run, also when several processes share the run."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_made: dict[str, Any] = {}


def folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all its processes see."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (shared / "shared").mkdir(exist_ok=True)
    return shared / "shared"


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """The result of ``make(empty folder)``, which is called by the first process that asks."""
    if name not in _made:
        place = folder(factory)
        with (place / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            result = place / f"{name}.pickle"
            if not result.exists():
                (place / name).mkdir()
                result.write_bytes(pickle.dumps(make(place / name)))
        _made[name] = pickle.loads(result.read_bytes())
    return _made[name]
