"""regraft: the cleaned features of patched Vision Transformers, served without PyTorch.

::

    from regraft import Extractor

    with Extractor.open("bundle") as extractor:
        features = extractor.extract(["cat.jpg", "dog.jpg"])
    features.patches    # (B, rows, cols, D) float32
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.extractor import Extractor
    from regraft.features import Features

__version__ = "0.1.0"
__all__ = ["Extractor", "Features", "__version__"]

_HOMES = {"Extractor": "regraft.extractor", "Features": "regraft.features"}


def __getattr__(name: str) -> Any:
    # numpy and Pillow load on first use, so that `regraft --help` stays quick.
    if name not in _HOMES:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
