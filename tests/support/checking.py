"""Patching a foreign file in memory and checking it, with a mistake of choice in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from regraft.neurons import Neurons
from regraft.redirect import RedirectOptions
from regraft_export.foreign.check.checked import Checked
from regraft_export.foreign.check.compare import check
from regraft_export.foreign.patching import patch
from regraft_export.foreign.survey import Survey, survey
from regraft_export.onnx_file.read import OnnxFile, read_file

Mistake = Callable[[onnx.ModelProto], None]


def found(path: Path, prefix: str | None = None, size: tuple[int, int] | None = None) -> Survey:
    return survey(read_file(path), prefix=prefix, image_size=size)


def checked(
    path: Path,
    neurons: Neurons,
    options: RedirectOptions,
    pixels: NDArray[np.float32],
    *,
    prefix: str | None = None,
    mistake: Mistake | None = None,
    patch_with: tuple[Neurons, RedirectOptions] | None = None,
) -> Checked:
    """Patches and checks.

    Args:
        path: a foreign file.
        neurons: what the check is told.
        options: likewise.
        pixels: of the size the file is surveyed at.
        prefix: which stack.
        mistake: made in the patched model, tensors inside.
        patch_with: what the patch is told; None for the same.
    """
    size = (pixels.shape[2], pixels.shape[3])
    result = patch(found(path, prefix, size), *(patch_with or (neurons, options)))
    file = OnnxFile(path, result.proto, result.stored, external=False)
    if mistake is not None:
        proto = whole(file)
        mistake(proto)
        file = OnnxFile(path, proto, {}, external=False)
    return check(found(path, prefix, size), file, neurons, options, pixels)


def whole(file: OnnxFile) -> onnx.ModelProto:
    """A model with every tensor inside."""
    proto = onnx.ModelProto()
    proto.CopyFrom(file.skeleton)
    for tensor in proto.graph.initializer:
        if tensor.name in file.stored:
            values = file.stored[tensor.name].array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return proto
