"""Pictures, tiny models, and a hub that is out of reach at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SIZES = ((333, 517), (400, 251), (60, 41), (224, 224), (300, 299))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are tiny: threads that wait for each other take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    """Textured JPEG and PNG files of odd sizes, decoded."""
    folder: Path = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    pictures = []
    for index, (height, width) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (height // 5 + 2, width // 5 + 2, 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        path = folder / f"{index}.{'png' if index % 2 else 'jpg'}"
        image.save(path)
        pictures.append(Image.open(path).convert("RGB"))
    return pictures


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The hub refuses at once instead of after half a minute of retries; its cache is empty."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return
