"""What is asked of an export, and what of it a model cannot give."""

from __future__ import annotations

from dataclasses import dataclass, field

from regraft.constants import VARIANTS
from regraft.errors import InputError, UsageError
from regraft.redirect import RedirectOptions
from regraft_export.vit.structure import VisionTransformer


@dataclass(frozen=True)
class ExportOptions:
    """What a bundle holds.

    Attributes:
        redirect: options of the redirect.
        precision: fp32, fp16 or bf16.
        layers: blocks whose raw outputs become ``hidden.L``.
        attentions: blocks whose CLS attention becomes ``attentions.L``.
        baseline: whether baseline and probes are written too.
        variant: ``token``, a register runs through the network, or ``kv``, constants in attention
            stand in for it.
        operators: whether the graphs of ``ort-cuda`` use CUDA operators of regraft's own.
    """

    redirect: RedirectOptions = field(default_factory=RedirectOptions)
    precision: str = "fp32"
    layers: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()
    baseline: bool = True
    variant: str = "token"
    operators: bool = False

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError(f"variant is {self.variant!r}; expected one of {', '.join(VARIANTS)}")
        kept = [
            f"--{n} {v}" for n in ("cls", "patches") if (v := getattr(self.redirect, n)) != "zero"
        ]
        if self.variant == "kv" and kept:
            raise UsageError(
                f"--variant kv silences the neurons in the weights, on every token; {kept[0]} "
                "needs --variant token"
            )

    def check_against(self, vit: VisionTransformer) -> None:
        """Raises InputError if a chosen block is not in the model."""
        for name, chosen in (("--layers", self.layers), ("--attentions", self.attentions)):
            outside = [i for i in chosen if not 0 <= i < vit.layout.depth]
            if outside:
                raise InputError(
                    f"{name}: there is no block {outside[0]}; the model has {vit.layout.depth} "
                    f"blocks, 0 to {vit.layout.depth - 1}"
                )
        if self.attentions and not vit.layout.class_token:
            raise InputError(
                "--attentions: this model has no class token, so there is no CLS attention to give"
            )
