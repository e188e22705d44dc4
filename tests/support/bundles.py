"""A bundle of the ViT with planted neurons, exported once per test run."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import handmade_vit, models, pictures, shared

from regraft.neurons import Neurons, RegisterNeuron
from regraft_export.export_options import ExportOptions
from regraft_export.exporting import export_bundle
from regraft_export.outlier_level import OutlierLevel
from regraft_export.sources import LoadedModel, load
from regraft_export.vit.structure import VisionTransformer, from_module

FILE = Path(handmade_vit.__file__).resolve()
PLANTED, PLAIN = f"python:{FILE}:planted", f"python:{FILE}:plain"
SIZE = (handmade_vit.SIZE, handmade_vit.SIZE)
LEVEL = OutlierLevel(layer=2, threshold=40.0)
OPTIONS = ExportOptions(layers=(1, 3), attentions=(2,))


@functools.cache
def loaded(model: str = PLANTED) -> LoadedModel:
    """The model as the command line loads it."""
    models.torch.set_num_threads(1)
    return load(model)


@functools.cache
def vit(model: str = PLANTED) -> VisionTransformer:
    """Its structure."""
    return from_module(loaded(model).module, SIZE)


def neurons(**about: Any) -> Neurons:
    """The planted neurons; ``about`` as a neurons file records it."""
    found = (RegisterNeuron(layer, i, 9.0, sign, 2.5) for layer, i, sign in handmade_vit.PLANTED)
    return Neurons(tuple(found), about)


def found() -> Neurons:
    """As ``regraft find`` writes them: with the model's identity and the outlier level."""
    return neurons(
        model=PLANTED,
        weights_sha256=loaded().weights_sha256,
        image_size=list(SIZE),
        detection_layer=LEVEL.layer,
        threshold=LEVEL.threshold,
    )


def write_neurons(path: Path, what: Neurons | None = None) -> Path:
    """Writes a neurons file; returns its path."""
    path.write_text(json.dumps((what or found()).to_json()))
    return path


def batches(count: int = 6, batch_size: int = 4) -> Iterator[NDArray[np.float32]]:
    """Different pictures, preprocessed, in batches."""
    pixels = pictures.pixels(count, SIZE)
    for start in range(0, count, batch_size):
        yield pixels[start : start + batch_size]


def export(out: Path, options: ExportOptions = OPTIONS, **more: Any) -> Any:
    """Exports the planted model."""
    return export_bundle(
        loaded(),
        vit(),
        more.pop("neurons", None) or found(),
        more.pop("batches", batches),
        LEVEL,
        out,
        options,
        **more,
    )


def exported(factory: pytest.TempPathFactory) -> Path:
    """A bundle with every kind of output; shared, so leave it as it is."""

    def make(folder: Path) -> Path:
        export(folder / "bundle")
        return folder / "bundle"

    result: Path = shared.once(factory, "bundle", make)
    return result
