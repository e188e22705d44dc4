"""A family's whole path through the command line, as a user would walk it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tests.support.families import Family, planted_module, units_of
from tests.support.planting import flagged_pictures, grey_levels

from regraft.bundle import Bundle
from regraft.neurons import Neurons

Regraft = Callable[..., tuple[int, str, str]]


def write_pictures(folder: Path, family: Family, count: int) -> Path:
    """Pictures whose pixels reach the model as they are."""
    folder.mkdir()
    levels = grey_levels(flagged_pictures(count, 2, family.size, family.patch))
    for number, level in enumerate(levels):
        Image.fromarray(level).save(folder / f"{number:02}.png")
    return folder


def preprocessing(family: Family) -> list[str]:
    words = (
        f"--image-size {family.size} --mean 0.5 0.5 0.5 --std 0.2 0.2 0.2 "
        "--interpolation bicubic --crop-pct 1.0 --crop-mode squash"
    )
    return words.split()


def whole_path(
    regraft: Regraft,
    family: Family,
    place: Path,
    pictures: int,
    *,
    layers: tuple[int, ...] = (),
    half: bool = False,
) -> Path:
    """find, export, verify and extract; returns the bundle after checking each step.

    Args:
        regraft: runs the command line.
        family: what to run it on.
        place: an empty folder.
        pictures: how many to find on; at most eight are verified.
        layers: block outputs to export.
        half: whether to export in fp16 too.
    """
    (place / "model").mkdir()
    images = write_pictures(place / "images", family, pictures)
    few = write_pictures(place / "few", family, min(pictures, 8) if pictures > 6 else 2)
    model, *more = family.save(planted_module(family), place / "model")
    given = [model, *more, "--images", images]
    bundle, neurons = place / "bundle", place / "neurons.json"

    code, _, err = regraft("find", *given, *preprocessing(family), "--out", neurons)
    assert code == 0, err
    found = {(n.layer, n.index) for n in Neurons.load(neurons).neurons}
    assert found == set(units_of(family))

    own = [model, *more]
    export = ["export", *own, "--images", few, *preprocessing(family), "--neurons", neurons]
    export += ["--layers", ",".join(map(str, layers or family.layers))]
    code, _, err = regraft(*export, "--out", bundle)
    assert code == 0, err
    if half:
        code, _, err = regraft(*export, "--out", place / "half", "--precision", "fp16")
        assert code == 0, err
    code, out, err = regraft("verify", bundle, "--images", few, "--model", *own, "--json")
    assert code == 0, err
    assert json.loads(out)["passed"]

    code, _, err = regraft("extract", bundle, few, "--out", place / "features.npz")
    assert code == 0, err
    features = np.load(place / "features.npz")
    side = family.size // family.patch
    layout = Bundle.open(bundle).manifest.tokens
    assert (layout.prefix, layout.grid) == (family.prefix, (side, side))
    assert features["patches"].shape[:3] == (len(list(few.iterdir())), side, side)
    return bundle
