"""The parts of a ViT that the method touches, as :mod:`regraft_export.vit.structure` finds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.tokens import TokenLayout
from regraft_export.vit.rotary import Rotary


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        module: maps tokens (B, T, D) to tokens, possibly inside a tuple.
        down: the MLP's down-projection, hidden -> D; its input is the neuron activation.
        scale: LayerScale's gamma (D,) applied to the MLP's output, or None.
    """

    module: nn.Module
    down: nn.Linear
    scale: Tensor | None

    @property
    def write(self) -> Tensor:
        """What each neuron adds to the residual stream per unit of activation: (hidden, D)."""
        weight = self.down.weight.detach().T
        return weight if self.scale is None else weight * self.scale.detach()


@dataclass(frozen=True)
class VisionTransformer:
    """A ViT and its parts.

    Attributes:
        module: the whole model; takes (B, 3, H, W).
        blocks: in the order they run.
        entry: the register is appended to this module's input, (B, T, D): the first block, or the
            norm in front of it (CLIP's ``ln_pre``).
        final: its output is ``last_hidden_state``: the final norm where the model normalises all
            tokens, else the last block.
        layout: token counts and sizes.
        rotary: the tables of rotary positions that the blocks are given, or None.
    """

    module: nn.Module
    blocks: tuple[Block, ...]
    entry: nn.Module
    final: nn.Module
    layout: TokenLayout
    rotary: Rotary | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.module.parameters()).dtype


def first_tensor(value: Any) -> Tensor:
    """The tokens in a block's output, which some libraries wrap in a tuple."""
    tokens: Tensor = value[0] if isinstance(value, tuple | list) else value
    return tokens


def pooled_of(output: Any) -> Tensor | None:
    """What a model's own forward returns for an image, (B, E), or None if it returns tokens only.

    Args:
        output: the forward's return value: a tensor, a tuple, or transformers' ModelOutput.
    """
    for name in ("image_embeds", "pooler_output"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, tuple):
        output = output[0]
    return output if isinstance(output, Tensor) and output.ndim == 2 else None
