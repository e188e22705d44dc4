"""Forward passes that keep only what finding needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft_export.vit.structure import VisionTransformer, first_tensor


class _Reached(Exception):  # noqa: N818 - it is no error: it ends a forward pass early
    """The pass has come as far as it is needed."""


@dataclass
class Partial:
    """What a pass that ended at one block produced.

    Attributes:
        tokens: (B, T, D), the raw output of that block.
        hidden: {layer: (B, T, m)}, inputs of the down-projections that were asked for.
    """

    tokens: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)


def to_input(vit: VisionTransformer, pixels: Tensor) -> Tensor:
    """``pixels`` (B, 3, H, W) where the weights are, in their type."""
    return pixels.to(vit.device, vit.dtype)


def patch_norms(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    """L2 norms of the patch tokens of (B, T, D), registers or not: float32 (B, patches)."""
    return norms_after_prefix(vit, tokens)[:, : vit.layout.patches]


def norms_after_prefix(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    """L2 norms of the patches and of the R registers behind them: float32 (B, patches + R)."""
    norms: Tensor = torch.linalg.vector_norm(tokens[:, vit.layout.prefix :].float(), dim=-1)
    return norms


@contextmanager
def norms_recorded(vit: VisionTransformer) -> Iterator[list[Tensor]]:
    """Within it, every forward pass fills the list anew: per layer, (B, patches + R)."""
    norms: list[Tensor] = []

    def first(module: nn.Module, args: Any, kwargs: Any) -> None:
        norms.clear()

    def record(module: nn.Module, args: Any, output: Any) -> None:
        norms.append(norms_after_prefix(vit, first_tensor(output)))

    with ExitStack() as stack:
        handle = vit.module.register_forward_pre_hook(first, with_kwargs=True)
        stack.callback(handle.remove)
        for block in vit.blocks:
            # Prepended: the hook that removes the registers may sit on the same module.
            handle = block.module.register_forward_hook(record, prepend=True)
            stack.callback(handle.remove)
        yield norms


def block_output(vit: VisionTransformer, pixels: Tensor, layer: int) -> Any:
    """What one block returns, as it returns it, with whatever hooks are active.

    Args:
        vit: the model.
        pixels: (B, 3, H, W), preprocessed.
        layer: the block after which the pass ends.
    """
    reached: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        reached.append(output)
        raise _Reached

    handle = vit.blocks[layer].module.register_forward_hook(stop)
    try:
        with torch.inference_mode(), suppress(_Reached):
            vit.module(to_input(vit, pixels))
    finally:
        handle.remove()
    return reached[0]


@contextmanager
def resumed(vit: VisionTransformer, layer: int, output: Any) -> Iterator[None]:
    """Within it, passes skip the blocks up to ``layer``, as if it had returned ``output``."""

    def returned(*args: Any, **kwargs: Any) -> Any:
        return output

    with ExitStack() as stack:
        for block in vit.blocks[: layer + 1]:
            replaced = vars(block.module).get("forward")  # by somebody else before
            block.module.forward = returned
            if replaced is None:
                stack.callback(delattr, block.module, "forward")
            else:
                stack.callback(setattr, block.module, "forward", replaced)
        yield


def run_until(
    vit: VisionTransformer, pixels: Tensor, layer: int, hidden: Collection[int] = ()
) -> Partial:
    """Runs the model, with whatever hooks are active, up to the output of one block.

    Args:
        vit: the model.
        pixels: (B, 3, H, W), preprocessed.
        layer: the block after which the pass ends.
        hidden: layers whose neuron activations to keep. They stay in memory until the pass ends.

    Raises:
        ModelError: the activations are not laid out token by token.
    """
    kept: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for index in hidden:

            def keep(module: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
                kept[index] = args[0]

            down = vit.blocks[index].down
            stack.callback(down.register_forward_pre_hook(keep).remove)
        tokens = first_tensor(block_output(vit, pixels, layer))
    for index, h in kept.items():
        if h.shape[:-1] != tokens.shape[:-1]:
            raise ModelError(
                f"layer {index}: the down-projection's input has shape {tuple(h.shape)}; expected "
                f"one row per token, {tuple(tokens.shape[:-1])} and the hidden units"
            )
    return Partial(tokens, kept)
