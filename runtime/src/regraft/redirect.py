"""The options of the redirect, as the manifest records them.

The arithmetic is Algorithm 2 of "Vision Transformers Don't Need Trained Registers"
(arXiv 2506.08010); the options name where readings of it differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from regraft.errors import InputError

MOST_REGISTERS = 64
# What --scale takes: the normal numbers of fp16, the narrowest precision, so that a factor means
# the same in every bundle. Manifests may hold others.
SCALES = (2.0**-14, 65504.0)

Value = Literal["per-neuron", "per-layer", "constant"]
Cls = Literal["zero", "keep"]
Patches = Literal["zero", "mean", "only-outliers", "keep"]


@dataclass(frozen=True)
class RedirectOptions:
    """How the register neurons' activations are redirected.

    Attributes:
        value: what the register receives. ``per-neuron``: the maximum over tokens of each neuron
            (the minimum where its sign is negative), as in the paper. ``per-layer``: one signed
            scalar per layer, the element of largest magnitude over all its neurons and tokens, as
            in the authors' released hook. ``constant``: the mean value of ``neurons.json``.
        cls: ``zero`` silences the neurons on every prefix token (paper); ``keep`` spares the CLS
            token alone (released hook).
        patches: what the neurons hold on patch tokens: ``zero`` (paper), ``mean`` over the patches
            of the image, ``only-outliers`` (values above mean + 1 standard deviation become the
            mean), ``keep``.
        registers: how many test-time registers are appended.
        scale: factor on the value, one per register.
    """

    value: Value = "per-neuron"
    cls: Cls = "zero"
    patches: Patches = "zero"
    registers: int = 1
    scale: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name, kind in (("value", Value), ("cls", Cls), ("patches", Patches)):
            got = getattr(self, name)
            if got not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise InputError(f"redirect option {name} is {got!r}; expected one of {allowed}")
        if not 1 <= self.registers <= MOST_REGISTERS:
            raise InputError(f"registers is {self.registers}; expected 1 to {MOST_REGISTERS}")
        if len(self.scale) != self.registers:
            raise InputError(
                f"scale has {len(self.scale)} values for {self.registers} registers; "
                "expected one per register"
            )
        if not all(math.isfinite(factor) for factor in self.scale):
            raise InputError(f"scale is {self.scale}; expected finite numbers")

    def scale_cure(self, precision: str) -> str:
        """What to do where a redirected graph alone gives infinite numbers, to end a message.

        Args:
            precision: of its arithmetic.

        Returns:
            Empty where no scale can be the reason: only fp16 ends so early.
        """
        if precision != "fp16" or max(map(abs, self.scale)) <= 1:
            return ""
        given = " ".join(f"{factor:g}" for factor in self.scale)
        return (
            f"; --scale {given} may make numbers that fp16 cannot hold: give a smaller one, or "
            "take a wider precision"
        )

    def to_json(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        return {**asdict(self), "scale": list(self.scale)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RedirectOptions:
        """Reads what :meth:`to_json` wrote."""
        return cls(
            value=data["value"],
            cls=data["cls"],
            patches=data["patches"],
            registers=int(data["registers"]),
            scale=tuple(float(s) for s in data["scale"]),
        )
