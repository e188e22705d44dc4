"""One forward pass with block outputs, registers, neuron activations and CLS attention recorded."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regraft.errors import ModelError
from regraft_export.vit.structure import VisionTransformer, first_tensor, pooled_of


@dataclass
class Observation:
    """What one forward pass produced.

    Attributes:
        last_hidden_state: (B, P + patches, D), without test-time registers.
        pooled: what the model's own forward returns for an image, (B, E), or None.
        registers: (B, R, D), the test-time registers at the same stage; R = 0 without a redirect.
        hidden: {layer: (B, P + patches + R, D)}, raw block outputs.
        attention: {layer: (B, heads, P + patches + R)}, the attention of CLS to every token; in a
            model without a class token the mean attention of the patches.
    """

    last_hidden_state: Tensor
    pooled: Tensor | None
    registers: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)


def observe(
    vit: VisionTransformer,
    pixels: Tensor,
    *,
    layers: Collection[int] = (),
    attentions: Collection[int] = (),
) -> Observation:
    """Runs the model, with whatever hooks are active, and records what it produced.

    Args:
        vit: the model.
        pixels: (B, 3, H, W), preprocessed.
        layers: whose raw block outputs to record.
        attentions: of which blocks to record attention.

    Raises:
        ModelError: a block computes its attention in a way that does not show it.
    """
    hidden: dict[int, Tensor] = {}
    final: list[Tensor] = []
    attention: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in layers:
            block = vit.blocks[layer].module
            # Prepended: the hook that removes the registers may sit on the same module.
            stack.callback(block.register_forward_hook(_keep(hidden, layer), prepend=True).remove)
        stack.callback(
            vit.final.register_forward_hook(
                lambda m, a, out: final.append(first_tensor(out)), prepend=True
            ).remove
        )
        if attentions:
            stack.enter_context(_Attention(vit, attentions, attention))
        output = vit.module(pixels)
    if unseen := sorted(set(attentions) - set(attention)):
        raise ModelError(
            f"block {unseen[0]} ({type(vit.blocks[unseen[0]].module).__name__}): its attention was "
            "not seen; expected a call of scaled_dot_product_attention, or a softmax of shape "
            "(B, heads, tokens, tokens)"
        )
    tokens = final[0]
    count = vit.layout.count
    return Observation(
        last_hidden_state=tokens[:, :count],
        pooled=pooled_of(output),
        registers=tokens[:, count:],
        hidden=hidden,
        attention=attention,
    )


def _keep(
    store: dict[int, Tensor], layer: int
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        store[layer] = first_tensor(output)

    return hook


_FUSED = torch.nn.functional.scaled_dot_product_attention
_SOFTMAXES = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)


class _Attention(TorchFunctionMode):
    """Takes attention from a block's softmax; recomputes it beside a fused call, which hides it."""

    def __init__(
        self, vit: VisionTransformer, layers: Collection[int], store: dict[int, Tensor]
    ) -> None:
        super().__init__()
        self.vit, self.layers, self.store = vit, set(layers), store
        layout = vit.layout
        # Without a class token the patches together take its part.
        self.queries = slice(0, 1) if layout.class_token else slice(layout.prefix, layout.count)
        self.current: int | None = None
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Attention:
        for layer in self.layers:
            block = self.vit.blocks[layer].module

            def start(m: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                self.current = layer

            def stop(m: nn.Module, args: Any, out: Any) -> None:
                self.current = None

            self.handles.append(block.register_forward_pre_hook(start, with_kwargs=True))
            self.handles.append(block.register_forward_hook(stop))
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
        if func is _FUSED and self.current is not None:
            query, key = args[0], args[1]
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            scores = (query[:, :, self.queries] * scale) @ key.transpose(-2, -1)
            self.store[self.current] = scores.float().softmax(dim=-1).mean(dim=2)
        result = func(*args, **kwargs)
        if func in _SOFTMAXES and self.current is not None and self._between_tokens(result):
            self.store[self.current] = result[:, :, self.queries].float().mean(dim=2)
        return result

    def _between_tokens(self, weights: Tensor) -> bool:
        """Whether these are (B, heads, tokens, tokens), registers or not."""
        count = self.vit.layout.count
        return weights.ndim == 4 and weights.shape[2] == weights.shape[3] >= count
