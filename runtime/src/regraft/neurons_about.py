"""What ``neurons.json`` says beside the list of neurons, checked when it is read.

Every field may be missing or null, as in lists made by hand. One that is there and malformed is an
error that names the file, the key, what came and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from regraft.errors import NeuronsError
from regraft.preprocessing import Preprocessing

PROJECTIONS = 16  # numbers in the fingerprint of a weight
BIAS_PROJECTIONS = 8  # and of a bias
_SHOWN = 60  # characters of what came


def check_about(about: Mapping[str, Any], origin: str) -> None:
    """Checks every field that something is decided by.

    Args:
        about: the file's content, without ``schema`` and ``neurons``.
        origin: the file's name, for messages.

    Raises:
        NeuronsError: a field is malformed.
    """
    for key, (fits, expected) in _FIELDS.items():
        if about.get(key) is not None:
            _expect(origin, key, about[key], fits, expected)
    for layer, print_ in (about.get("fingerprints") or {}).items():
        _check_fingerprint(origin, f"fingerprints[{layer!r}]", print_)
    preprocessing_of(about, origin)


def preprocessing_of(about: Mapping[str, Any], origin: str) -> Preprocessing | None:
    """The preprocessing that the neurons were found with; None if the file does not say.

    Raises:
        NeuronsError: it is malformed.
    """
    if about.get("preprocessing") is None:
        return None
    try:
        return Preprocessing.from_json(about["preprocessing"])
    except KeyError as error:
        reason = f"lacks {error}"
    except (TypeError, ValueError, OverflowError) as error:
        reason = f"is malformed: {error}"
    raise NeuronsError(f"{origin}: preprocessing {reason}; expected what `regraft find` wrote")


def _check_fingerprint(origin: str, where: str, print_: Any) -> None:
    _expect(origin, where, print_, _is_object, "an object")
    for key, fits, expected in (
        ("shape", _is_size, "two integers from 1"),
        ("norm", _is_norm, "a finite number from 0"),
        ("projections", _numbers(PROJECTIONS), f"{PROJECTIONS} finite numbers"),
    ):
        _expect(origin, f"{where}.{key}", print_.get(key), fits, expected)
    bias = print_.get("bias")
    if bias is None:
        return
    _expect(origin, f"{where}.bias", bias, _is_object, "an object, or null")
    for key, fits, expected in (
        ("norm", _is_norm, "a finite number from 0"),
        ("projections", _numbers(BIAS_PROJECTIONS), f"{BIAS_PROJECTIONS} finite numbers"),
    ):
        _expect(origin, f"{where}.bias.{key}", bias.get(key), fits, expected)


def _expect(origin: str, key: str, value: Any, fits: Callable[[Any], bool], expected: str) -> None:
    if fits(value):
        return
    got = repr(value)
    if len(got) > _SHOWN:
        got = f"{got[: _SHOWN - 3]}..."
    raise NeuronsError(
        f"{origin}: {key} is {got}; expected {expected}, as `regraft find` writes it"
    )


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _is_norm(value: Any) -> bool:
    return _is_number(value) and bool(value >= 0)


def _is_threshold(value: Any) -> bool:
    return _is_number(value) and bool(value > 0)


def _is_layer(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_layer(v) and v for v in value)


def _numbers(count: int) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and len(value) == count and all(map(_is_number, value))
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is_text, "a text"),
    "weights_sha256": (_is_text, "a text"),
    "image_size": (_is_size, "[height, width]"),
    "detection_layer": (_is_layer, "an integer from 0"),
    "threshold": (_is_threshold, "a finite number above 0"),
    "fingerprints": (_is_object, "an object with one entry per touched layer"),
}
