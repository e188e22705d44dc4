"""What a manifest says of the variant ``kv``: where the register's constants came from.

In this variant (arXiv 2506.08010, appendix A.2) no register runs through the network. The register
neurons are zeros in the weights, and each attention from some block on sees, beside its tokens, one
constant key and value per head and register: the test-time register's, averaged over images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regraft.json_values import integer

VARIANTS = ("token", "kv")
FILE = "constants.npz"


@dataclass(frozen=True)
class Constants:
    """How the constants were made.

    Attributes:
        first_layer: the first block whose attention has them; the number of blocks if none has.
        images: how many were averaged over.
        pixels_sha256: (hex) of those images, preprocessed, float32, in their order.
        measured_images: on how many of them ``first_layer`` was chosen.
        errors: {block: relative Frobenius error of ``last_hidden_state`` to the token variant
            with the constants from this block on}; the last entry is that without any.
    """

    first_layer: int
    images: int
    pixels_sha256: str
    measured_images: int
    errors: Mapping[int, float]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "errors": {str(i): e for i, e in self.errors.items()}}

    @classmethod
    def of_manifest(cls, data: Mapping[str, Any]) -> Constants | None:
        """Those of a manifest; None in the variant token.

        Args:
            data: the manifest's content.

        Raises:
            KeyError: a field is missing.
            ValueError: a field is malformed, or the variant and its constants do not fit.
        """
        if data["schema"] == 1:  # which knows the variant token alone
            return None
        variant, section = data["variant"], data["constants"]
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}; expected one of {', '.join(VARIANTS)}")
        if (variant == "kv") != (section is not None):
            raise ValueError(
                f"constants is {section!r}; expected an object for the variant kv alone"
            )
        return cls.from_json(section) if variant == "kv" else None

    @classmethod
    def from_json(cls, data: Any) -> Constants:
        """Reads what :meth:`to_json` wrote.

        Raises:
            KeyError: a field is missing.
            ValueError: a field is malformed; the message names it.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"constants is {data!r}; expected an object")
        errors = data["errors"]
        if not isinstance(errors, Mapping) or not all(map(_is_error, errors.values())):
            raise ValueError(f"constants.errors is {errors!r}; expected numbers from 0 on by block")
        return cls(
            first_layer=integer("constants.first_layer", data["first_layer"]),
            images=integer("constants.images", data["images"], 1),
            pixels_sha256=str(data["pixels_sha256"]),
            measured_images=integer("constants.measured_images", data["measured_images"], 1),
            errors={int(block): float(error) for block, error in errors.items()},
        )


def _is_error(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]
