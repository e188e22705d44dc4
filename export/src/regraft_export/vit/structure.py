"""Finds the blocks, the down-projections and the token order of a ViT by running it once.

What is looked for: one stack of equal blocks; in each block exactly one Linear layer that maps the
MLP's hidden units to the width (its input is the neuron activation); tokens of shape (B, T, D)
between blocks; a convolution that cuts the image into the patch grid. Nothing is found by a
module's name except the class token, which structure cannot tell from other prefix tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft.tokens import TokenLayout
from regraft_export.vit.run_once import Trace, first_tensor, run_once

_CLASS_TOKEN_NAMES = ("cls_token", "class_token", "class_embedding")
_HEADS_NAMES = ("num_heads", "num_attention_heads")


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
    """

    module: nn.Module
    blocks: tuple[Block, ...]
    entry: nn.Module
    final: nn.Module
    layout: TokenLayout

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.module.parameters()).dtype


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


def from_module(module: nn.Module, image_size: tuple[int, int]) -> VisionTransformer:
    """Finds the parts of a ViT.

    Args:
        module: a model in eval mode that takes (B, 3, H, W).
        image_size: (H, W).

    Raises:
        ModelError: it does not have the structure; the message says what was looked for.
    """
    stack = _stack_of_blocks(module)
    trace = run_once(module, stack, image_size)
    T, D = trace.tokens.shape[1:]
    _refuse_positions_in_attention(trace, stack)
    blocks = tuple(_block(block, i, D) for i, block in enumerate(stack))
    rows, cols = _patch_grid(trace, T)
    prefix = T - rows * cols
    class_token = prefix > 0 and _has_class_token(module)
    layout = TokenLayout(
        class_token=class_token,
        prefix=prefix,
        grid=(rows, cols),
        width=D,
        depth=len(blocks),
        heads=_heads(stack[0]),
        test_time_registers=0,
    )
    return VisionTransformer(
        module, blocks, trace.entry or stack[0], trace.final or stack[-1], layout
    )


def _name_of(module: nn.Module, part: nn.Module) -> str:
    return next((name for name, m in module.named_modules() if m is part), type(part).__name__)


def _stack_of_blocks(module: nn.Module) -> list[nn.Module]:
    def is_stack(candidate: nn.Module) -> bool:
        if not isinstance(candidate, nn.ModuleList | nn.Sequential) or len(candidate) < 2:
            return False
        same = len({type(child) for child in candidate}) == 1
        return same and all(_narrowing_linears(child) for child in candidate)

    stacks = [m for m in module.modules() if is_stack(m)]
    if not stacks:
        raise ModelError(
            f"{type(module).__name__}: no stack of equal transformer blocks was found; looked for "
            "a ModuleList or Sequential of at least two blocks of one class, each with an MLP "
            "whose last Linear maps more hidden units to the width"
        )
    if len(stacks) > 1:
        names = ", ".join(repr(_name_of(module, s)) for s in stacks)
        raise ModelError(
            f"{type(module).__name__}: {len(stacks)} stacks of transformer blocks ({names}); "
            "expected one: hand in a single vision tower (hierarchical models have no one token "
            "sequence)"
        )
    return list(stacks[0].children())


def _narrowing_linears(block: nn.Module) -> list[nn.Linear]:
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    return [m for m in linears if m.in_features > m.out_features]


def _refuse_positions_in_attention(trace: Trace, stack: list[nn.Module]) -> None:
    relative = [n for n, _ in stack[0].named_parameters() if "relative_position" in n]
    rotary = [n for n, _ in stack[0].named_buffers() if "freq" in n or "rope" in n]
    found = [*trace.extra_tensors, *relative, *rotary]
    if found:
        raise ModelError(
            "this model gives positions inside attention "
            f"({', '.join(sorted(set(found)))}); an appended register would shift or lack a "
            "position, so it is refused in this version"
        )


def _block(block: nn.Module, index: int, width: int) -> Block:
    downs = [m for m in _narrowing_linears(block) if m.out_features == width]
    if len(downs) != 1:
        raise ModelError(
            f"block {index} ({type(block).__name__}): {len(downs)} Linear layers map more inputs "
            f"to the width {width}; expected exactly one, the MLP's down-projection"
        )
    scales = list(_layer_scales(block, width))
    return Block(block, downs[0], scales[-1] if scales else None)


def _layer_scales(block: nn.Module, width: int) -> Iterator[Tensor]:
    # LayerScale: a module whose only parameter is a vector over the width, and which is no norm.
    for m in block.modules():
        own = list(m.parameters(recurse=False))
        is_norm = "Norm" in type(m).__name__
        if len(own) == 1 and own[0].shape == (width,) and not is_norm and not list(m.children()):
            yield own[0]


def _patch_grid(trace: Trace, tokens: int) -> tuple[int, int]:
    fitting = [g for g in trace.grids if g[0] * g[1] <= tokens]
    if not fitting:
        raise ModelError(
            f"no convolution cuts the image into at most {tokens} patches (grids seen: "
            f"{trace.grids or 'none'}); expected a patch embedding in front of the blocks"
        )
    return fitting[-1]


def _has_class_token(module: nn.Module) -> bool:
    return any(
        name.rpartition(".")[2] in _CLASS_TOKEN_NAMES for name, _ in module.named_parameters()
    )


def _heads(block: nn.Module) -> int:
    for m in block.modules():
        for name in _HEADS_NAMES:
            heads = getattr(m, name, None)
            if isinstance(heads, int):
                return heads
    raise ModelError(
        f"{type(block).__name__}: no module of the block has {' or '.join(_HEADS_NAMES)}; "
        "expected its attention to say how many heads it has"
    )


__all__ = ["Block", "VisionTransformer", "first_tensor", "from_module", "pooled_of"]
