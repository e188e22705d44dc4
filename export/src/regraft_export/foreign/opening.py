"""An ONNX file opened for finding: its places, how images become its input, what it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import TensorProto

from regraft.errors import ModelError
from regraft.preprocessing import Preprocessing
from regraft_export.foreign.own_output import own_output
from regraft_export.foreign.subject import OnnxSubject
from regraft_export.foreign.survey import Survey, survey
from regraft_export.onnx_file.read import read_file
from regraft_export.sources.data_config import PreprocessingOverrides, from_data_config

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class Opened:
    """An opened file.

    Attributes:
        subject: for finding.
        preprocessing: from decoded image to the file's input.
        about: what ``neurons.json`` says of the file.
    """

    subject: OnnxSubject
    preprocessing: Preprocessing
    about: dict[str, Any]


def open_file(
    path: str | Path,
    given: PreprocessingOverrides,
    *,
    prefix: str | None = None,
    output: str | None = None,
) -> Opened:
    """Opens it; nothing is run yet.

    Args:
        path: as the user wrote it.
        given: the preprocessing, which no ONNX file has; the image size where the file leaves it
            open.
        prefix: which stack of blocks, where there are several.
        output: the model's own output, where several could be.

    Raises:
        ModelError: no ONNX file, no Vision Transformer, or the preprocessing is incomplete.
        RewriteError: no register can be appended.
        InputError: ``output`` does not do.
    """
    file = read_file(path)
    found = survey(file, prefix=prefix, image_size=given.image_size)
    _check_input(found)
    known = {} if found.image.open_size else {"input_size": (3, *found.image.size)}
    preprocessing = from_data_config({**known, **given.over({})}, str(path))
    own = own_output(found, output)
    precision = found.precision
    # Before the survey is used up, and before anything takes long.
    subject = OnnxSubject(found, own)
    about = {
        "model": str(path),
        "files_sha256": {p.name: _sha256(p) for p in (file.path, *sorted(file.data_files))},
        "precision": precision,
        "output": own.name,
        "image_size": list(preprocessing.image_size),
        "preprocessing": preprocessing.to_json(),
    }
    return Opened(subject, preprocessing, about)


def _check_input(found: Survey) -> None:
    image = found.image
    if others := sorted(found.inputs_of(found.last) - {image.name}):
        raise ModelError(
            f"{found.file.path}: its blocks also read the input {', '.join(others)}; expected "
            "images alone: export it without these inputs"
        )
    inputs = {i.name: i for i in found.file.skeleton.graph.input}
    kind = inputs[image.name].type.tensor_type.elem_type
    if kind not in _FLOATS or image.shape[1] not in (None, 3):
        dims = ", ".join(str(n or "any") for n in image.shape)
        raise ModelError(
            f"{found.file.path}: its input {image.name!r} takes {TensorProto.DataType.Name(kind)} "
            f"({dims}); expected preprocessed images: floating point (batch, 3, H, W)"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
