"""A fake card for the tests of engines."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from tests.support import fake_onnxruntime
from tests.support.fake_tensorrt import Cudart

Fake = fake_onnxruntime.Module


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A machine with a card and onnxruntime-gpu."""
    module = Fake(Cudart())
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", module.cudart)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return module
