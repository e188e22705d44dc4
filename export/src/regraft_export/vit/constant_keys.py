"""Sees, and may change, the keys and values that the attention of chosen blocks works on.

The supported families call ``scaled_dot_product_attention``, by themselves or inside
``nn.MultiheadAttention``. The call is intercepted while its block runs, so no family needs an
adapter: queries, keys and values come as the softmax sees them, behind any norm or rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from regraft.errors import ModelError
from regraft_export.vit.parts import VisionTransformer

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
# The positional parameters of multi_head_attention_forward.
_MULTI_HEAD = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight"),
    *("in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight"),
    "out_proj_bias",
)
# What nn.MultiheadAttention may ask for beyond a plain attention.
_MORE = (
    *("bias_k", "bias_v", "add_zero_attn", "key_padding_mask", "attn_mask", "is_causal"),
    *("use_separate_proj_weight", "static_k", "static_v"),
)


@dataclass(frozen=True)
class Call:
    """One call of ``scaled_dot_product_attention``.

    Attributes:
        query: (B, heads, T, head size).
        key: (B, heads, S, head size); S = T but where something was added.
        value: (B, heads, S, head size).
        mask: broadcastable to (B, heads, T, S), added to the scores or, if bool, what may be seen.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None

    def with_constants(self, key: Tensor, value: Tensor) -> Call:
        """The call with R more keys and values, (heads, R, head size), the same for each image."""
        mask = self.mask
        if mask is not None and mask.shape[-1] != 1:
            seen = 1.0 if mask.dtype == torch.bool else 0.0
            mask = F.pad(mask, (0, key.shape[1]), value=seen)
        return replace(
            self, key=_joined(self.key, key), value=_joined(self.value, value), mask=mask
        )


Change = Callable[[int, Call], Call]
"""From a block's index and its call to the call that is made instead."""


@contextmanager
def attention_changed(
    vit: VisionTransformer, layers: Collection[int], change: Change
) -> Iterator[None]:
    """Within it, ``change`` is asked before each attention of ``layers``.

    Raises:
        ModelError: (from the forward pass) a block's attention cannot be intercepted.
    """
    with ExitStack() as stack:
        for layer in layers:
            mode = _OneBlock(layer, change)
            block = vit.blocks[layer].module
            # A mode entered as the block starts is the innermost one: whoever else looks at
            # attention sees the changed call.
            stack.callback(block.register_forward_pre_hook(mode.start).remove)
            stack.callback(block.register_forward_hook(mode.stop, always_call=True).remove)
        yield


class _OneBlock(TorchFunctionMode):
    """Intercepts the one attention of a block, while that block runs."""

    def __init__(self, layer: int, change: Change) -> None:
        super().__init__()
        self.layer, self.change, self.calls = layer, change, 0

    def start(self, module: nn.Module, args: Any) -> None:
        self.calls = 0
        self.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def stop(self, module: nn.Module, args: Any, output: Any) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        # Without an output the block failed, and its own error is on the way.
        if output is not None and self.calls != 1:
            raise ModelError(
                f"block {self.layer} ({type(module).__name__}) calls scaled_dot_product_attention "
                f"{self.calls} times; expected once, for keys and values can be changed there "
                "alone (in timm and transformers choose the fused attention: sdpa, not eager)"
            )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(func, *args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return self._multi_head(dict(zip(_MULTI_HEAD, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
        if given.get("is_causal"):
            raise ModelError(
                f"block {self.layer}: its attention is causal; expected one where every token "
                "sees every other"
            )
        self.calls += 1
        call = Call(given["query"], given["key"], given["value"], given.get("attn_mask"))
        call = self.change(self.layer, call)
        given |= {"key": call.key, "value": call.value, "attn_mask": call.mask}
        result: Tensor = func(given.pop("query"), given.pop("key"), given.pop("value"), **given)
        return result

    def _multi_head(self, given: dict[str, Any]) -> tuple[Tensor, None]:
        """``nn.MultiheadAttention``, whose inner calls a mode does not see: said over again."""
        asked = [name for name in _MORE if given.get(name) not in (None, False)]
        asked += ["need_weights"] if given.get("need_weights", True) else []
        tokens: Tensor = given["query"]
        if asked or given["key"] is not tokens or given["value"] is not tokens or tokens.ndim != 3:
            raise ModelError(
                f"block {self.layer}: nn.MultiheadAttention is called with "
                f"{', '.join(asked) or 'queries, keys and values of several sources'}; expected "
                "plain self-attention that returns no weights"
            )
        length, batch, width = tokens.shape  # the batch is second inside
        packed = F.linear(tokens, given["in_proj_weight"], given["in_proj_bias"])
        parts = packed.reshape(length, batch, 3, given["num_heads"], -1).permute(2, 1, 3, 0, 4)
        mixed = self._attend(F.scaled_dot_product_attention, *parts)
        flat = mixed.permute(2, 0, 1, 3).reshape(length, batch, width)
        return F.linear(flat, given["out_proj_weight"], given["out_proj_bias"]), None


def _joined(tokens: Tensor, constant: Tensor) -> Tensor:
    return torch.cat([tokens, constant.to(tokens).expand(tokens.shape[0], -1, -1, -1)], dim=2)
