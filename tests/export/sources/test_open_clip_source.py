"""open_clip: image towers by name and from a folder, with weights from a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from regraft.errors import ModelError
from regraft_export.sources import PreprocessingOverrides, load
from regraft_export.sources.open_clip_source import _preprocessing

ARCHITECTURE = "ViT-M-32-alt"
CONFIG: dict[str, Any] = {
    "embed_dim": 20,
    "quick_gelu": True,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1, "vocab_size": 64},
}


def write(folder: Path, config: dict[str, Any] = CONFIG, **preprocess: Any) -> Any:
    """Writes a model as OpenCLIP's local-dir has it; returns the whole model."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    about = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def test_a_folder(tmp_path: Path, photos: list[Image.Image]) -> None:
    write(tmp_path, mean=[0.4, 0.5, 0.6])
    loaded = load(f"open_clip:local-dir:{tmp_path}")
    reference = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    assert loaded.architecture == "VisionTransformer"
    transform = image_transform_v2(PreprocessCfg(**reference.visual.preprocess_cfg), is_train=False)
    for photo in photos:
        pixels = transform(photo)
        np.testing.assert_array_equal(loaded.preprocessing(photo), pixels)
        with torch.no_grad():
            expected = reference.encode_image(pixels[None])
            assert torch.equal(loaded.module(pixels[None]), expected)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)], ids=["square", "wide"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_preprocessing_is_open_clips_own(
    size: tuple[int, int], mode: str, interpolation: str, photos: list[Image.Image]
) -> None:
    config = PreprocessCfg(size, interpolation=interpolation, resize_mode=mode, fill_color=127)
    ours = _preprocessing("x", vars(config))
    theirs = image_transform_v2(config, is_train=False)
    for photo in photos:
        np.testing.assert_array_equal(ours(photo), theirs(photo))


def test_weights_of_the_whole_model_or_of_the_tower(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = open_clip.create_model(ARCHITECTURE)
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    torch.save(model.visual.state_dict(), tmp_path / "tower.pth")
    for name in ("whole", "tower"):
        loaded = load(f"open_clip:{ARCHITECTURE}", weights=tmp_path / f"{name}.pth")
        for key, tensor in model.visual.state_dict().items():
            assert torch.equal(loaded.module.state_dict()[key], tensor), key
    assert loaded.preprocessing.image_size == (224, 224)
    assert loaded.preprocessing.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)


def test_a_tag_is_not_needed_beside_weights_nor_downloaded(tmp_path: Path) -> None:
    torch.save(open_clip.create_model("ViT-B-32").visual.state_dict(), tmp_path / "w.pth")
    loaded = load("open_clip:ViT-B-32/laion2b_s34b_b79k", weights=tmp_path / "w.pth")
    assert loaded.source == "open_clip:ViT-B-32/laion2b_s34b_b79k"


def test_another_image_size_resamples_the_positions_as_open_clip_does(tmp_path: Path) -> None:
    write(tmp_path)
    overrides = PreprocessingOverrides(image_size=(48, 64))
    expected = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=(48, 64))
    positions = expected.visual.positional_embedding
    assert positions.shape == (1 + 6 * 8, 32)
    from_folder = load(f"open_clip:local-dir:{tmp_path}", overrides=overrides)
    assert torch.equal(from_folder.module.positional_embedding, positions)
    assert from_folder.preprocessing.image_size == (48, 64)
    weights = tmp_path / "open_clip_model.safetensors"
    from_file = load(f"open_clip:local-dir:{tmp_path}", weights=weights, overrides=overrides)
    assert torch.equal(from_file.module.positional_embedding, positions)
    with torch.no_grad():
        assert from_file.module(torch.zeros(1, 3, 48, 64)).shape == (1, 20)


def timm_config() -> dict[str, Any]:
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
    return {**CONFIG, "vision_cfg": {**vision, "image_size": 160}}


def test_towers_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**timm_config())
    about = {"model_cfg": timm_config(), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    size = PreprocessingOverrides(image_size=(96, 96))
    for weights in (None, tmp_path / "open_clip_model.safetensors"):
        loaded = load(f"open_clip:local-dir:{tmp_path}", weights=weights, overrides=size)
        assert loaded.architecture == "TimmModel"
        assert loaded.module.trunk.pos_embed.shape == (1, 1 + 36, 64)
        assert loaded.preprocessing.image_size == (96, 96)


@pytest.mark.usefixtures("no_hub")
def test_no_connection() -> None:
    with pytest.raises(ModelError) as caught:
        load("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert re.fullmatch(
        r"open_clip:ViT-B-32/laion2b_s34b_b79k: the model cannot be loaded \(.+\); check the name "
        r"and the connection, or give --weights FILE",
        str(caught.value),
    )


def test_names_that_do_not_exist() -> None:
    with pytest.raises(ModelError) as caught:
        load("open_clip:ViT-B-61/openai")
    message = str(caught.value)
    assert message.startswith(
        "open_clip:ViT-B-61/openai: open_clip has no architecture 'ViT-B-61'; did you mean "
    )
    assert "ViT-B-16" in message
    with pytest.raises(ModelError, match=r"'0000'; see open_clip\.list_models\(\)$"):
        load("open_clip:0000/x")
    with pytest.raises(ModelError) as caught:
        load("open_clip:ViT-B-16/openia")
    assert re.match(
        r"open_clip:ViT-B-16/openia: ViT-B-16 has no pretrained tag 'openia'; expected one of "
        r".*laion2b_s34b_b88k",
        str(caught.value),
    )


def test_an_architecture_alone_needs_weights() -> None:
    with pytest.raises(ModelError) as caught:
        load("open_clip:ViT-B-16")
    assert str(caught.value).startswith(
        "open_clip:ViT-B-16: expected open_clip:ARCH/PRETRAINED or --weights FILE; ViT-B-16 has "
        "the tags "
    )


@pytest.mark.parametrize(
    ("architecture", "tag", "trained", "computed", "right"),
    [
        ("ViT-L-14-336", "openai", "QuickGELU", "GELU", "ViT-L-14-336-quickgelu"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "GELU", "QuickGELU", "ViT-B-32"),
    ],
)
def test_weights_trained_with_another_activation_are_refused(
    architecture: str,
    tag: str,
    trained: str,
    computed: str,
    right: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if architecture.endswith("-quickgelu"):  # no such pair is published
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"url": "x"})
    with pytest.raises(ModelError) as caught:
        load(f"open_clip:{architecture}/{tag}")
    assert str(caught.value) == (
        f"open_clip:{architecture}/{tag}: these weights were trained with {trained}, and "
        f"{architecture} computes {computed}; use open_clip:{right}/{tag}"
    )


def test_weights_of_another_model(tmp_path: Path) -> None:
    torch.save({"visual.foreign": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"do not fit VisionTransformer: \d+ missing"):
        load(f"open_clip:{ARCHITECTURE}", weights=tmp_path / "w.pth")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(f"open_clip:local-dir:{tmp_path / 'none'}")
    assert str(caught.value).startswith(
        f"open_clip:local-dir:{tmp_path / 'none'}: the model cannot be loaded ("
    )


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the model cannot be loaded \(.*weights"):
        load(f"open_clip:local-dir:{tmp_path}")


def test_an_image_size_that_patches_do_not_fill(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ModelError, match=r"the image size \(36, 36\) is no multiple of the patch"):
        load(
            f"open_clip:local-dir:{tmp_path}",
            overrides=PreprocessingOverrides(image_size=(36, 36)),
        )


def test_nothing_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path)
    load(f"open_clip:local-dir:{tmp_path}")
    assert not caplog.records
