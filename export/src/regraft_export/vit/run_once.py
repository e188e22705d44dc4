"""One forward pass on a grey image, with everything recorded that tells a ViT's structure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft_export.vit.parts import first_tensor


@dataclass
class Trace:
    """What one forward pass showed.

    Attributes:
        tokens: what entered the first block, (1, T, D).
        entry: the norm whose output entered the first block, if there is one.
        final: the norm that read the last block's output, if there is one.
        grids: (rows, cols) of every convolution's output.
        given: for each block, what it was given beside the tokens that holds tensors, by keyword or
            position.
        scales: for each block, by what each channel of the narrowing Linear's output is multiplied
            on its way to the block's output, (D,): LayerScale's gamma, or ones. None if it is not a
            multiplication by one factor a channel.
    """

    tokens: Tensor
    entry: nn.Module | None = None
    final: nn.Module | None = None
    grids: list[tuple[int, int]] = field(default_factory=list)
    given: list[dict[str | int, Any]] = field(default_factory=list)
    scales: list[Tensor | None] = field(default_factory=list)


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
    seen = _Recorder()
    with ExitStack() as hooks, torch.enable_grad():
        for handle in seen.watch(module, stack):
            hooks.callback(handle.remove)
        try:
            module(pixels)
        except Exception as error:
            # Any failure of foreign code on a plain image batch means: not usable as it is.
            raise ModelError(
                f"{type(module).__name__}: does not run on a batch of shape "
                f"(1, 3, {image_size[0]}, {image_size[1]}): {error}; is it made for another "
                "--image-size?"
            ) from error
    if len(seen.inputs) != len(stack):
        raise ModelError(
            f"{type(module).__name__}: its {len(stack)} blocks ran {len(seen.inputs)} times in "
            "one forward pass; expected each once"
        )
    tokens, last = seen.inputs[0], seen.outputs[-1]
    if tokens.ndim != 3 or last.shape != tokens.shape:
        raise ModelError(
            f"{type(module).__name__}: its blocks map {tuple(tokens.shape)} to "
            f"{tuple(last.shape)}; expected tokens (B, T, D) throughout"
        )
    norms = [(m, i, o) for m, i, o in seen.norms if i.shape == o.shape]
    entry = next((m for m, i, o in norms if _same(o, tokens)), None)
    final = next((m for m, i, o in norms if _same(i, last)), None)
    return Trace(tokens, entry, final, seen.grids, seen.given, seen.scales)


class _Recorder:
    """Hooks for one pass. Block outputs are cut off from the autograd graph, which stays small."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.given: list[dict[str | int, Any]] = []
        self.scales: list[Tensor | None] = []
        self.grids: list[tuple[int, int]] = []
        self.norms: list[tuple[nn.Module, Tensor, Tensor]] = []
        self.written: Tensor | None = None

    def watch(self, module: nn.Module, stack: list[nn.Module]) -> Iterator[Any]:
        """Registers the hooks and yields their handles."""
        inside = {m for block in stack for m in block.modules()}
        for block in stack:
            yield block.register_forward_hook(self._on_block, with_kwargs=True)
        for m in module.modules():
            if m in inside:
                if isinstance(m, nn.Linear) and m.in_features > m.out_features:
                    yield m.register_forward_hook(self._on_narrowing)
            elif isinstance(m, nn.Conv2d):
                yield m.register_forward_hook(self._on_conv)
            elif "Norm" in type(m).__name__:
                yield m.register_forward_hook(self._on_norm)

    def _on_block(
        self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        self.inputs.append(args[0] if args else next(iter(kwargs.values())))
        tokens = first_tensor(out)
        # The tokens are the first argument, or the first keyword where there are only keywords.
        named: list[tuple[str | int, Any]] = [*enumerate(args), *kwargs.items()]
        self.given.append({place: value for place, value in named[1:] if _holds_tensor(value)})
        self.scales.append(_factor(self.written, tokens))
        self.written = None
        self.outputs.append(tokens.detach())
        rest = out[1:] if isinstance(out, tuple | list) else None
        return self.outputs[-1] if rest is None else (self.outputs[-1], *rest)

    def _on_narrowing(self, m: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if args[0].shape[:-1] != out.shape[:-1] or not self._is_width(out):
            return out
        self.written = out.detach().requires_grad_()
        return self.written.clone()  # what follows may work in place

    def _is_width(self, out: Tensor) -> bool:
        return not self.outputs or out.shape == self.outputs[0].shape

    def _on_conv(self, m: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if out.ndim == 4:
            self.grids.append((out.shape[2], out.shape[3]))

    def _on_norm(self, m: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            self.norms.append((m, args[0], out))


def _factor(written: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The factor of each channel between two tensors (1, T, D), by the gradient; see ``Trace``."""
    if written is None or written.shape != tokens.shape or not tokens.requires_grad:
        return None
    # Random signs: where channels mix, as in a norm, the gradient depends on them beyond their own.
    draw = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, tokens.shape, generator=draw).to(tokens) * 2 - 1
    (gradient,) = torch.autograd.grad(tokens, written, signs, allow_unused=True)
    if gradient is None:
        return None
    factors = (gradient * signs).detach()
    return factors[0, 0] if bool((factors == factors[:, :1]).all()) else None


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_holds_tensor(v) for v in value)
    return isinstance(value, Tensor)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.data_ptr() == b.data_ptr())
