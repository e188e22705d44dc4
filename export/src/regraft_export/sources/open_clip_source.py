"""``open_clip:ARCH/PRETRAINED``: image towers of OpenCLIP.

ARCH is one of ``open_clip.list_models()`` and PRETRAINED one of its tags, as in
``ViT-B-16/laion2b_s34b_b88k``; ARCH alone goes with ``--weights``. OpenCLIP's own
``hf-hub:ORG/NAME`` and ``local-dir:FOLDER`` stand for both. The text tower is left out.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import resize_pos_embed
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft.preprocessing import Preprocessing, ResizeRule
from regraft_export.sources.data_config import PreprocessingOverrides, check_patches, override
from regraft_export.sources.reasons import reason
from regraft_export.sources.weights import load_weights

_VISUAL = "visual."
_SCHEMAS = ("hf-hub:", "local-dir:")
_RULES: dict[str, ResizeRule] = {"squash": "exact", "longest": "fit"}


def load(
    name: str,
    weights: Path | None,
    overrides: PreprocessingOverrides,
    preprocessing: Preprocessing | None = None,
) -> tuple[nn.Module, Preprocessing]:
    """Builds the image tower, with its published weights or those of a file.

    The file may hold a whole CLIP model or the image tower alone. Where the image size is not the
    checkpoint's, OpenCLIP resamples the position embedding. A complete ``preprocessing`` stands for
    the model's own and the overrides.

    Raises:
        ModelError: no such architecture, tag or download; a tag whose activation function is not
            the architecture's; weights or image size that do not fit.
    """
    subject = f"open_clip:{name}"
    architecture, tag = _parts(name)
    _check_name(subject, architecture, tag, weights)
    image_size = overrides.image_size if preprocessing is None else preprocessing.image_size
    with _quiet():
        model = _create(subject, architecture, None if weights else tag, weights, image_size)
    visual: nn.Module = model.visual
    if weights is not None:
        load_weights(visual, weights, lambda state, _: _visual_part(state, model))
        _resize_timm_tower(subject, visual, image_size)
    if preprocessing is None:
        own = _preprocessing(subject, visual.preprocess_cfg)  # type: ignore[arg-type]
        preprocessing = override(own, overrides, subject)
    size = getattr(visual, "patch_size", None)
    if isinstance(size, tuple):
        check_patches(subject, preprocessing.image_size, size)
    return visual, preprocessing


def _parts(name: str) -> tuple[str, str | None]:
    """Architecture and tag; OpenCLIP's own schemas name both at once."""
    if name.startswith(_SCHEMAS):
        return name, None
    architecture, _, tag = name.partition("/")
    return architecture, tag or None


def _check_name(subject: str, architecture: str, tag: str | None, weights: Path | None) -> None:
    """Refuses unknown names with the nearest known ones, before anything is downloaded."""
    if architecture.startswith(_SCHEMAS):
        return
    known = open_clip.list_models()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see open_clip.list_models()"
        raise ModelError(f"{subject}: open_clip has no architecture {architecture!r}{hint}")
    if weights is not None:
        return
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag is None:
        listed = ", ".join(tags) or "none; give --weights FILE"
        raise ModelError(
            f"{subject}: expected open_clip:ARCH/PRETRAINED or --weights FILE; {architecture} has "
            f"the tags {listed}"
        )
    config = open_clip.get_pretrained_cfg(architecture, tag)
    if not config:
        raise ModelError(
            f"{subject}: {architecture} has no pretrained tag {tag!r}; expected one of "
            f"{', '.join(tags) or 'none'}"
        )
    _check_activation(subject, architecture, tag, config)


def _check_activation(subject: str, architecture: str, tag: str, config: Mapping[str, Any]) -> None:
    """OpenCLIP only warns here, and computes features that the weights were not trained for."""
    trained = bool(config.get("quick_gelu", False))
    model_config = open_clip.get_model_config(architecture)
    if trained == bool(model_config.get("quick_gelu", False)):
        return
    other = architecture + "-quickgelu" if trained else architecture.removesuffix("-quickgelu")
    names = ("QuickGELU", "GELU") if trained else ("GELU", "QuickGELU")
    raise ModelError(
        f"{subject}: these weights were trained with {names[0]}, and {architecture} computes "
        f"{names[1]}; use open_clip:{other}/{tag}"
    )


def _create(
    subject: str,
    architecture: str,
    tag: str | None,
    weights: Path | None,
    image_size: tuple[int, int] | None,
) -> Any:
    try:
        return open_clip.create_model(
            architecture,
            pretrained=tag,
            load_weights=weights is None,
            require_pretrained=weights is None,
            pretrained_text=False,
            # A timm tower changes its size after its weights are loaded.
            force_image_size=image_size if weights is None or not _is_timm(architecture) else None,
        )
    # The hub's clients raise errors of many libraries, which have no common base below Exception.
    except Exception as error:
        raise ModelError(
            f"{subject}: the model cannot be loaded ({reason(error)}); check the name and the "
            "connection, or give --weights FILE"
        ) from error


def _is_timm(architecture: str) -> bool:
    with contextlib.suppress(Exception):  # what is wrong with it, create_model says
        config = open_clip.get_model_config(architecture) or {}
        return "timm_model_name" in config.get("vision_cfg", {})
    return False


def _visual_part(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The image tower's weights of a CLIP checkpoint, its position embedding resampled."""
    whole = any(name.startswith(_VISUAL) for name in state)
    chosen = {
        name if whole else _VISUAL + name: tensor
        for name, tensor in state.items()
        if not whole or name.startswith(_VISUAL)
    }
    resize_pos_embed(chosen, model)
    return {name.removeprefix(_VISUAL): tensor for name, tensor in chosen.items()}


def _resize_timm_tower(subject: str, visual: nn.Module, image_size: tuple[int, int] | None) -> None:
    own = tuple(visual.image_size)  # type: ignore[arg-type]
    if image_size is None or image_size == own:
        return
    try:
        visual.set_input_size(image_size)  # type: ignore[operator]
    except (AttributeError, TypeError, AssertionError) as error:
        raise ModelError(
            f"{subject}: this model does not take another image size; leave --image-size out"
        ) from error


def _preprocessing(subject: str, config: Mapping[str, Any]) -> Preprocessing:
    """OpenCLIP's ``image_transform`` for evaluation, in plain numbers."""
    size = config["size"]
    image_size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    mode, fill = config["resize_mode"], int(config["fill_color"])
    rule = _RULES.get(mode, "shortest-edge" if image_size[0] == image_size[1] else "cover")
    # "random" is of training alone, and to unequal sides OpenCLIP always resizes by bicubic.
    bilinear = config["interpolation"] == "bilinear" and rule != "cover"
    try:
        return Preprocessing(
            image_size=image_size,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            resize=rule,
            resize_size=image_size,
            interpolation="bilinear" if bilinear else "bicubic",
            fill=(fill, fill, fill),
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"{subject}: preprocessing: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """OpenCLIP reports to the root logger that it loads no weights, which is what was asked for."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
