"""One forward pass with block outputs, registers, neuron activations and CLS attention recorded."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from regraft.errors import ModelError
from regraft_export.vit.attention_calls import AttentionCalls, Scores
from regraft_export.vit.parts import VisionTransformer, first_tensor, pooled_of


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
            stack.enter_context(_attention(vit, attentions, attention))
        output = vit.module(pixels)
    if unseen := sorted(set(attentions) - set(attention)):
        raise ModelError(
            f"block {unseen[0]} ({type(vit.blocks[unseen[0]].module).__name__}): its attention was "
            "not seen; expected a call of scaled_dot_product_attention or nn.MultiheadAttention, "
            "or a softmax of shape (B, heads, tokens, tokens)"
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


def _attention(
    vit: VisionTransformer, layers: Collection[int], store: dict[int, Tensor]
) -> AttentionCalls:
    """Computes the attention of some blocks beside their own, which does not return it."""
    layout = vit.layout
    # Without a class token the patches together take its part.
    queries = slice(0, 1) if layout.class_token else slice(layout.prefix, layout.count)

    def keep(layer: int, scores: Scores) -> None:
        if layer in layers:
            store[layer] = scores.rows(queries).float().softmax(dim=-1).mean(dim=2)

    return AttentionCalls(vit.blocks, keep)
