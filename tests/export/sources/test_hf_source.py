"""hf: tiny random models of every family, saved to a folder and loaded from it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from regraft.errors import ModelError
from regraft_export.sources import PreprocessingOverrides, load
from regraft_export.sources.hf_processor import preprocessing_of

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SIGLIP_TEXT = {name: TEXT[name] for name in TEXT if not name.endswith("_id")}
SQUARE_PROCESSOR = {"size": {"height": 56, "width": 56}}
CROP_PROCESSOR = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}


def build(kind: str) -> Any:
    t = transformers
    torch.manual_seed(0)
    models: dict[str, Callable[[], Any]] = {
        "Dinov2Model": lambda: t.Dinov2Model(t.Dinov2Config(**SIZES)),
        "Dinov2WithRegistersModel": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4)
        ),
        "ViTModel": lambda: t.ViTModel(t.ViTConfig(**SIZES)),
        "DeiTModel": lambda: t.DeiTModel(t.DeiTConfig(**SIZES)),
        "CLIPVisionModel": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SIZES)),
        "CLIPVisionModelWithProjection": lambda: t.CLIPVisionModelWithProjection(
            t.CLIPVisionConfig(**SIZES, projection_dim=24)
        ),
        "CLIPModel": lambda: t.CLIPModel(
            t.CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=24)
        ),
        "SiglipVisionModel": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES)),
        "SiglipModel": lambda: t.SiglipModel(
            t.SiglipConfig(vision_config=SIZES, text_config=SIGLIP_TEXT)
        ),
        "DINOv3ViTModel": lambda: t.DINOv3ViTModel(
            t.DINOv3ViTConfig(**SIZES, num_register_tokens=4)
        ),
        "InternVLVisionModel": lambda: t.InternVLVisionModel(t.InternVLVisionConfig(**SIZES)),
        "ViTMAEForPreTraining": lambda: t.ViTMAEForPreTraining(
            t.ViTMAEConfig(
                **SIZES,
                decoder_hidden_size=16,
                decoder_num_hidden_layers=1,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=32,
                mask_ratio=0.0,
            )
        ),
        "ViTForImageClassification": lambda: t.ViTForImageClassification(t.ViTConfig(**SIZES)),
    }
    model = models[kind]().eval().requires_grad_(False)  # as loaded ones are: other kernels run
    # Position embeddings that start as zeros would let a wrong resampling pass.
    for name, parameter in model.named_parameters():
        if "position" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], tuple[Any, str]]:
    def save(kind: str) -> tuple[Any, str]:
        model, folder = build(kind), tmp_path / kind
        model.save_pretrained(folder)
        if kind.startswith(("Dinov2", "DINOv3", "InternVL")):
            BitImageProcessorPil(**CROP_PROCESSOR).save_pretrained(folder)
        elif kind.startswith("Siglip"):
            SiglipImageProcessorPil(**SQUARE_PROCESSOR).save_pretrained(folder)
        elif kind.startswith("ViT"):
            ViTImageProcessorPil(**SQUARE_PROCESSOR).save_pretrained(folder)
        elif kind.startswith("DeiT"):
            DeiTImageProcessorPil(
                size={"height": 64, "width": 64}, crop_size=CROP_PROCESSOR["crop_size"]
            ).save_pretrained(folder)
        else:
            CLIPImageProcessorPil(**CROP_PROCESSOR).save_pretrained(folder)
        return model, f"hf:{folder}"

    return save


def pixels(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


FAMILIES = (
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "ViTModel",
    "DeiTModel",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "SiglipVisionModel",
    "DINOv3ViTModel",
    "InternVLVisionModel",
)
SQUARE_ALONE = ("CLIP", "Siglip")
# These take any size in every pass, the others when asked to.
ANY_SIZE = ("Dinov2", "DINOv3", "InternVL")


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family(kind: str, saved: Callable[[str], tuple[Any, str]]) -> None:
    model, source = saved(kind)
    loaded = load(source)
    assert loaded.architecture == kind
    assert loaded.preprocessing.image_size == (56, 56)
    with torch.no_grad():
        expected, got = model(pixels(56, 56)), loaded.module(pixels(56, 56))
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("size", [(84, 84), (28, 28), (56, 84), (28, 70)])
@pytest.mark.parametrize("kind", FAMILIES)
def test_another_image_size(
    kind: str, size: tuple[int, int], saved: Callable[[str], tuple[Any, str]]
) -> None:
    """The resampled embedding gives what transformers gives when it resamples in the pass."""
    model, source = saved(kind)
    overrides = PreprocessingOverrides(image_size=size)
    if kind.startswith(SQUARE_ALONE) and size[0] != size[1]:
        with pytest.raises(ModelError) as caught:
            load(source, overrides=overrides)
        assert str(caught.value) == (
            f"{source}: {kind} takes square images alone, not {size}; give another --image-size"
        )
        return
    module = load(source, overrides=overrides).module
    options = {} if kind.startswith(ANY_SIZE) else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = model(pixels(*size), **options).last_hidden_state
        torch.testing.assert_close(module(pixels(*size)).last_hidden_state, expected)
        torch.testing.assert_close(copy.deepcopy(module)(pixels(*size)).last_hidden_state, expected)


def test_the_processors_size_wins_over_the_checkpoints(tmp_path: Path) -> None:
    """As published DINOv2 has it: trained at 518 px, preprocessed to 224."""
    model = build("Dinov2Model")
    model.save_pretrained(tmp_path)
    BitImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 42, "width": 42}
    ).save_pretrained(tmp_path)
    loaded = load(f"hf:{tmp_path}")
    assert loaded.preprocessing.image_size == (42, 42)
    assert loaded.module.embeddings.position_embeddings.shape == (1, 1 + 9, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.module(pixels(42, 42)).pooler_output, model(pixels(42, 42)).pooler_output
        )


def test_a_whole_clip_gives_its_vision_tower_with_projection(
    saved: Callable[[str], tuple[Any, str]],
) -> None:
    model, source = saved("CLIPModel")
    loaded = load(source)
    assert loaded.architecture == "CLIPVisionModelWithProjection"
    with torch.no_grad():
        expected = model.get_image_features(pixels(56, 56))
        expected = getattr(expected, "pooler_output", expected)
        torch.testing.assert_close(loaded.module(pixels(56, 56)).image_embeds, expected)


def test_a_whole_siglip_gives_its_vision_tower(saved: Callable[[str], tuple[Any, str]]) -> None:
    model, source = saved("SiglipModel")
    loaded = load(source)
    assert loaded.architecture == "SiglipVisionModel"
    with torch.no_grad():
        expected = model.vision_model(pixels(56, 56)).pooler_output
        torch.testing.assert_close(loaded.module(pixels(56, 56)).pooler_output, expected)


def test_an_mae_gives_the_plain_vit_without_shuffling(
    saved: Callable[[str], tuple[Any, str]],
) -> None:
    model, source = saved("ViTMAEForPreTraining")
    loaded = load(source)
    assert loaded.architecture == "ViTModel"
    in_order = torch.arange(16.0).expand(2, -1)  # what MAE sorts its patches by
    with torch.no_grad():
        expected = model.vit(pixels(56, 56), noise=in_order).last_hidden_state
        got = loaded.module(pixels(56, 56))
    torch.testing.assert_close(got.last_hidden_state, expected)
    assert got.pooler_output is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.BeitConfig, "BEiT adds a relative position bias inside attention"),
        (transformers.Siglip2Config, "this is SigLIP 2 with images of any aspect (NaFlex)"),
        (transformers.Siglip2VisionConfig, "this is SigLIP 2 with images of any aspect (NaFlex)"),
    ],
)
def test_models_that_cannot_be_taken_say_why(config: Any, reason: str, tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load(f"hf:{tmp_path}")
    assert str(caught.value).startswith(f"hf:{tmp_path}: {reason}")


def test_a_classifier_gives_its_backbone_without_a_random_pooler(
    saved: Callable[[str], tuple[Any, str]],
) -> None:
    model, source = saved("ViTForImageClassification")
    loaded = load(source)
    assert loaded.architecture == "ViTModel"
    with torch.no_grad():
        output = loaded.module(pixels(56, 56))
        expected = model.vit(pixels(56, 56)).last_hidden_state
    assert output.pooler_output is None
    torch.testing.assert_close(output.last_hidden_state, expected)
    assert load(source).weights_sha256 == loaded.weights_sha256, "nothing is drawn at random"


def test_nothing_is_printed_and_settings_are_restored(
    saved: Callable[[str], tuple[Any, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    _, source = saved("CLIPModel")
    capfd.readouterr()
    before = transformers.utils.logging.get_verbosity()
    load(source)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == before
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_weights_from_a_file(saved: Callable[[str], tuple[Any, str]], tmp_path: Path) -> None:
    _, source = saved("ViTModel")
    torch.manual_seed(7)
    other = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)).eval()
    path = tmp_path / "w.safetensors"
    save_file(other.state_dict(), path)
    loaded = load(source, weights=path)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.module(pixels(56, 56)).last_hidden_state,
            other.vit(pixels(56, 56)).last_hidden_state,
        )


def test_weights_that_do_not_fit(saved: Callable[[str], tuple[Any, str]], tmp_path: Path) -> None:
    model, source = saved("ViTModel")
    state = dict(model.state_dict())
    del state["layernorm.weight"]
    state["layernorm.bias"] = torch.zeros(3)
    state["foreign"] = torch.zeros(1)
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    with pytest.raises(ModelError) as caught:
        load(source, weights=path)
    assert str(caught.value) == (
        f"{path}: the weights do not fit ViTModel: 1 missing (layernorm.weight); 1 unexpected "
        "(foreign); 1 of another shape (layernorm.bias [3] instead of [32]); expected the state "
        "dict of this very model"
    )


def test_damaged_weights_in_the_folder(saved: Callable[[str], tuple[Any, str]]) -> None:
    _, source = saved("ViTModel")
    file = Path(source.removeprefix("hf:")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError, match="the weights cannot be loaded into ViTModel") as caught:
        load(source)
    assert str(caught.value).startswith(f"{source}: ")
    assert "\n" not in str(caught.value)


def test_image_size_must_fit_the_patches(saved: Callable[[str], tuple[Any, str]]) -> None:
    _, source = saved("ViTModel")
    with pytest.raises(ModelError) as caught:
        load(source, overrides=PreprocessingOverrides(image_size=(60, 56)))
    assert str(caught.value) == (
        f"{source}: the image size (60, 56) is no multiple of the patch size (14, 14); give "
        "another --image-size"
    )


@pytest.mark.usefixtures("no_hub")
def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(f"hf:{tmp_path / 'none'}")
    assert str(caught.value) == (
        f"hf:{tmp_path / 'none'}: no such folder; expected one with config.json"
    )
    for name in ("facebook/dinov2-small", str(tmp_path)):
        with pytest.raises(ModelError) as caught:
            load(f"hf:{name}")
        message = str(caught.value)
        assert message.startswith(f"hf:{name}: the configuration cannot be loaded (")
        assert message.endswith("; check the name and the connection")
        assert "\n" not in message


def test_other_architectures(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError) as caught:
        load(f"hf:{tmp_path}")
    assert str(caught.value) == (
        f"hf:{tmp_path}: model_type is 'bert'; expected one of dinov2, dinov2_with_registers, vit, "
        "deit, clip_vision_model, clip, "
        "siglip_vision_model, siglip, dinov3_vit, vit_mae, internvl_vision"
    )


def test_without_a_processor_the_options_say_it_all(tmp_path: Path) -> None:
    build("Dinov2Model").save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load(f"hf:{tmp_path}")
    assert str(caught.value).startswith(
        f"hf:{tmp_path}: preprocessor_config.json cannot be loaded ("
    )
    assert str(caught.value).endswith(
        "; give --image-size, --mean, --std, --interpolation, --crop-pct and --crop-mode instead"
    )
    overrides = PreprocessingOverrides(
        image_size=(28, 28),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="squash",
    )
    said = load(f"hf:{tmp_path}", overrides=overrides)
    assert said.preprocessing.image_size == (28, 28)
    complete = load(f"hf:{tmp_path}", preprocessing=said.preprocessing)
    assert complete.preprocessing is said.preprocessing
    assert complete.weights_sha256 == said.weights_sha256


OPTIONS = "all of --image-size, --mean, --std, --interpolation, --crop-pct and --crop-mode"
PROCESSORS = [
    CLIPImageProcessorPil(),
    CLIPImageProcessorPil(size={"shortest_edge": 97}, crop_size={"height": 97, "width": 97}),
    CLIPImageProcessorPil(size={"shortest_edge": 90}, crop_size={"height": 81, "width": 120}),
    CLIPImageProcessorPil(resample=2, do_normalize=False),
    CLIPImageProcessorPil(resample=5, do_rescale=False, image_mean=[120, 110, 100]),
    CLIPImageProcessorPil(do_resize=False, crop_size={"height": 301, "width": 255}),
    BitImageProcessorPil(size={"shortest_edge": 256}, image_mean=[0.485, 0.456, 0.406]),
    ViTImageProcessorPil(),
    ViTImageProcessorPil(size={"height": 98, "width": 140}, resample=3),
    ViTImageProcessorPil(size=96, resample=1),
    DeiTImageProcessorPil(),
    DeiTImageProcessorPil(size={"height": 70, "width": 300}, resample=0),
    SiglipImageProcessorPil(),
    SiglipImageProcessorPil(size={"height": 98, "width": 98}, resample=2),
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda p: type(p).__name__)
def test_equals_the_image_processor(
    processor: Any, tmp_path: Path, photos: list[Image.Image]
) -> None:
    processor.save_pretrained(tmp_path)
    preprocessing = preprocessing_of("test", str(tmp_path))
    for photo in photos:
        expected = processor(photo, return_tensors="np")["pixel_values"][0]
        got = preprocessing(photo)
        assert got.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"image_processor_type": "ConvNextImageProcessor"},
            "test: the image processor is ConvNextImageProcessor; expected one of "
            "BitImageProcessor, CLIPImageProcessor, DeiTImageProcessor, SiglipImageProcessor, "
            f"ViTImageProcessor, or {OPTIONS}",
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "do_pad": True},
            "test: the image processor is CLIPImageProcessor with do_pad; expected one of "
            "BitImageProcessor, CLIPImageProcessor, DeiTImageProcessor, SiglipImageProcessor, "
            f"ViTImageProcessor, or {OPTIONS}",
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "image_std": [0, 1, 1]},
            "test: preprocessor_config.json: std is (0, 1, 1); expected numbers above 0",
        ),
    ],
)
def test_other_processors_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        preprocessing_of("test", str(tmp_path))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_center_crop": False}, "the output has no fixed size"),
        (
            {"size": {"shortest_edge": 224, "longest_edge": 500}},
            "expected height and width, or shortest_edge alone",
        ),
    ],
)
def test_processors_without_a_fixed_size(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    config = {"image_processor_type": "CLIPImageProcessor", **config}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"^test: preprocessor_config.json: .*{message}"):
        preprocessing_of("test", str(tmp_path))
