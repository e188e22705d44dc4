"""`regraft verify BUNDLE --model MODEL`: PyTorch with hooks as the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import bundles, pictures

from regraft.bundle import Bundle
from regraft.errors import InputError
from regraft_export.reference import open_reference

BARE = f"python:{bundles.FILE}:without_preprocessing"
OPTIONS = (
    "--image-size 32 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.25 --interpolation bilinear "
    "--crop-pct 0.9 --crop-mode squash --no-baseline"
)


def test_a_model_whose_preprocessing_came_from_options_needs_none_to_verify(
    regraft: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    photos = pictures.write(tmp_path / "pictures", 3)
    neurons = bundles.write_neurons(tmp_path / "neurons.json", bundles.neurons())
    words = ("--neurons", neurons, "--images", photos, "--out", tmp_path / "bundle")
    assert regraft("export", BARE, *words, *OPTIONS.split())[0] == 0
    code, out, err = regraft("verify", tmp_path / "bundle", "--images", photos, "--model", BARE)
    assert (code, err) == (0, "")
    assert out.startswith(
        "parity of ort-cpu (fp32) with PyTorch with hooks, float32, 3 images: passed\n"
    )


def test_another_model_is_refused(exported: Path) -> None:
    match = r"the bundle was made from .*:planted with weights .*; give the model the bundle was"
    with pytest.raises(InputError, match=match):
        open_reference(Bundle.open(exported), BARE, None).__enter__()
