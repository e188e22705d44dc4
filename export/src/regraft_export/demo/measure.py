"""What the training log and the tests measure on the demo ViT, in PyTorch with hooks.

Tokens are numbered as timm has them: the class token first, then the patches row by row. A
*unit* is (layer, index), both from 0. `redirected` is Algorithm 2 of arXiv 2506.08010 for a
batch, written here on its own so that the shipped weights are judged without regraft's own code.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Unit = tuple[int, int]
OUTLIER = 3.0
"""A patch is an outlier token where its norm is above this multiple of the image's median."""


@dataclass
class Trace:
    """One forward pass over B images, and what went on in each block."""

    pixels: Tensor
    """(B, 3, H, W)."""
    logits: Tensor
    """(B, labels)."""
    outputs: list[Tensor]
    """Raw block outputs, each (B, T, D)."""
    hidden: list[Tensor]
    """Inputs of the MLPs' down-projections, each (B, T, 4 D)."""

    def ratios(self, patches: int) -> Tensor:
        """Token norms over the median patch norm of image and block: (blocks, B, 1 + patches)."""
        norms = torch.stack([x[:, : 1 + patches].norm(dim=2) for x in self.outputs])
        return norms / norms[:, :, 1:].median(dim=2, keepdim=True).values.detach()

    def patch_ratios(self, patches: int) -> Tensor:
        """The same without the class token: (blocks, B, patches)."""
        return self.ratios(patches)[:, :, 1:]


def _blocks(model: nn.Module) -> list[Any]:
    return list(model.get_submodule("blocks").children())


def trace(model: nn.Module, pixels: Tensor) -> Trace:
    """Runs the model's own forward on (B, 3, H, W) and keeps what the measures need."""
    outputs: list[Tensor] = []
    hidden: list[Tensor] = []
    with ExitStack() as hooks:
        for block in _blocks(model):
            output = block.register_forward_hook(lambda _m, _i, out: outputs.append(out))
            inner = block.mlp.fc2.register_forward_pre_hook(lambda _m, ins: hidden.append(ins[0]))
            hooks.callback(output.remove)
            hooks.callback(inner.remove)
        logits = model(pixels)
    return Trace(pixels, logits, outputs, hidden)


def _by_layer(units: Sequence[Unit]) -> dict[int, list[int]]:
    layers: dict[int, list[int]] = defaultdict(list)
    for layer, index in units:
        layers[layer].append(index)
    return layers


@contextmanager
def silenced(model: nn.Module, units: Sequence[Unit]) -> Iterator[None]:
    """Sets the activation of these units to zero for every token, without a register."""
    with ExitStack() as hooks:
        for layer, indices in _by_layer(units).items():

            def silence(_m: Any, ins: tuple[Tensor], at: list[int] = indices) -> tuple[Tensor]:
                keep = torch.ones(ins[0].shape[-1], device=ins[0].device)
                keep[at] = 0
                return (ins[0] * keep,)

            hook = _blocks(model)[layer].mlp.fc2.register_forward_pre_hook(silence)
            hooks.callback(hook.remove)
        yield


@contextmanager
def redirected(
    model: nn.Module, units: Sequence[Unit], negative: Sequence[Unit] = ()
) -> Iterator[None]:
    """Appends a zero token and moves the activation of these units to it, per image.

    Its value is the maximum over all tokens, the minimum for the units in `negative`.
    """

    def append(_m: Any, ins: tuple[Tensor]) -> tuple[Tensor]:
        return (nn.functional.pad(ins[0], (0, 0, 0, 1)),)

    with ExitStack() as hooks:
        hooks.callback(_blocks(model)[0].register_forward_pre_hook(append).remove)
        for layer, indices in _by_layer(units).items():
            signs = [-1.0 if (layer, index) in negative else 1.0 for index in indices]

            def move(
                _m: Any,
                ins: tuple[Tensor],
                at: list[int] = indices,
                signs: list[float] = signs,
            ) -> tuple[Tensor]:
                hidden = ins[0].clone()
                sign = torch.tensor(signs, device=hidden.device)
                value = (hidden[:, :, at] * sign).amax(dim=1) * sign
                hidden[:, :, at] = 0
                hidden[:, -1, at] = value
                return (hidden,)

            hook = _blocks(model)[layer].mlp.fc2.register_forward_pre_hook(move)
            hooks.callback(hook.remove)
        yield


def lowest_variance(pixels: Tensor, patch_size: int, count: int) -> Tensor:
    """True at the `count` patches of lowest pixel variance: bool (B, patches)."""
    cells = nn.functional.unfold(pixels, patch_size, stride=patch_size)
    variance = cells.view(len(cells), 3, -1, cells.shape[2]).var(dim=2).mean(dim=1)
    chosen = variance.topk(count, dim=1, largest=False).indices
    return torch.zeros_like(variance, dtype=torch.bool).scatter_(1, chosen, True)


def detection_layer(run: Trace, patches: int) -> int:
    """The block after which the largest patch norm, over the median, is greatest on average."""
    return int(run.patch_ratios(patches).amax(dim=2).mean(dim=1).argmax())


def negative_units(run: Trace, units: Sequence[Unit], patches: int) -> list[Unit]:
    """The units whose mean activation at the outlier tokens is negative."""
    outlier = run.patch_ratios(patches)[detection_layer(run, patches)] > OUTLIER
    hidden = {layer: run.hidden[layer][:, 1 : 1 + patches][outlier] for layer, _ in units}
    return [(layer, index) for layer, index in units if hidden[layer][:, index].mean() < 0]


def contributions(model: nn.Module, run: Trace, layer: int, patches: int) -> Tensor:
    """The contribution of every unit up to `layer` to the outlier tokens there: (layers, 4 D).

    `a_j * (W2[j] . u)`, u the unit vector of the outlier token, averaged over outlier tokens, less
    the same over normal patches with the image's mean outlier direction.
    """
    outlier = run.ratios(patches)[layer, :, 1:] > OUTLIER
    tokens = run.outputs[layer][:, 1 : 1 + patches]
    unit_vectors = nn.functional.normalize(tokens, dim=2)
    direction = nn.functional.normalize(unit_vectors[outlier].mean(dim=0), dim=0)
    scores = []
    for block, hidden in zip(_blocks(model)[: layer + 1], run.hidden, strict=False):
        h = hidden[:, 1 : 1 + patches]
        weight = block.mlp.fc2.weight
        at_outliers = (h[outlier] * (unit_vectors[outlier] @ weight)).mean(dim=0)
        elsewhere = h[~outlier].mean(dim=0) * (direction @ weight)
        scores.append(at_outliers - elsewhere)
    return torch.stack(scores)


def outlier_figures(ratios: Tensor, layer: int) -> dict[str, float]:
    """Figures of one trace's `ratios` (blocks, B, 1 + patches) with outliers judged at `layer`."""
    patches = ratios[layer, :, 1:]
    outlier = patches > OUTLIER
    others = ratios[:, :, 1:].masked_fill(outlier, 0)
    count = outlier.sum(dim=1)
    return {
        "outliers_per_image": float(count.float().mean()),
        "images_with_two": float((count == 2).float().mean()),
        "images_with_one_to_three": float(((count >= 1) & (count <= 3)).float().mean()),
        "outlier_ratio": float(patches[outlier].median()) if bool(outlier.any()) else 0.0,
        "largest_other": float(others.max()),
        "largest_cls": float(ratios[:, :, 0].max()),
        "largest_patch": float(ratios[:, :, 1:].max()),
    }
