"""timm: models by name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from regraft.errors import ModelError
from regraft.preprocessing import Preprocessing
from regraft_export.sources import PreprocessingOverrides, load

NAME = "test_vit"  # timm's own tiny ViT: 160 px, patch 16, width 64, depth 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp("weights") / "test_vit.pth"
    torch.save(timm.create_model(NAME).state_dict(), path)
    return path


def test_weights_from_a_file(checkpoint: Path, photos: list[Image.Image]) -> None:
    loaded = load(f"timm:{NAME}", weights=checkpoint)
    reference = timm.create_model(NAME).eval()
    reference.load_state_dict(torch.load(checkpoint))
    config = timm.data.resolve_model_data_config(reference)
    transform = timm.data.create_transform(**config, is_training=False)
    assert loaded.architecture == "VisionTransformer"
    for photo in photos[:2]:
        pixels = transform(photo)
        np.testing.assert_array_equal(loaded.preprocessing(photo), pixels)
        with torch.no_grad():
            assert torch.equal(loaded.module(pixels[None]), reference(pixels[None]))


def test_another_image_size_resamples_the_positions(checkpoint: Path) -> None:
    overrides = PreprocessingOverrides(image_size=(96, 128), crop_pct=1.0)
    loaded = load(f"timm:{NAME}", weights=checkpoint, overrides=overrides)
    assert loaded.preprocessing.image_size == loaded.preprocessing.resize_size == (96, 128)
    state = torch.load(checkpoint)
    expected = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], (6, 8), (10, 10), num_prefix_tokens=1
    )
    torch.testing.assert_close(loaded.module.pos_embed, expected)
    with torch.no_grad():
        assert loaded.module(torch.zeros(2, 3, 96, 128)).isfinite().all()


def test_a_complete_preprocessing_sets_the_image_size(checkpoint: Path) -> None:
    ours = Preprocessing((96, 128), (0.5,) * 3, (0.5,) * 3, "exact", (96, 128))
    loaded = load(f"timm:{NAME}", weights=checkpoint, preprocessing=ours)
    assert loaded.preprocessing is ours
    with torch.no_grad():
        assert loaded.module(torch.zeros(1, 3, 96, 128)).isfinite().all()


@pytest.mark.usefixtures("no_hub")
def test_no_connection() -> None:
    with pytest.raises(ModelError) as caught:
        load(f"timm:{NAME}.r160_in1k")
    # The reason is the hub client's own, and its words change with its version.
    assert re.fullmatch(
        rf"timm:{NAME}\.r160_in1k: the pretrained weights cannot be loaded \(.*[Hh]ub.*\); "
        r"check the name and the connection, or give --weights FILE",
        str(caught.value),
    )


def test_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(ModelError) as caught:
        load("timm:vit_base_patch16_244.augreg_in1k")
    assert str(caught.value).startswith(
        f"timm:vit_base_patch16_244.augreg_in1k: timm {timm.__version__} has no model "
        "'vit_base_patch16_244'; did you mean "
    )
    assert "vit_base_patch16_224" in str(caught.value)
    with pytest.raises(ModelError, match=r"; timm\.list_models\(\) names all$"):
        load("timm:0000")


def test_unknown_tag() -> None:
    with pytest.raises(ModelError, match=r"timm:test_vit\.nonsense: .*Invalid pretrained tag"):
        load("timm:test_vit.nonsense")


def test_weights_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"foreign": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"do not fit VisionTransformer: \d+ missing \(cls_token"):
        load(f"timm:{NAME}", weights=path)


def test_image_sizes_that_do_not_fit(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=r"the image size \(100, 96\) is no multiple of the patch"):
        load(
            f"timm:{NAME}",
            weights=checkpoint,
            overrides=PreprocessingOverrides(image_size=(100, 96)),
        )
    with pytest.raises(ModelError) as caught:
        load(
            "timm:resnet10t",
            weights=checkpoint,
            overrides=PreprocessingOverrides(image_size=(96, 96)),
        )
    assert str(caught.value) == (
        "timm:resnet10t: this model does not take another image size; leave --image-size out"
    )
