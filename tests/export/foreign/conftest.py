"""Files of real exporters, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support import models
from tests.support.exporters import dynamo, of_transformers, torchscript

WRITE = {"dynamo": dynamo, "torchscript": torchscript, "transformers": of_transformers}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``file(family, exporter, opset, options)``: a file as that exporter writes it."""
    folder, made = tmp_path_factory.mktemp("foreign"), dict[str, Path]()

    def get(family: str, exporter: str, opset: int, options: Any) -> Path:
        name = f"{family}-{exporter}-{opset}-{'-'.join(f'{k}={v}' for k, v in options.items())}"
        if name not in made:
            made[name] = folder / f"{name}.onnx"
            write: Callable[..., None] = WRITE[exporter]
            size = models.FAMILIES[family].size
            write(models.vit(family).module, size, made[name], opset, **options)
        return made[name]

    return get
