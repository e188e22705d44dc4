"""Every attention a model computes inside its blocks, seen by its scores.

Libraries compute attention in three ways: the fused ``scaled_dot_product_attention``,
``nn.MultiheadAttention``, and a softmax over scores of their own. All three are functions of torch,
so they can be watched without knowing whose module calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from regraft_export.vit.parts import Block

_SOFTMAX = ("softmax", "_softmax")
OnScores = Callable[[int, "Scores"], None]


class Scores:
    """Attention scores of one block before the softmax, (B, heads, T, T), computed as asked for."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        if key.shape[1] != query.shape[1]:  # grouped queries share keys
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        self.query, self.key, self.mask, self.scale = query, key, mask, scale

    @property
    def tokens(self) -> int:
        """Keys: T, with the registers."""
        return self.key.shape[2]

    def rows(self, queries: slice) -> Tensor:
        """The scores of some queries to every key, (B, heads, queries, T)."""
        scores = (self.query[:, :, queries] * self.scale) @ self.key.transpose(-2, -1)
        if self.mask is None:
            return scores
        return scores + self.mask.expand(*scores.shape[:2], -1, -1)[:, :, queries]

    def times(self, vectors: Tensor) -> Tensor:
        """The scores of every query times (T, n), without ever holding all scores."""
        product = (self.query * self.scale) @ (self.key.transpose(-2, -1) @ vectors)
        return product if self.mask is None else product + self.mask @ vectors


class _ReadyScores(Scores):
    """Scores that the model itself computed and hands to a softmax."""

    mask = None  # it is in the scores

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    @property
    def tokens(self) -> int:
        return self.scores.shape[3]

    def rows(self, queries: slice) -> Tensor:
        return self.scores[:, :, queries]

    def times(self, vectors: Tensor) -> Tensor:
        return self.scores @ vectors


class AttentionCalls(TorchFunctionMode):
    """Within it, ``on_scores(layer, scores)`` is called for every attention inside the blocks.

    Args:
        blocks: of the model.
        on_scores: what to call.
        keys: if given, no query sees any key but the first ``keys``.
    """

    def __init__(
        self, blocks: tuple[Block, ...], on_scores: OnScores, keys: int | None = None
    ) -> None:
        super().__init__()
        self.blocks, self.on_scores, self.keys = blocks, on_scores, keys
        self.current: int | None = None
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> AttentionCalls:
        for layer, block in enumerate(self.blocks):

            def start(m: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
                self.current = layer

            def stop(m: Any, args: Any, out: Any) -> None:
                self.current = None

            self.handles.append(block.module.register_forward_pre_hook(start, with_kwargs=True))
            self.handles.append(block.module.register_forward_hook(stop))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for handle in self.handles:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.current is None:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(func, args, kwargs)
        if getattr(func, "__name__", "") in _SOFTMAX and _is_over_tokens(args, kwargs):
            return self._softmax(func, args, kwargs)
        return func(*args, **kwargs)

    def _seen(self, scores: Scores) -> None:
        assert self.current is not None  # only called inside a block
        self.on_scores(self.current, scores)

    def _fused(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        names = ("query", "key", "value", "attn_mask")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, mask = given["query"], given["key"], given.get("attn_mask")
        scale = given.get("scale")
        self._seen(Scores(query, key, mask, query.shape[-1] ** -0.5 if scale is None else scale))
        if self.keys is not None:
            given["key"], given["value"] = key[:, :, : self.keys], given["value"][:, :, : self.keys]
            given["attn_mask"] = None if mask is None else mask[..., : self.keys]
        rest = args[len(names) :]
        first = [given.pop(name, None) for name in names]
        return func(*first, *rest, **given)

    def _multi_head(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        query, key, value, width, heads, weight, bias, *rest = args
        if weight is None:  # projections of their own for query and key: between two sequences
            return func(*args, **kwargs)
        self._seen(_projected(query, key, width, heads, weight, bias, kwargs.get("attn_mask")))
        if self.keys is not None:
            key, value = key[: self.keys], value[: self.keys]
        return func(query, key, value, width, heads, weight, bias, *rest, **kwargs)

    def _softmax(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        scores = args[0]
        self._seen(_ReadyScores(scores))
        if self.keys is not None:
            hidden = torch.full_like(scores[..., self.keys :], -torch.inf)
            scores = torch.cat([scores[..., : self.keys], hidden], dim=-1)
        return func(scores, *args[1:], **kwargs)


def _projected(
    query: Tensor,
    key: Tensor,
    width: int,
    heads: int,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Scores:
    """The scores of ``nn.MultiheadAttention``, from (T, B, D) before its packed projection."""

    def project(tokens: Tensor, part: slice) -> Tensor:
        projected = F.linear(tokens, weight[part], None if bias is None else bias[part])
        return projected.reshape(*tokens.shape[:2], heads, width // heads).permute(1, 2, 0, 3)

    q, k = project(query, slice(0, width)), project(key, slice(width, 2 * width))
    return Scores(q, k, mask, (width // heads) ** -0.5)


def _is_over_tokens(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a softmax is an attention's: over the last axis of (B, heads, T, T)."""
    scores = args[0]
    axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
    square = isinstance(scores, Tensor) and scores.ndim == 4 and scores.shape[2] == scores.shape[3]
    return square and axis in (-1, 3)
