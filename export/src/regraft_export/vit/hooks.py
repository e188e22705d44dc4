"""The redirect by PyTorch hooks: the reference that finding uses and every rewrite must equal.

A literal statement of Algorithm 2 of arXiv 2506.08010 on the whole activation (B, T, hidden), each
image of a batch by itself. It is written for reading, not for speed; the graph uses the folded
form instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import NeuronsError
from regraft.neurons import Neurons, RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft.tokens import TokenLayout
from regraft_export.register_constants import RegisterConstants
from regraft_export.vit.constant_keys import Call, attention_changed
from regraft_export.vit.parts import VisionTransformer, first_tensor
from regraft_export.vit.rotary import argument_of, extended, tables_of


@contextmanager
def redirected(
    vit: VisionTransformer, neurons: Neurons, options: RedirectOptions | None = None
) -> Iterator[None]:
    """Within it, ``vit.module`` runs with registers appended and the neurons redirected to them.

    The registers are removed after ``vit.final``, so that what pools and what leaves the model
    sees the tokens it always saw.
    """
    options = options or RedirectOptions()
    with ExitStack() as stack:
        stack.enter_context(registers_appended(vit, options.registers))
        for layer in neurons.layers:
            hook = _Redirect(neurons.of(layer), options, vit.layout)
            handle = vit.blocks[layer].down.register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield


@contextmanager
def registers_appended(vit: VisionTransformer, count: int) -> Iterator[None]:
    """Within it, ``count`` zero tokens run through the network and are removed after it.

    Where the blocks are given rotary positions, the registers get rows that rotate nothing.
    """

    def append(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_with_zeros(args[0], count), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: _with_zeros(kwargs[name], count)}

    def remove(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tokens = first_tensor(output)[:, : vit.layout.count]
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    with ExitStack() as stack:
        handle = vit.entry.register_forward_pre_hook(append, with_kwargs=True)
        stack.callback(handle.remove)
        handle = vit.final.register_forward_hook(remove)
        stack.callback(handle.remove)
        stack.enter_context(_tables_changed(vit, lambda i, value: extended(value, count)))
        yield


@contextmanager
def silenced(vit: VisionTransformer, neurons: Iterable[RegisterNeuron]) -> Iterator[None]:
    """Within it, the neurons are zero on every token and no register exists: a control."""
    rows: dict[int, list[int]] = {}
    for n in neurons:
        rows.setdefault(n.layer, []).append(n.index)
    with ExitStack() as stack:
        for layer, indices in rows.items():
            chosen = torch.tensor(indices, device=vit.device)

            def zero(m: nn.Module, args: tuple[Any, ...], chosen: Tensor = chosen) -> Any:
                return (args[0].index_fill(-1, chosen, 0.0), *args[1:])

            handle = vit.blocks[layer].down.register_forward_pre_hook(zero)
            stack.callback(handle.remove)
        yield


@contextmanager
def register_replaced(
    vit: VisionTransformer, neurons: Iterable[RegisterNeuron], constants: RegisterConstants
) -> Iterator[None]:
    """Within it, the neurons are silent and attention sees constants where the register was.

    The variant ``kv``: appendix A.2 of arXiv 2506.08010.
    """

    def add(layer: int, call: Call) -> Call:
        key, value = constants.keys[layer], constants.values[layer]
        return call.with_constants(torch.from_numpy(key), torch.from_numpy(value))

    with silenced(vit, neurons), attention_changed(vit, constants.layers, add):
        yield


@contextmanager
def tables_replaced(vit: VisionTransformer, tables: Sequence[Tensor]) -> Iterator[None]:
    """Within it, blocks are given these tables of rotary positions, ordered as the model's own."""

    def given(block: int, value: Any) -> Any:
        assert vit.rotary is not None  # without one nothing is replaced
        size = len(tables_of(value))
        start = vit.rotary.index(block) * size
        return argument_of(tables[start : start + size])

    with _tables_changed(vit, given):
        yield


@contextmanager
def _tables_changed(vit: VisionTransformer, change: Callable[[int, Any], Any]) -> Iterator[None]:
    """Within it, block i is given ``change(i, tables)``; nothing happens in other models."""
    rotary = vit.rotary
    with ExitStack() as stack:
        for i, block in enumerate(vit.blocks if rotary is not None else ()):

            def hook(
                m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], i: int = i
            ) -> Any:
                assert rotary is not None  # or there were no hook
                return rotary.replaced(args, kwargs, partial(change, i))

            handle = block.module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _with_zeros(tokens: Tensor, count: int) -> Tensor:
    return torch.cat([tokens, tokens.new_zeros(tokens.shape[0], count, tokens.shape[2])], dim=1)


class _Redirect:
    """Pre-hook of one down-projection: rewrites the neurons' activations, (B, T + R, hidden)."""

    def __init__(
        self, neurons: Sequence[RegisterNeuron], options: RedirectOptions, layout: TokenLayout
    ) -> None:
        self.indices = [n.index for n in neurons]
        self.signs = [n.sign for n in neurons]
        self.options = options
        self.layout = layout
        self.constants = [n.value for n in neurons] if options.value == "constant" else []
        if None in self.constants:
            raise NeuronsError(
                "value = constant needs the `value` of every neuron; this list has none for "
                f"layer {neurons[0].layer} (written by hand?): run `regraft find`, or use "
                "value = per-neuron"
            )

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        h: Tensor = args[0].clone()
        a = h[:, :, self.indices]
        sign = a.new_tensor(self.signs)
        count, prefix = self.layout.count, self.layout.prefix
        new = a.clone()
        new[:, :prefix] = 0
        if self.options.cls == "keep" and self.layout.class_token:
            new[:, 0] = a[:, 0]
        new[:, prefix:count] = self._patches(a[:, prefix:count], sign)
        scale = a.new_tensor(self.options.scale)[:, None]
        new[:, count:] = self._value(a, sign)[:, None, :] * scale
        h[:, :, self.indices] = new
        return (h, *args[1:])

    def _value(self, a: Tensor, sign: Tensor) -> Tensor:
        """(B, k): what one register receives, before scaling."""
        if self.options.value == "constant":
            return a.new_tensor(self.constants).expand(a.shape[0], -1)
        if self.options.value == "per-neuron":
            return (a * sign).amax(dim=1) * sign
        flat = a.flatten(1)
        strongest = flat.gather(1, flat.abs().argmax(dim=1, keepdim=True))
        return strongest.expand(-1, a.shape[2])

    def _patches(self, a: Tensor, sign: Tensor) -> Tensor:
        """(B, patches, k): what the patches keep."""
        if self.options.patches == "zero":
            return torch.zeros_like(a)
        if self.options.patches == "keep":
            return a
        mean = a.mean(dim=1, keepdim=True)
        if self.options.patches == "mean":
            return mean.expand_as(a)
        deviation = a.std(dim=1, keepdim=True, correction=0)
        return torch.where((a - mean) * sign > deviation, mean, a)
