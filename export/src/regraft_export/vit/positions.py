"""Proof that an appended register leaves every other token at its position.

Positions inside attention (rotary, relative bias) may be counted from the end of the sequence, or
from its length, and an appended token would then shift them. Names do not tell; running does. With
a register appended that no token can see, all scores between the model's own tokens must be those
of the model without it, in every block. And where token 0 is given the register's content, the two
must have equal scores, or the register has a position of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regraft.errors import ModelError
from regraft_export.vit.attention_calls import AttentionCalls, Scores
from regraft_export.vit.hooks import registers_appended
from regraft_export.vit.parts import VisionTransformer

_LIMIT = 1e-3  # of the scores' norm; another position changes them by a tenth and more
_DIRECTIONS = 8
_REFUSED = (
    "models that give positions inside attention are taken where they hand their blocks tables of "
    "cosines and sines (rotary), and refused otherwise"
)


@dataclass
class _Seen:
    """Scores of every block, cut to what is compared.

    Attributes:
        sketch: scores between the model's own tokens, (T, T), times a fixed random (T, 8): equal
            scores give equal sketches, and others almost surely do not. A sketch of 1370 tokens
            takes 0.6 % of the memory.
        first: scores of token 0 and the register: to and from the model's own tokens.
        register: the same of the register.
    """

    sketch: dict[int, Tensor] = field(default_factory=dict)
    first: dict[int, Tensor] = field(default_factory=dict)
    register: dict[int, Tensor] = field(default_factory=dict)


def check_positions(vit: VisionTransformer, image_size: tuple[int, int]) -> None:
    """Raises ModelError unless an appended register leaves every position as it is.

    Two passes of one noise image. Low-precision copies of a model that passed need none.

    Args:
        vit: the model, float32.
        image_size: (H, W).
    """
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, *image_size, generator=draw).to(vit.device, vit.dtype)
    vectors = torch.randn(vit.layout.count, _DIRECTIONS, generator=draw).to(pixels)
    plain = _run(vit, pixels, vectors, registers=0)
    silent = set(range(vit.layout.depth)) - set(plain.sketch)
    if silent:
        raise ModelError(
            f"{_name(vit)}: the attention of block {min(silent)} is not seen; expected "
            "scaled_dot_product_attention, nn.MultiheadAttention or a softmax over tokens, so that "
            "it can be proven that a register moves no patch"
        )
    try:
        more = _run(vit, pixels, vectors, registers=1)
    # Foreign code that counts its tokens fails in any way it likes.
    except Exception as error:
        raise ModelError(
            f"{_name(vit)}: attention does not take one more token ({error}); {_REFUSED}"
        ) from error
    for layer in range(vit.layout.depth):
        if _differ(more.sketch[layer], plain.sketch[layer]):
            raise ModelError(
                f"{_name(vit)}: with a register appended, block {layer} gives its patches other "
                f"positions (or the model is not deterministic); {_REFUSED}"
            )
        if vit.layout.prefix and _differ(more.register[layer], more.first[layer]):
            raise ModelError(
                f"{_name(vit)}: block {layer} gives an appended register a position of its own; "
                f"{_REFUSED}"
            )


def _run(vit: VisionTransformer, pixels: Tensor, vectors: Tensor, registers: int) -> _Seen:
    """One pass in which no token sees the registers, and token 0 holds what they hold."""
    T, seen = vit.layout.count, _Seen()

    def look(layer: int, scores: Scores) -> None:
        if scores.tokens != T + registers:
            return  # over something else than the tokens
        _refuse_bias(vit, layer, scores.mask)
        padded = torch.cat([vectors, vectors.new_zeros(registers, _DIRECTIONS)])
        seen.sketch[layer] = scores.times(padded)[:, :, :T]
        if registers:
            ends = vectors.new_zeros(T + registers, 2)
            ends[0, 0] = ends[T, 1] = 1
            back = scores.times(ends)[:, :, :T]
            seen.first[layer] = torch.cat([scores.rows(slice(0, 1))[:, :, 0, :T], back[..., 0]])
            register = scores.rows(slice(T, T + 1))[:, :, 0, :T]
            seen.register[layer] = torch.cat([register, back[..., 1]])

    appended = registers_appended(vit, registers) if registers else nullcontext()
    calls = AttentionCalls(vit.blocks, look, keys=T)
    with torch.no_grad(), _first_token_zeroed(vit), appended, calls:
        vit.module(pixels)
    return seen


def _refuse_bias(vit: VisionTransformer, layer: int, mask: Tensor | None) -> None:
    if mask is not None and bool((mask != mask.flatten()[0]).any()):
        raise ModelError(
            f"{_name(vit)}: block {layer} adds a bias to each pair of tokens inside attention "
            "(relative positions); there is no neutral value to give a register, because softmax "
            f"ignores what is added to a whole row: any value would be a guess; {_REFUSED}"
        )


@contextmanager
def _first_token_zeroed(vit: VisionTransformer) -> Iterator[None]:
    """Within it, a prefix token in front enters the network as zeros, as registers do."""

    def zero(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = None if args else next(iter(kwargs))
        tokens: Tensor = (args[0] if name is None else kwargs[name]).clone()
        tokens[:, : min(1, vit.layout.prefix)] = 0
        if name is None:
            return (tokens, *args[1:]), kwargs
        return args, {**kwargs, name: tokens}

    handle = vit.entry.register_forward_pre_hook(zero, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _differ(a: Tensor, b: Tensor) -> bool:
    return not bool((a - b).norm() <= _LIMIT * b.norm())


def _name(vit: VisionTransformer) -> str:
    return type(vit.module).__name__
