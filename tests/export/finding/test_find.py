"""Finding as a whole: planted units are recovered on several architectures, always alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from regraft.errors import GateError, InputError, ModelError
from regraft.neurons import Neurons
from regraft_export.finding.find import FindOptions, Found, find_neurons, rounded
from regraft_export.finding.fingerprint import matches
from regraft_export.finding.parts import ArrayImages
from regraft_export.finding.pytorch import PyTorchSubject
from regraft_export.vit.structure import from_module

pytestmark = pytest.mark.usefixtures("one_thread")

Planter = Callable[..., Any]
Pictures = Callable[..., Tensor]


def vit_small() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_small_patch16_224", img_size=64, patch_size=8, num_classes=10, depth=8
    ).eval()


def vit_tiny(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 5}
    settings |= {"num_heads": 3, "num_classes": 0, **options}
    return timm.models.vision_transformer.VisionTransformer(**settings).eval()


def with_layer_scale() -> nn.Module:
    model = vit_tiny(init_values=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.uniform_(0.2, 1.5)
    return model


def dinov2_swiglu() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=48,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=64,
        patch_size=8,
        use_swiglu_ffn=True,
        layerscale_value=0.3,
    )
    return transformers.Dinov2Model(config).eval()


@pytest.fixture(scope="module")
def small(planter: Planter, pictures: Pictures) -> tuple[Any, Found]:
    """A ViT-S with six units in one layer, and what was found."""
    units = [(4, index) for index in (3, 700, 1200, 10, 999, 1535)]
    planted = planter(vit_small(), pictures(16, 1), units, negative=[(4, 999)])
    images = ArrayImages(pictures(32, 2).numpy())
    return planted, find_neurons(PyTorchSubject(planted.vit), images, about={"model": "a test"})


def test_planted_units_of_a_vit_small_are_recovered(small: tuple[Any, Found]) -> None:
    planted, found = small
    chosen = {(n.layer, n.index) for n in found.neurons.neurons}
    # Each writes a sixth of eight times the median, so five would leave 1.3 times the median.
    assert chosen <= set(planted.units)
    assert len(chosen) >= 4
    signs = {(n.layer, n.index): n.sign for n in found.neurons.neurons}
    assert all(sign == (-1 if unit in planted.negative else 1) for unit, sign in signs.items())
    after = found.report.after
    assert after["outlier_tokens"] == 0
    assert after["removed"] == 1
    assert after["largest_over_median"] < 2
    assert after["output_cosine_median"] > 0.98


def test_controls_leave_the_outliers_where_they_are(small: tuple[Any, Found]) -> None:
    figures = small[1].report
    assert figures.before["outlier_tokens"] == 2 * figures.images
    for name in ("random_neurons", "zero_token"):
        assert figures.controls[name]["removed"] == 0
        assert figures.controls[name]["largest_over_median"] > 5
    zeroed = figures.controls["zeroed_without_register"]
    assert zeroed["removed"] == 1
    assert "register_norm" not in zeroed
    assert figures.after["register_norm"] > 3 * figures.after["median_norm"]


def test_what_the_file_says(small: tuple[Any, Found]) -> None:
    planted, found = small
    data = json.loads(json.dumps(found.neurons.to_json(), allow_nan=False))
    assert data["model"] == "a test"
    assert data["images"] == {"given": 32, "score": 16, "select": 8, "report": 8, "skipped": 0}
    assert data["detection_layer"] == 4
    assert data["seed"] == 0
    assert len(data["report"]["layers"]) == 8
    profile = data["report"]["layers"][4]
    assert profile["outliers_before"] == 16
    assert profile["outliers_after"] == 0
    assert profile["largest_after"] < 2 * profile["median_after"] < profile["largest_before"]
    assert data["versions"]["torch"] == torch.__version__
    assert Neurons.from_json(data).neurons == found.neurons.neurons
    down = planted.vit.blocks[4].down
    assert list(data["fingerprints"]) == ["4"]
    weight, bias = down.weight.detach().half().float().numpy(), down.bias.detach().numpy()
    assert matches(data["fingerprints"]["4"], weight, bias)
    assert not matches(
        data["fingerprints"]["4"], planted.vit.blocks[3].down.weight.detach().numpy(), None
    )


def test_same_seed_same_file_other_seed_same_units(planter: Planter, pictures: Pictures) -> None:
    vit = planter(vit_tiny(), pictures(16, 1), [(2, 5), (2, 60)]).vit
    images = ArrayImages(pictures(24, 2).numpy())
    texts = [
        json.dumps(
            find_neurons(PyTorchSubject(vit), images, FindOptions(seed=seed)).neurons.to_json()
        )
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    chosen = [{(n["layer"], n["index"]) for n in json.loads(t)["neurons"]} for t in texts]
    assert chosen[0] == chosen[2] == {(2, 5), (2, 60)}


@pytest.mark.parametrize("build", [with_layer_scale, dinov2_swiglu])
def test_other_architectures(
    build: Callable[[], nn.Module], planter: Planter, pictures: Pictures
) -> None:
    units = [(2, 5), (2, 60), (2, 100)]
    planted = planter(build(), pictures(16, 1), units, negative=[(2, 100)])
    found = find_neurons(PyTorchSubject(planted.vit), ArrayImages(pictures(24, 2).numpy()))
    signs = {(n.layer, n.index): n.sign for n in found.neurons.neurons}
    assert set(signs) <= set(units)
    assert len(signs) >= 2
    assert signs.get((2, 100), -1) == -1
    assert found.report.after["removed"] == 1
    assert found.report.after["largest_over_median"] < 2


def test_activation_score_finds_them_too(planter: Planter, pictures: Pictures) -> None:
    vit = planter(vit_tiny(), pictures(16, 1), [(2, 5), (2, 60)]).vit
    options = FindOptions(score="activation", max_layer=2)
    found = find_neurons(PyTorchSubject(vit), ArrayImages(pictures(24, 2).numpy()), options)
    assert {(n.layer, n.index) for n in found.neurons.neurons} == {(2, 5), (2, 60)}
    assert found.neurons.about["score"] == "activation"
    assert found.neurons.neurons[0].score == pytest.approx(12, rel=0.1)


def test_threshold_and_layer_by_hand(planter: Planter, pictures: Pictures) -> None:
    vit = planter(vit_tiny(), pictures(16, 1), [(2, 5), (2, 60)]).vit
    images = ArrayImages(pictures(24, 2).numpy())
    chosen = find_neurons(PyTorchSubject(vit), images)
    threshold = 0.8 * chosen.neurons.about["threshold"]
    found = find_neurons(
        PyTorchSubject(vit), images, FindOptions(detection_layer=4, threshold=threshold)
    )
    assert found.neurons.about["detection_layer"] == 4
    assert found.neurons.about["threshold"] == rounded(threshold)
    assert found.neurons.neurons[0].layer == 2


def test_random_and_silenced_vits_have_no_outlier_tokens(
    planter: Planter, pictures: Pictures
) -> None:
    images = ArrayImages(pictures(24, 2).numpy())
    with pytest.raises(ModelError, match=r"^no outlier tokens: .* there is nothing to patch"):
        find_neurons(PyTorchSubject(from_module(vit_tiny(), (64, 64))), images)
    planted = planter(vit_tiny(), pictures(16, 1), [(2, 5), (2, 60)])
    with torch.no_grad():
        planted.vit.blocks[2].down.weight[:, [5, 60]] = 0
    with pytest.raises(ModelError, match=r"^no outlier tokens: .* there is nothing to patch"):
        find_neurons(PyTorchSubject(planted.vit), images)


def test_selection_that_changes_the_output_too_much_fails(
    planter: Planter, pictures: Pictures
) -> None:
    # The mean over all patches, not normalised: it rests on the two outliers, whose writing took
    # no part in any training.
    model = vit_tiny(class_token=False, global_pool="avg")
    vit = planter(model, pictures(16, 1), [(2, 5), (2, 60)]).vit
    with pytest.raises(GateError) as caught:
        find_neurons(PyTorchSubject(vit), ArrayImages(pictures(24, 2).numpy()))
    message = str(caught.value)
    assert "the selection fails on 6 images used neither for scoring nor for selection" in message
    assert "median cosine of the model's output (pooled) to the unpatched one is 0." in message
    assert "expected at least 0.95; nothing was written" in message
    assert "outlier tokens are gone" not in message


def test_too_few_images(pictures: Pictures) -> None:
    vit = from_module(vit_tiny(), (64, 64))
    with pytest.raises(InputError, match=r"^5 images came; finding needs at least 6"):
        find_neurons(PyTorchSubject(vit), ArrayImages(pictures(5, 2).numpy()))


def test_weights_that_are_not_finite(planter: Planter, pictures: Pictures) -> None:
    vit = planter(vit_tiny(), pictures(16, 1), [(2, 5)]).vit
    with torch.no_grad():
        vit.blocks[3].down.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layer 3: 768 of 768 patch norms .* NaN or infinite"):
        find_neurons(PyTorchSubject(vit), ArrayImages(pictures(24, 2).numpy()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "magic"}, "score is 'magic'; expected contribution or activation"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
        ({"max_neurons": 0}, "max_neurons is 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FindOptions(**options)


def test_rounding() -> None:
    assert rounded({"a": [1.23456789, 2], "b": (0.1, "x", None, True)}) == {
        "a": [1.23457, 2],
        "b": [0.1, "x", None, True],
    }


@pytest.mark.gpu
def test_cuda_finds_the_same_units(planter: Planter, pictures: Pictures) -> None:
    planted = planter(vit_tiny(), pictures(16, 1), [(2, 5), (2, 60)])
    images = ArrayImages(pictures(24, 2).numpy())
    on_cpu = find_neurons(PyTorchSubject(planted.vit), images)
    planted.vit.module.cuda()
    on_cuda = find_neurons(PyTorchSubject(planted.vit), images)
    for a, b in zip(on_cpu.neurons.neurons, on_cuda.neurons.neurons, strict=True):
        assert (a.layer, a.index, a.sign) == (b.layer, b.index, b.sign)
        assert b.score == pytest.approx(a.score, rel=1e-2)
        assert b.value == pytest.approx(a.value, rel=1e-2)
