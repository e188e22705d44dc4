"""From which norm on, and at which block, a patch token counts as an outlier.

``regraft find`` records both. For neurons listed by hand they are measured on the export's images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from regraft.errors import NeuronsError
from regraft.neurons import Neurons
from regraft_export.vit.observe import observe
from regraft_export.vit.structure import VisionTransformer

_OVER_MEDIAN = 2.0  # what finding asks of a patched model: no patch above twice the median


@dataclass(frozen=True)
class OutlierLevel:
    """Attributes: layer (the detection layer) and threshold (a norm)."""

    layer: int
    threshold: float


def recorded_level(neurons: Neurons, depth: int) -> OutlierLevel | None:
    """What the neurons file says; None for a hand-made one.

    Args:
        neurons: from the file.
        depth: the model's number of blocks.

    Raises:
        NeuronsError: the detection layer is outside the model.
    """
    about = neurons.about
    if about.get("threshold") is None or about.get("detection_layer") is None:
        return None
    layer = about["detection_layer"]
    if layer >= depth:
        raise NeuronsError(
            f"{neurons.origin}: detection_layer is {layer}; expected a block of the model, "
            f"0 to {depth - 1}"
        )
    return OutlierLevel(layer, float(about["threshold"]))


def measured_level(
    vit: VisionTransformer, neurons: Neurons, batches: Iterable[NDArray[np.float32]]
) -> OutlierLevel:
    """The block from the first touched one on with the largest norm over its median, and twice it.

    Args:
        vit: the model, unpatched.
        neurons: they choose the first block that is looked at.
        batches: preprocessed images, (B, 3, H, W).
    """
    layers = range(neurons.layers[0], vit.layout.depth)
    norms: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in layers}
    with torch.no_grad():
        for pixels in batches:
            seen = observe(vit, torch.from_numpy(pixels).to(vit.device), layers=layers)
            for layer in layers:
                patches = seen.hidden[layer][:, vit.layout.prefix :]
                norms[layer].append(patches.norm(dim=-1).cpu().numpy())
    joined = {layer: np.concatenate(parts) for layer, parts in norms.items()}
    medians = {layer: float(np.median(values)) for layer, values in joined.items()}
    layer = max(layers, key=lambda i: float(joined[i].max()) / max(medians[i], 1e-30))
    return OutlierLevel(layer, _OVER_MEDIAN * medians[layer])
