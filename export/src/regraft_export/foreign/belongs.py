"""Whether a neurons file belongs to a foreign ONNX file, by its down-projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.errors import NeuronsError
from regraft.neurons import Neurons
from regraft_export.finding.fingerprint import TOLERANCE, difference
from regraft_export.foreign.survey import Survey


def check_belongs(neurons: Neurons, found: Survey, force: bool) -> list[str]:
    """Refuses neurons of another model, another fine-tune or another image size.

    Args:
        neurons: what is to be redirected.
        found: the file's places.
        force: turns a refusal into a warning; neurons outside the model are refused all the same.

    Returns:
        Warnings, one line each: what was forced, or that a hand-made list cannot be checked.

    Raises:
        NeuronsError: they do not fit, or belong elsewhere and ``force`` is not given.
    """
    neurons.check_against(found.stack.depth, found.hidden)
    about = neurons.about
    expected = about.get("fingerprints")
    warnings, objections = [], []
    if not expected:
        warnings.append(
            "the neurons file has no fingerprints (made by hand?), so it cannot be checked that "
            "the neurons belong to these weights"
        )
    else:
        objections += [
            line for layer in neurons.layers if (line := _objection(layer, expected, found))
        ]
    size = about.get("image_size")
    if size is not None and list(size) != list(found.image.size) and not found.image.open_size:
        objections.append(
            f"the neurons were found at image size {size}, this file is for "
            f"{list(found.image.size)}; neuron sets depend on the resolution"
        )
    if objections and not force:
        source = about.get("model", "another model")
        raise NeuronsError(
            f"{found.file.path}: {'; '.join(objections)}; the neurons were found in {source}: run "
            "`regraft find` for this model, or give --force"
        )
    return warnings + [f"{line} (forced)" for line in objections]


def _objection(layer: int, expected: Mapping[str, Any], found: Survey) -> str | None:
    weight, bias = found.weights(layer)
    if str(layer) not in expected:
        return f"the neurons file has no fingerprint of layer {layer}"
    apart = difference(
        expected[str(layer)],
        np.asarray(weight, np.float32),
        None if bias is None else np.asarray(bias, np.float32),
    )
    if apart <= TOLERANCE:
        return None
    return (
        f"layer {layer}: the down-projection differs from the fingerprint by {apart:.3g} of its "
        f"norm; at most {TOLERANCE:g} is rounding"
    )
