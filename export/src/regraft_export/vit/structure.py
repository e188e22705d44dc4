"""Finds the blocks, the down-projections and the token order of a ViT by running it once.

What is looked for: one stack of equal blocks; in each block exactly one Linear layer that maps the
MLP's hidden units to the width (its input is the neuron activation); tokens of shape (B, T, D)
between blocks; a convolution that cuts the image into the patch grid. Nothing is found by a
module's name except the class token, which structure cannot tell from other prefix tokens. That an
appended register leaves every patch at its position is proven, see ``positions.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft.tokens import TokenLayout
from regraft_export.vit.parts import Block, VisionTransformer, first_tensor, pooled_of
from regraft_export.vit.positions import check_positions
from regraft_export.vit.rotary import Rotary, is_rotary
from regraft_export.vit.run_once import Trace, run_once

_CLASS_TOKEN_NAMES = ("cls_token", "class_token", "class_embedding")
_HEADS_NAMES = ("num_heads", "num_attention_heads")


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
    blocks = tuple(_block(block, i, D, trace.scales[i]) for i, block in enumerate(stack))
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
    rotary = _rotary(trace, rows * cols)
    vit = VisionTransformer(
        module, blocks, trace.entry or stack[0], trace.final or stack[-1], layout, rotary
    )
    if vit.dtype == torch.float32:
        check_positions(vit, image_size)
    return vit


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


def _rotary(trace: Trace, patches: int) -> Rotary | None:
    """The tables of rotary positions, if that is what the blocks are given beside the tokens."""
    places = sorted({place for given in trace.given for place in given}, key=str)
    if not places:
        return None
    tables = [given.get(places[0]) for given in trace.given]
    if len(places) > 1 or not all(is_rotary(table, patches) for table in tables):
        named = ", ".join(p if isinstance(p, str) else f"argument {p + 1}" for p in places)
        raise ModelError(
            f"this model gives its blocks further tensors beside the tokens ({named}); expected "
            f"none, or tables of cosines and sines with one row for each of the {patches} patches "
            "(rotary positions): an appended register would lack an entry in anything else, and "
            "a relative position bias has no neutral value to give it"
        )
    return Rotary(places[0], tuple(tables))


def _block(block: nn.Module, index: int, width: int, scale: Tensor | None) -> Block:
    downs = [m for m in _narrowing_linears(block) if m.out_features == width]
    if len(downs) != 1:
        raise ModelError(
            f"block {index} ({type(block).__name__}): {len(downs)} Linear layers map more inputs "
            f"to the width {width}; expected exactly one, the MLP's down-projection"
        )
    if scale is None:
        raise ModelError(
            f"block {index} ({type(block).__name__}): what its MLP writes is changed by more than "
            "one factor per channel before it reaches the next block (a norm after the residual "
            "sum?); expected x + gamma * MLP(norm(x))"
        )
    return Block(block, downs[0], None if bool((scale == 1).all()) else scale)


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
