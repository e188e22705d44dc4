"""transformers' image processors in plain numbers.

Only processors whose steps are resize, centre crop, rescale and normalise are taken: a class that
adds a step of its own would be served wrongly without a word.
"""

from __future__ import annotations

from typing import Any

from PIL import Image
from transformers import AutoImageProcessor

from regraft.errors import ModelError
from regraft.preprocessing import Preprocessing, ResizeRule
from regraft_export.sources.reasons import reason

_PLAIN = (
    "BitImageProcessor",
    "CLIPImageProcessor",
    "DeiTImageProcessor",
    "SiglipImageProcessor",
    "ViTImageProcessor",
)
_OPTIONS = "--image-size, --mean, --std, --interpolation, --crop-pct and --crop-mode"


def preprocessing_of(subject: str, name: str) -> Preprocessing:
    """What the image processor of a repository or folder does.

    Raises:
        ModelError: there is none, it has steps that are not known, or its output has no fixed size.
    """
    try:
        processor: Any = AutoImageProcessor.from_pretrained(name, backend="pil")
    # The hub's clients raise errors of many libraries, which have no common base below Exception.
    except Exception as error:
        raise ModelError(
            f"{subject}: preprocessor_config.json cannot be loaded ({reason(error)}); give "
            f"{_OPTIONS} instead"
        ) from error
    kind = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
    if kind not in _PLAIN or getattr(processor, "do_pad", False):
        what = f"{kind} with do_pad" if kind in _PLAIN else kind
        raise ModelError(
            f"{subject}: the image processor is {what}; expected one of {', '.join(_PLAIN)}, or "
            f"all of {_OPTIONS}"
        )
    try:
        return _translate(processor)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{subject}: preprocessor_config.json: {error}") from error


def _translate(processor: Any) -> Preprocessing:
    rule, resize_size = _resize(processor)
    if processor.do_center_crop:
        image_size = (processor.crop_size.height, processor.crop_size.width)
    elif rule == "exact":
        image_size = resize_size
    else:
        raise ValueError(
            f"the output has no fixed size (size is {processor.size}, no centre crop); expected "
            "height and width, or do_center_crop"
        )
    normalise = processor.do_normalize
    return Preprocessing(
        image_size=image_size,
        mean=tuple(processor.image_mean) if normalise else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if normalise else (1.0, 1.0, 1.0),
        resize=rule,
        resize_size=image_size if rule == "none" else resize_size,
        interpolation=Image.Resampling(processor.resample).name.lower(),  # type: ignore[arg-type]
        crop_offset="floor",
        rescale=processor.rescale_factor if processor.do_rescale else 1.0,
    )


def _resize(processor: Any) -> tuple[ResizeRule, tuple[int, int]]:
    size = processor.size
    if not processor.do_resize:
        return "none", (1, 1)
    if size.height and size.width:
        return "exact", (size.height, size.width)
    if size.shortest_edge and not size.longest_edge:
        return "shortest-edge", (size.shortest_edge, size.shortest_edge)
    raise ValueError(f"size is {size}; expected height and width, or shortest_edge alone")
