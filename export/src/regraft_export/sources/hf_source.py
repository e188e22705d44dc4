"""``hf:REPO_OR_FOLDER``: ViTs of transformers, preprocessed as by their Pillow image processors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from regraft.errors import ModelError
from regraft.preprocessing import Preprocessing
from regraft_export.sources.data_config import (
    NAMES,
    PreprocessingOverrides,
    from_data_config,
    override,
)
from regraft_export.sources.hf_positions import fix_image_size
from regraft_export.sources.hf_processor import preprocessing_of
from regraft_export.sources.reasons import reason
from regraft_export.sources.weights import check_keys, read_state_dict

# model_type of config.json -> the class that computes features. A repository of a whole CLIP
# model, or of a model with a classifier, gives its vision tower.
_CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "clip_vision_model": "CLIPVisionModel",
    "clip": "CLIPVisionModelWithProjection",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip": "SiglipVisionModel",  # SigLIP 2 too, where its resolution is fixed
    "dinov3_vit": "DINOv3ViTModel",
    "vit_mae": "ViTModel",  # ViTMAEModel shuffles its patches
    "internvl_vision": "InternVLVisionModel",
}
_REFUSED = {
    "beit": "BEiT adds a relative position bias inside attention, and there is no neutral value to "
    "give a register",
    "siglip2": "this is SigLIP 2 with images of any aspect (NaFlex), which takes cut patches; "
    "its checkpoints of a fixed resolution are of model_type siglip",
}
_REFUSED["siglip2_vision_model"] = _REFUSED["siglip2"]
_WITH_PROJECTION = "CLIPVisionModelWithProjection"
# Keys of the parts that are left out on purpose.
_OTHER_PARTS = (
    "classifier.",
    "cls_classifier.",
    "distillation_classifier.",
    "decoder.",
    "pooler.",
    "logit_bias",
    "logit_scale",
    "text_",
    "visual_projection.",
)


def load(
    name: str,
    weights: Path | None,
    overrides: PreprocessingOverrides,
    preprocessing: Preprocessing | None = None,
) -> tuple[nn.Module, Preprocessing]:
    """Loads the vision model and its preprocessing from the hub or a folder.

    Where the image size is not the checkpoint's, the position embedding is resampled once, by the
    model's own rule, so that the module takes ``pixel_values`` alone. Given a complete
    ``preprocessing``, no image processor is looked for.

    Raises:
        ModelError: no such repository, an architecture that is not known, weights, preprocessing
            or image size that do not fit.
    """
    subject = f"hf:{name}"
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ModelError(f"{subject}: no such folder; expected one with config.json")
    with _quiet():
        module = _module(subject, name, weights)
        preprocessing = preprocessing or _preprocessing(subject, name, overrides)
    fix_image_size(subject, module, preprocessing.image_size)
    return module, preprocessing


def _preprocessing(subject: str, name: str, overrides: PreprocessingOverrides) -> Preprocessing:
    if len(overrides.given()) == len(NAMES):  # nothing is left that the processor could say
        return from_data_config(overrides.over({}), subject)
    return override(preprocessing_of(subject, name), overrides, subject)


def _module(subject: str, name: str, weights: Path | None) -> nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    # The hub's clients raise errors of many libraries, which have no common base below Exception.
    except Exception as error:
        raise ModelError(
            f"{subject}: the configuration cannot be loaded ({reason(error)}); check the name and "
            "the connection"
        ) from error
    architecture = _CLASSES.get(config.model_type)
    if config.model_type in _REFUSED:
        raise ModelError(f"{subject}: {_REFUSED[config.model_type]}")
    if architecture is None:
        raise ModelError(
            f"{subject}: model_type is {config.model_type!r}; expected one of {', '.join(_CLASSES)}"
        )
    if architecture == "CLIPVisionModel" and _WITH_PROJECTION in (config.architectures or ()):
        architecture = _WITH_PROJECTION
    if config.model_type == "clip":
        # The tower's own configuration does not carry the size of the joint space.
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    elif config.model_type == "siglip":
        config = config.vision_config
    elif config.model_type == "vit_mae":
        config = _as_vit(config)
    kind = getattr(transformers, architecture)
    module, info = _pretrained(subject, kind, name, config, weights)
    missing = info["missing_keys"]
    if missing and all(key.startswith("pooler.") for key in missing):
        # Checkpoints with a classifier have no pooler; transformers would draw one at random.
        module, info = _pretrained(subject, kind, name, config, weights, add_pooling_layer=False)
    check_keys(
        weights or subject,
        architecture,
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(k for k in info["unexpected_keys"] if not k.startswith(_OTHER_PARTS)),
        misshapen=sorted(
            f"{key} {list(came)} instead of {list(own)}"
            for key, came, own in info["mismatched_keys"]
        ),
    )
    return module


def _as_vit(config: Any) -> Any:
    """The configuration of the plain ViT whose weights an MAE checkpoint has."""
    own = config.to_dict()
    shared = transformers.ViTConfig().to_dict().keys() & own.keys()
    skipped = ("model_type", "architectures", "transformers_version")
    return transformers.ViTConfig(**{k: own[k] for k in shared if k not in skipped})


def _pretrained(
    subject: str, kind: Any, name: str, config: Any, weights: Path | None, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and transformers' report of which keys fitted."""
    state = None if weights is None else read_state_dict(weights)
    try:
        return kind.from_pretrained(  # type: ignore[no-any-return]
            name if state is None else None,
            config=config,
            state_dict=state,
            dtype="float32",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused, with the other keys
            **options,
        )
    # As above, and a damaged file raises whatever its reader stumbles over.
    except Exception as error:
        raise ModelError(
            f"{weights or subject}: the weights cannot be loaded into {kind.__name__} "
            f"({reason(error)}); check the name and the connection, or give --weights FILE"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No table of keys, which :func:`check_keys` judges; bars only on a terminal."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    if not sys.stderr.isatty():
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
