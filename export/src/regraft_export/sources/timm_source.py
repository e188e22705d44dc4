"""``timm:NAME``: models of PyTorch Image Models, with or without a pretrained tag."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any

import timm
import timm.data
from torch import nn

from regraft.errors import ModelError
from regraft.preprocessing import Preprocessing
from regraft_export.sources.data_config import (
    NAMES,
    PreprocessingOverrides,
    check_patches,
    from_data_config,
)
from regraft_export.sources.reasons import reason
from regraft_export.sources.weights import load_weights


def load(
    name: str,
    weights: Path | None,
    overrides: PreprocessingOverrides,
    preprocessing: Preprocessing | None = None,
) -> tuple[nn.Module, Preprocessing]:
    """Builds the model by name, with its published weights or those of a file.

    Another image size than the checkpoint's is handed to timm, which resamples the position
    embedding. A complete ``preprocessing`` stands for the model's own and the overrides.

    Raises:
        ModelError: no such model, tag or download; weights or image size that do not fit.
    """
    subject = f"timm:{name}"
    _check_name(name)
    options: dict[str, Any] = {}
    image_size = overrides.image_size if preprocessing is None else preprocessing.image_size
    if image_size is not None:
        options["img_size"] = image_size
    module = _create(subject, name, pretrained=weights is None, options=options)
    if weights is not None:
        # Every model file of timm has this function: it renames the keys of original releases and
        # resamples the position embedding.
        family = importlib.import_module(type(module).__module__)
        load_weights(module, weights, getattr(family, "checkpoint_filter_fn", None))
    if preprocessing is None:
        config = timm.data.resolve_model_data_config(module)
        config = {key: value for key, value in config.items() if key in NAMES}
        preprocessing = from_data_config(overrides.over(config), subject)
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    if patch is not None:
        check_patches(subject, preprocessing.image_size, patch)
    return module, preprocessing


def _check_name(name: str) -> None:
    """Refuses unknown names with the nearest known ones, before anything is downloaded."""
    architecture = name.partition(".")[0]
    # hf-hub:ORG/NAME and local-dir:FOLDER are timm's own and not in its list.
    if ":" in name or timm.is_model(architecture):
        return
    near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() names all"
    raise ModelError(f"timm:{name}: timm {timm.__version__} has no model {architecture!r}{hint}")


def _create(subject: str, name: str, *, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        module: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        if options and "img_size" in str(error):
            raise ModelError(
                f"{subject}: this model does not take another image size; leave --image-size out"
            ) from error
        raise
    # The hub's clients raise errors of many libraries, which have no common base below Exception.
    except Exception as error:
        what = "the pretrained weights" if pretrained else "the model"
        raise ModelError(
            f"{subject}: {what} cannot be loaded ({reason(error)}); check the name and the "
            "connection, or give --weights FILE"
        ) from error
    return module
