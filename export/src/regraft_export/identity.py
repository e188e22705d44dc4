"""Whether a neurons file belongs to a model, at an image size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from regraft.errors import NeuronsError
from regraft.neurons import Neurons
from regraft.neurons_about import preprocessing_of
from regraft.preprocessing import Preprocessing
from regraft_export.finding.fingerprint import matches
from regraft_export.sources import LoadedModel
from regraft_export.vit.structure import VisionTransformer

_RULES = {"shortest-edge": "cover"}  # the same but for rounding
_NOTHING = 1e-7  # what single precision makes of a 0 among numbers of size 1


def check_identity(
    neurons: Neurons, loaded: LoadedModel, vit: VisionTransformer, force: bool
) -> list[str]:
    """Refuses neurons of another model, image size or preprocessing.

    The model is known by the hash of its weights. Where the file has none, or the image size
    differs, the fingerprints of the down-projections that hold the neurons decide.

    Args:
        neurons: what is to be redirected.
        loaded: the model.
        vit: its structure.
        force: turns a refusal into a warning; neurons outside the model are refused all the same.

    Returns:
        Warnings, one line each: what was forced, or that a hand-made list cannot be checked.

    Raises:
        NeuronsError: they do not fit, or belong elsewhere and ``force`` is not given.
    """
    hidden = {i: block.down.in_features for i, block in enumerate(vit.blocks)}
    neurons.check_against(vit.layout.depth, hidden)
    about = neurons.about
    hashed = "weights_sha256" in about
    if not hashed and not about.get("fingerprints"):
        return [
            "the neurons file says nothing of its model (made by hand?), so it cannot be checked "
            "that the neurons belong to these weights"
        ]
    objections = []
    same = (
        about["weights_sha256"] == loaded.weights_sha256
        if hashed
        else _fingerprints_match(neurons, vit)
    )
    size = list(loaded.preprocessing.image_size)
    if (about.get("image_size") or size) != size:
        # The position embedding is resampled at load, so the weights' hash differs by itself; the
        # neurons live in the down-projections, which do not.
        objections.append(
            f"the neurons were found at image size {about['image_size']}, this export has {size}; "
            "neuron sets depend on the resolution"
        )
        same = same or _fingerprints_match(neurons, vit)
    found_with = preprocessing_of(about, neurons.origin)
    if found_with and (apart := list(_differences(found_with, loaded.preprocessing))):
        objections.append(
            f"the neurons were found with another preprocessing: {', '.join(apart)}; which units "
            "write outlier tokens depends on what the model sees"
        )
    found_in = f"the neurons were found in {about.get('model', 'another model')}"
    if not same and hashed:
        objections.append(
            f"{found_in} with weights {str(about['weights_sha256'])[:12]}..., this model is "
            f"{loaded.source} with weights {loaded.weights_sha256[:12]}..."
        )
    elif not same:
        objections.append(
            f"{found_in}; its fingerprints do not match the down-projections of {loaded.source} "
            f"in all of the layers {', '.join(map(str, neurons.layers))}"
        )
    if objections and not force:
        raise NeuronsError(
            "; ".join(objections)
            + "; run `regraft find` for this model, size and preprocessing, or give --force"
        )
    return [f"{line} (forced)" for line in objections]


def _differences(found: Preprocessing, here: Preprocessing) -> Iterator[str]:
    """In what two ways to preprocess differ, but for the image size; one phrase each.

    The rounding of edges and margins, by which timm, torchvision and transformers differ by a pixel
    at most, is no difference: an ONNX file's preprocessing is given in timm's words, whoever made
    it.
    """
    rules = [_RULES.get(steps.resize, steps.resize) for steps in (found, here)]
    if rules[0] != rules[1]:
        yield f"resize {rules[0]}, here {rules[1]}"
    # At another image size the size before the crop is another one, too.
    elif found.image_size == here.image_size and _apart(found.resize_size, here.resize_size) > 1:
        sizes = [" x ".join(map(str, steps.resize_size)) for steps in (found, here)]
        yield f"size before the crop {sizes[0]}, here {sizes[1]}"
    if found.interpolation != here.interpolation:
        yield f"interpolation {found.interpolation}, here {here.interpolation}"
    for name in ("mean", "std", "fill"):
        a, b = getattr(found, name), getattr(here, name)
        # Libraries hold the same numbers in single and in double precision.
        if not all(_close(x, y) for x, y in zip(a, b, strict=True)):
            yield f"{name} {' '.join(map(str, a))}, here {' '.join(map(str, b))}"
    if not math.isclose(found.rescale, here.rescale, rel_tol=1e-6):
        yield f"rescale {found.rescale:g}, here {here.rescale:g}"


def _apart(a: Sequence[int], b: Sequence[int]) -> int:
    """Pixels, of the edge that differs most."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=_NOTHING)


def _fingerprints_match(neurons: Neurons, vit: VisionTransformer) -> bool:
    expected = neurons.about.get("fingerprints")
    if not isinstance(expected, Mapping):
        return False
    try:
        return all(
            matches(expected[str(layer)], vit.blocks[layer].down.weight.detach().float().numpy())
            for layer in neurons.layers
        )
    except (KeyError, TypeError, ValueError, OverflowError):  # a layer is left out, or malformed
        return False
