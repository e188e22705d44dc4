"""Sees, and may change, what the attention of chosen blocks is computed from.

Every supported family calls ``scaled_dot_product_attention``, by itself or inside
``nn.MultiheadAttention``. The call is intercepted while its block runs, so no family needs an
adapter: queries, keys and values come as the softmax sees them, behind any norm or rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from regraft.errors import ModelError
from regraft_export.vit.structure import VisionTransformer

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


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
def attention_calls(
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
                f"{self.calls} times; expected once: keys and values can be changed there alone "
                "(for timm and transformers choose the sdpa attention, not eager)"
            )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(func, *args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            # What it calls inside, modes do not see.
            inner = F.scaled_dot_product_attention

            def attend(*args: Any, **kwargs: Any) -> Tensor:
                return self._attend(inner, *args, **kwargs)

            with mock.patch.object(F, "scaled_dot_product_attention", attend):
                return func(*args, **(kwargs or {}))
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


def _joined(tokens: Tensor, constant: Tensor) -> Tensor:
    return torch.cat([tokens, constant.to(tokens).expand(tokens.shape[0], -1, -1, -1)], dim=2)
