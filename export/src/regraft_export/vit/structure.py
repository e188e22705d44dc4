"""Finds the blocks, the down-projections and the token order of a ViT by running it once.

What is looked for: one stack of equal blocks; in each block exactly one Linear layer that maps the
MLP's hidden units to the width (its input is the neuron activation); tokens of shape (B, T, D)
between blocks; a convolution that cuts the image into the patch grid. Nothing is found by a
module's name except the class token, which structure cannot tell from other prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft.tokens import TokenLayout

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


def first_tensor(value: Any) -> Tensor:
    """The tokens in a block's output, which some libraries wrap in a tuple."""
    return value[0] if isinstance(value, tuple | list) else value


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
    trace = _run_once(module, stack, image_size)
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
    return VisionTransformer(module, blocks, trace.entry or stack[0], trace.final or stack[-1], layout)


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
            f"{type(module).__name__}: no stack of equal transformer blocks was found; looked for a "
            "ModuleList or Sequential of at least two blocks of one class, each with an MLP whose "
            "last Linear maps more hidden units to the width"
        )
    if len(stacks) > 1:
        names = ", ".join(repr(_name_of(module, s)) for s in stacks)
        raise ModelError(
            f"{type(module).__name__}: {len(stacks)} stacks of transformer blocks ({names}); "
            "expected one: hand in the vision tower alone"
        )
    return list(stacks[0].children())


def _narrowing_linears(block: nn.Module) -> list[nn.Linear]:
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    return [m for m in linears if m.in_features > m.out_features]


@dataclass
class _Trace:
    """What one forward pass showed."""

    tokens: Tensor
    entry: nn.Module | None = None
    final: nn.Module | None = None
    grids: list[tuple[int, int]] = field(default_factory=list)
    extra_tensors: list[str] = field(default_factory=list)


def _run_once(module: nn.Module, stack: list[nn.Module], image_size: tuple[int, int]) -> _Trace:
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
        more = {**dict(enumerate(args[1:], 1)), **kwargs}
        extra.extend(str(k) for k, v in more.items() if _holds_tensor(v) and k != "hidden_states")

    def on_conv(m: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if out.ndim == 4:
            grids.append((out.shape[2], out.shape[3]))

    def on_norm(m: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            norms.append((m, args[0], out))

    inside = {m for block in stack for m in block.modules()}
    with ExitStack() as hooks, torch.no_grad():
        for block in stack:
            hooks.enter_context(_removed(block.register_forward_hook(on_block, with_kwargs=True)))
        for m in module.modules():
            if isinstance(m, nn.Conv2d):
                hooks.enter_context(_removed(m.register_forward_hook(on_conv)))
            elif m not in inside and "Norm" in type(m).__name__:
                hooks.enter_context(_removed(m.register_forward_hook(on_norm)))
        try:
            module(pixels)
        except Exception as error:
            # Any failure of foreign code on a plain image batch means: not usable as it is.
            raise ModelError(
                f"{type(module).__name__}: does not run on a batch of shape "
                f"(1, 3, {image_size[0]}, {image_size[1]}): {error}"
            ) from error
    if len(block_inputs) != len(stack):
        raise ModelError(
            f"{type(module).__name__}: its {len(stack)} blocks ran {len(block_inputs)} times in one "
            "forward pass; expected each once"
        )
    tokens, last = block_inputs[0], block_outputs[-1]
    if tokens.ndim != 3 or last.shape != tokens.shape:
        raise ModelError(
            f"{type(module).__name__}: its blocks map {tuple(tokens.shape)} to "
            f"{tuple(last.shape)}; expected tokens (B, T, D) throughout"
        )
    entry = next((m for m, i, o in norms if _same(o, tokens) and i.shape == tokens.shape), None)
    final = next((m for m, i, o in norms if _same(i, last) and o.shape == last.shape), None)
    return _Trace(tokens, entry, final, grids, extra)


class _removed:
    """A context manager that removes a hook on leaving."""

    def __init__(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self.handle = handle

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_holds_tensor(v) for v in value)
    return isinstance(value, Tensor)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.data_ptr() == b.data_ptr())


def _refuse_positions_in_attention(trace: _Trace, stack: list[nn.Module]) -> None:
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


def _patch_grid(trace: _Trace, tokens: int) -> tuple[int, int]:
    fitting = [g for g in trace.grids if g[0] * g[1] <= tokens]
    if not fitting:
        raise ModelError(
            f"no convolution cuts the image into at most {tokens} patches (grids seen: "
            f"{trace.grids or 'none'}); expected a patch embedding in front of the blocks"
        )
    return fitting[-1]


def _has_class_token(module: nn.Module) -> bool:
    return any(name.rpartition(".")[2] in _CLASS_TOKEN_NAMES for name, _ in module.named_parameters())


def _heads(block: nn.Module) -> int:
    found: Callable[[nn.Module], list[int]] = lambda m: [  # noqa: E731
        getattr(m, name) for name in _HEADS_NAMES if isinstance(getattr(m, name, None), int)
    ]
    for m in block.modules():
        heads = found(m)
        if heads:
            return heads[0]
    raise ModelError(
        f"{type(block).__name__}: no module of the block has {' or '.join(_HEADS_NAMES)}; "
        "expected its attention to say how many heads it has"
    )
