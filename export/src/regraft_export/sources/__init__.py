"""Where models come from: MODEL on the command line, a module ready for tracing in memory.

MODEL is ``SCHEME:REST``. One module per scheme, imported only when it is asked for, because each
needs packages that the others do not. A scheme's ``load(rest, weights, overrides, preprocessing)``
returns the module and its preprocessing; everything after that is the same for all and done here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.errors import ModelError, UsageError, how_to_install
from regraft.preprocessing import Preprocessing
from regraft_export.sources.data_config import PreprocessingOverrides

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LoadedModel", "PreprocessingOverrides", "load"]

# To add a scheme: write a module with ``load`` and name it here.
_SCHEMES = {
    "timm": "regraft_export.sources.timm_source",
    "hf": "regraft_export.sources.hf_source",
    "open_clip": "regraft_export.sources.open_clip_source",
    "hub": "regraft_export.sources.hub_source",
    "python": "regraft_export.sources.python_source",
}
_FORMS = (
    "timm:NAME, hf:REPO_OR_FOLDER, open_clip:ARCH/PRETRAINED, hub:REPO:ENTRY, "
    "python:FILE.py:FUNCTION"
)
_EXTRAS = {"timm": "timm", "hf": "hf", "open_clip": "open-clip"}


@dataclass(frozen=True)
class LoadedModel:
    """A PyTorch model with everything its export needs to know of it.

    Attributes:
        module: in eval mode, float32, on the CPU, without gradients, all weights finite.
        preprocessing: from decoded image to ``pixel_values``.
        source: MODEL as given.
        architecture: class name of ``module``.
        weights_sha256: hash of the state dict, see
            :func:`regraft_export.sources.weights.weights_sha256`.
    """

    module: nn.Module
    preprocessing: Preprocessing
    source: str
    architecture: str
    weights_sha256: str


def load(
    model: str,
    *,
    weights: Path | None = None,
    overrides: PreprocessingOverrides | None = None,
    preprocessing: Preprocessing | None = None,
    trust_repo: bool = False,
    also: str = "",
) -> LoadedModel:
    """Loads MODEL.

    Args:
        model: ``timm:NAME``, ``hf:REPO_OR_FOLDER``, ``open_clip:ARCH/PRETRAINED``,
            ``hub:REPO:ENTRY`` or ``python:FILE.py:FUNCTION``.
        weights: a checkpoint to use instead of the download: safetensors, or a pickle of tensors.
        overrides: what replaces parts of the model's own preprocessing.
        preprocessing: replaces all of it, and the overrides; the model then needs none of its own.
        trust_repo: for ``hub:`` alone: whether a repository new to torch.hub may be run.
        also: what the caller takes besides, for the message about what is no model.

    Raises:
        UsageError: no such scheme.
        ModelError: no such package, model or weights; weights that do not fit or are not finite;
            preprocessing that is missing or malformed.
    """
    scheme, colon, rest = model.partition(":")
    if scheme not in _SCHEMES or not colon or not rest:
        raise UsageError(f"{model!r} is not a model; expected one of {_FORMS}{also}")
    if trust_repo and scheme != "hub":
        raise ModelError(f"{model}: --trust-repo is for models of hub:REPO:ENTRY alone")
    try:
        from regraft_export.sources import weights as weights_module

        source = importlib.import_module(_SCHEMES[scheme])
    except ModuleNotFoundError as error:
        raise missing_package(model, scheme, error) from error
    trust = {"trust_repo": True} if trust_repo else {}
    module, preprocessing = source.load(
        rest, weights, overrides or PreprocessingOverrides(), preprocessing, **trust
    )
    module = module.cpu().float().eval().requires_grad_(False)
    weights_module.check_finite(module, f"{model}" if weights is None else f"{weights}")
    return LoadedModel(
        module=module,
        preprocessing=preprocessing,
        source=model,
        architecture=type(module).__name__,
        weights_sha256=weights_module.weights_sha256(module),
    )


def missing_package(model: str, scheme: str, error: ModuleNotFoundError) -> ModelError:
    """The error for a scheme whose packages are not installed."""
    extra = _EXTRAS.get(scheme, "torch")
    return ModelError(
        f"{model}: the package {error.name!r} is not installed; "
        f"{how_to_install('regraft-export', extra)}"
    )
