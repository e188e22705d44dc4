from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support import bundles

from regraft.errors import NeuronsError
from regraft.neurons import Neurons, RegisterNeuron
from regraft_export.finding.fingerprint import fingerprint
from regraft_export.identity import check_identity

SHA = bundles.loaded().weights_sha256
CURE = "run `regraft find` for this model, size and preprocessing, or give --force"


def check(neurons: Neurons, force: bool = False) -> list[str]:
    return check_identity(neurons, bundles.loaded(), bundles.vit(), force)


def test_neurons_of_this_model_and_size_pass_without_a_word() -> None:
    assert check(bundles.found()) == []
    # Older files may not tell the size.
    assert check(bundles.neurons(weights_sha256=SHA)) == []


def test_a_list_made_by_hand_is_taken_with_a_warning() -> None:
    assert check(bundles.neurons()) == [
        "the neurons file says nothing of its model (made by hand?), so it cannot be checked that "
        "the neurons belong to these weights"
    ]


def test_neurons_of_another_model_are_refused_or_forced() -> None:
    other = bundles.neurons(model="timm:other", weights_sha256="0123456789abcdef" * 4)
    objection = (
        "the neurons were found in timm:other with weights 0123456789ab..., this model is "
        f"{bundles.PLANTED} with weights {SHA[:12]}..."
    )
    with pytest.raises(NeuronsError) as caught:
        check(other)
    assert str(caught.value) == (f"{objection}; {CURE}")
    assert check(other, force=True) == [f"{objection} (forced)"]


def test_neurons_of_another_size_are_refused_or_forced() -> None:
    other = bundles.neurons(weights_sha256=SHA, image_size=[64, 32])
    objection = (
        "the neurons were found at image size [64, 32], this export has [32, 32]; neuron sets "
        "depend on the resolution"
    )
    with pytest.raises(NeuronsError) as caught:
        check(other)
    assert str(caught.value) == (f"{objection}; {CURE}")
    assert check(other, force=True) == [f"{objection} (forced)"]


def test_weights_resampled_for_another_size_are_known_by_their_down_projections() -> None:
    # The position embedding is resampled at load, so the hash differs.
    weights = {i: bundles.vit().blocks[i].down.weight.numpy() for i in (1, 2)}
    prints = {str(i): fingerprint(weight, None) for i, weight in weights.items()}
    other = bundles.neurons(weights_sha256="f" * 64, image_size=[64, 64], fingerprints=prints)
    (line,) = check(other, force=True)
    assert line.startswith("the neurons were found at image size [64, 64]")
    prints["2"] = fingerprint(weights[1], None)
    assert len(check(other, force=True)) == 2


def prints_of(*layers: int) -> dict[str, dict[str, Any]]:
    weights = {i: bundles.vit().blocks[i].down.weight.numpy() for i in layers}
    return {str(i): fingerprint(weight, None) for i, weight in weights.items()}


def test_without_a_hash_the_fingerprints_decide() -> None:
    assert check(bundles.neurons(fingerprints=prints_of(1, 2))) == []
    swapped = dict(zip("12", prints_of(2, 1).values(), strict=True))
    objection = (
        "the neurons were found in timm:other; its fingerprints do not match the down-projections "
        f"of {bundles.PLANTED} in all of the layers 1, 2"
    )
    right = prints_of(1, 2)
    numbers = right["1"]["projections"]
    malformed = [
        {**right, "1": {**right["1"], **changed}}
        for changed in (
            {"projections": [numbers]},  # numpy would compare it all the same
            {"projections": [10**400] * len(numbers)},
            {"norm": 10**400},
            {"shape": [96, None]},
        )
    ]
    others = (swapped, prints_of(1), "none", {"1": 5, "2": {}}, {"1": {"shape": 1}})
    for prints in (*others, *malformed):
        other = bundles.neurons(model="timm:other", fingerprints=prints)
        with pytest.raises(NeuronsError) as caught:
            check(other)
        assert str(caught.value) == (f"{objection}; {CURE}")
        assert check(other, force=True) == [f"{objection} (forced)"]


def test_without_a_hash_another_size_is_refused_all_the_same() -> None:
    other = bundles.neurons(fingerprints=prints_of(1, 2), image_size=[64, 64])
    (line,) = check(other, force=True)
    assert line.startswith("the neurons were found at image size [64, 64]")


def found_with(**changes: object) -> Neurons:
    steps = replace(bundles.loaded().preprocessing, **changes)
    return bundles.neurons(weights_sha256=SHA, preprocessing=steps.to_json())


def test_the_same_preprocessing_passes_without_a_word() -> None:
    assert check(found_with()) == []
    steps = bundles.loaded().preprocessing
    # Libraries round edges and margins, and hold numbers, in ways of their own.
    single = tuple(float(np.float32(value)) for value in steps.mean)
    rounded = {"resize_size": (33, 31)}
    for changes in ({"crop_offset": "floor"}, {"resize": "cover"}, {"mean": single}, rounded):
        assert check(found_with(**changes)) == []


def test_what_rounding_leaves_of_a_zero_is_no_difference() -> None:
    steps = replace(bundles.loaded().preprocessing, mean=(0.0, 0.0, 0.0))
    loaded = replace(bundles.loaded(), preprocessing=steps)
    for number, same in ((1e-9, True), (-0.0, True), (1e-3, False)):
        found = found_with(mean=(number, 0.0, 0.0))
        assert bool(check_identity(found, loaded, bundles.vit(), force=True)) is not same


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mean": (0.25, 0.5, 0.5)}, "mean 0.25 0.5 0.5, here 0.485 0.456 0.406"),
        ({"std": (0.25, 0.5, 0.5)}, "std 0.25 0.5 0.5, here 0.229 0.224 0.225"),
        ({"interpolation": "nearest"}, "interpolation nearest, here bicubic"),
        ({"resize": "exact"}, "resize exact, here cover"),
        ({"resize_size": (40, 40)}, "size before the crop 40 x 40, here 32 x 32"),
        ({"resize_size": (32, 34)}, "size before the crop 32 x 34, here 32 x 32"),
        ({"fill": (9, 9, 9)}, "fill 9 9 9, here 0 0 0"),
        ({"rescale": 1.0}, "rescale 1, here 0.00392157"),
        (
            {"std": (1.0, 1.0, 1.0), "interpolation": "box"},
            "interpolation box, here bicubic, std 1.0 1.0 1.0, here 0.229 0.224 0.225",
        ),
    ],
)
def test_neurons_of_another_preprocessing_are_refused_or_forced(
    changes: dict[str, object], said: str
) -> None:
    objection = (
        f"the neurons were found with another preprocessing: {said}; which units write outlier "
        "tokens depends on what the model sees"
    )
    with pytest.raises(NeuronsError) as caught:
        check(found_with(**changes))
    assert str(caught.value) == (f"{objection}; {CURE}")
    assert check(found_with(**changes), force=True) == [f"{objection} (forced)"]


def test_at_another_size_the_size_before_the_crop_is_no_second_objection() -> None:
    other = found_with(image_size=(64, 64), resize_size=(72, 72))
    other = bundles.neurons(**{**other.about, "image_size": [64, 64]})
    (line,) = check(other, force=True)
    assert line.startswith("the neurons were found at image size [64, 64]")


def test_empty_fingerprints_say_nothing() -> None:
    assert check(bundles.neurons(fingerprints={}))[0].startswith("the neurons file says nothing")


def test_with_the_right_hash_fingerprints_may_miss_a_layer() -> None:
    assert check(bundles.neurons(weights_sha256=SHA, fingerprints=prints_of(1))) == []


def test_both_objections_are_named() -> None:
    other = bundles.neurons(weights_sha256="f" * 64, image_size=[64, 64])
    match = r"image size \[64, 64\], .* another model with weights ffff"
    with pytest.raises(NeuronsError, match=match):
        check(other)
    assert len(check(other, force=True)) == 2


@pytest.mark.parametrize("force", [False, True])
def test_neurons_outside_the_model_are_refused_even_by_force(force: bool) -> None:
    with pytest.raises(NeuronsError) as caught:
        check(Neurons((RegisterNeuron(1, 96),)), force)
    assert str(caught.value) == (
        "neuron (layer 1, index 96): layer 1 has 96 hidden units, so indices run from 0 to 95"
    )
    with pytest.raises(NeuronsError) as caught:
        check(Neurons((RegisterNeuron(4, 0),)), force)
    assert str(caught.value) == (
        "neuron (layer 4, index 0): the model has 4 blocks, so layers run from 0 to 3"
    )


@pytest.mark.parametrize("about", [{"weights_sha256": 5}, {"weights_sha256": None}])
def test_a_hash_that_is_none_is_another_models(about: dict[str, object]) -> None:
    with pytest.raises(NeuronsError, match="found in another model with weights"):
        check(bundles.neurons(**about))
