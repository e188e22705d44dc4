"""One forward pass on a grey image, with everything recorded that tells a ViT's structure."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import ModelError


def first_tensor(value: Any) -> Tensor:
    """The tokens in a block's output, which some libraries wrap in a tuple."""
    tokens: Tensor = value[0] if isinstance(value, tuple | list) else value
    return tokens


@dataclass
class Trace:
    """What one forward pass showed.

    Attributes:
        tokens: what entered the first block, (1, T, D).
        entry: the norm whose output entered the first block, if there is one.
        final: the norm that read the last block's output, if there is one.
        grids: (rows, cols) of every convolution's output.
        extra_tensors: names of further tensors that blocks were given.
    """

    tokens: Tensor
    entry: nn.Module | None = None
    final: nn.Module | None = None
    grids: list[tuple[int, int]] = field(default_factory=list)
    extra_tensors: list[str] = field(default_factory=list)


def run_once(module: nn.Module, stack: list[nn.Module], image_size: tuple[int, int]) -> Trace:
    """Runs a model on one grey image and records what goes through it.

    Args:
        module: the model, in eval mode.
        stack: its blocks.
        image_size: (H, W).

    Raises:
        ModelError: it does not run, or its blocks do not map tokens to tokens.
    """
    reference = next(module.parameters())
    pixels = torch.zeros(1, 3, *image_size, dtype=reference.dtype, device=reference.device)
    block_inputs: list[Tensor] = []
    block_outputs: list[Tensor] = []
    extra: list[str] = []
    grids: list[tuple[int, int]] = []
    norms: list[tuple[nn.Module, Tensor, Tensor]] = []

    def on_block(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        block_inputs.append(args[0] if args else next(iter(kwargs.values())))
        block_outputs.append(first_tensor(out))
        named = [(f"argument {i}", v) for i, v in enumerate(args[1:], 2)]
        # Without positional arguments the first keyword holds the tokens.
        named += list(kwargs.items())[0 if args else 1 :]
        extra.extend(name for name, value in named if _holds_tensor(value))

    def on_conv(m: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if out.ndim == 4:
            grids.append((out.shape[2], out.shape[3]))

    def on_norm(m: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            norms.append((m, args[0], out))

    inside = {m for block in stack for m in block.modules()}
    with ExitStack() as hooks, torch.no_grad():
        for block in stack:
            hooks.callback(block.register_forward_hook(on_block, with_kwargs=True).remove)
        for m in module.modules():
            if isinstance(m, nn.Conv2d):
                hooks.callback(m.register_forward_hook(on_conv).remove)
            elif m not in inside and "Norm" in type(m).__name__:
                hooks.callback(m.register_forward_hook(on_norm).remove)
        try:
            module(pixels)
        except Exception as error:
            # Any failure of foreign code on a plain image batch means: not usable as it is.
            raise ModelError(
                f"{type(module).__name__}: does not run on a batch of shape "
                f"(1, 3, {image_size[0]}, {image_size[1]}): {error}; is it made for another "
                "--image-size?"
            ) from error
    if len(block_inputs) != len(stack):
        raise ModelError(
            f"{type(module).__name__}: its {len(stack)} blocks ran {len(block_inputs)} times in "
            "one forward pass; expected each once"
        )
    tokens, last = block_inputs[0], block_outputs[-1]
    if tokens.ndim != 3 or last.shape != tokens.shape:
        raise ModelError(
            f"{type(module).__name__}: its blocks map {tuple(tokens.shape)} to "
            f"{tuple(last.shape)}; expected tokens (B, T, D) throughout"
        )
    entry = next((m for m, i, o in norms if _same(o, tokens) and i.shape == tokens.shape), None)
    final = next((m for m, i, o in norms if _same(i, last) and o.shape == last.shape), None)
    return Trace(tokens, entry, final, grids, extra)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_holds_tensor(v) for v in value)
    return isinstance(value, Tensor)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.data_ptr() == b.data_ptr())
