"""A PyTorch module as finding sees it, through hooks; on the device where its weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.neurons import Neurons
from regraft_export.finding.passes import (
    Partial,
    block_output,
    norms_recorded,
    patch_norms,
    resumed,
    run_until,
    to_input,
)
from regraft_export.finding.subject import (
    PLAIN,
    Contributions,
    Doubles,
    Floats,
    Intervention,
    Seen,
)
from regraft_export.versions import versions_of
from regraft_export.vit.hooks import redirected, registers_appended, silenced
from regraft_export.vit.observe import Observation, observe
from regraft_export.vit.structure import VisionTransformer


class PyTorchSubject:
    """See :class:`~regraft_export.finding.subject.Subject`.

    Args:
        vit: the model, in eval mode.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        self.vit = vit
        packages = ("torch", "timm", "transformers", "numpy", "pillow")
        self.versions = versions_of(packages) | {"torch": torch.__version__}
        self.hidden = tuple(block.down.in_features for block in vit.blocks)
        self.patches = vit.layout.patches
        self.state_bytes = (vit.layout.count + 1) * vit.layout.width * vit.dtype.itemsize

    def activation_bytes(self, layers: int) -> int:
        """What the activations of the first ``layers`` layers of one image take."""
        return self.vit.layout.count * sum(self.hidden[:layers]) * self.vit.dtype.itemsize

    def norms(self, pixels: Floats) -> Floats:
        """Patch norms of every layer, (L, B, patches)."""
        with norms_recorded(self.vit) as norms, torch.inference_mode():
            self.vit.module(self._input(pixels))
            return _floats(torch.stack(norms)[..., : self.patches])

    def contributions(
        self, pixels: Floats, layer: int, threshold: float, layers: int
    ) -> Contributions | None:
        """The sums of one batch, computed on the device."""
        partial = run_until(self.vit, self._input(pixels), layer, range(layers))
        return _contributions(self.vit, partial, threshold)

    def state(self, pixels: Floats, layer: int) -> Any:
        """What the block before ``layer`` returns with a register appended."""
        with registers_appended(self.vit, 1):
            return block_output(self.vit, self._input(pixels), layer - 1)

    def norms_at(
        self,
        pixels: Floats,
        layer: int,
        done: Intervention = PLAIN,
        start: tuple[int, Any] | None = None,
    ) -> Floats:
        """Patch norms at one block's output, (B, patches)."""
        begun = nullcontext() if start is None else resumed(self.vit, start[0] - 1, start[1])
        with self._doing(done), begun:
            tokens = run_until(self.vit, self._input(pixels), layer).tokens
        return _floats(patch_norms(self.vit, tokens))

    def received(self, pixels: Floats, neurons: Neurons) -> Mapping[int, Doubles]:
        """What the register receives, {layer: (m,)}, summed over images."""
        sums: dict[int, Doubles] = {}
        with redirected(self.vit, neurons):
            # Registered after the redirect's own hooks, so they see what the register was given.
            handles = [
                self.vit.blocks[layer].down.register_forward_pre_hook(
                    _keeper(sums, layer, self.vit.layout.count)
                )
                for layer in neurons.layers
            ]
            try:
                run_until(self.vit, self._input(pixels), neurons.layers[-1])
            finally:
                for handle in handles:
                    handle.remove()
        return sums

    def observe(self, pixels: Floats, done: Intervention) -> Seen:
        """Norms of every layer and the model's own output."""
        with self._doing(done), norms_recorded(self.vit) as norms, torch.inference_mode():
            name, outputs = self._output(observe(self.vit, self._input(pixels)))
            return Seen(_floats(torch.stack(norms)), _floats(outputs), name)

    def down(self, layer: int) -> tuple[Floats, Floats | None]:
        """A down-projection (m, D) and its bias."""
        down = self.vit.blocks[layer].down
        bias = None if down.bias is None else _floats(down.bias.detach())
        return _floats(down.weight.detach()).T, bias

    def _input(self, pixels: Floats) -> Tensor:
        return to_input(self.vit, torch.from_numpy(np.ascontiguousarray(pixels)))

    @contextmanager
    def _doing(self, done: Intervention) -> Iterator[None]:
        if done.neurons is None:
            with registers_appended(self.vit, 1) if done.register else nullcontext():
                yield
        elif done.register:
            with redirected(self.vit, done.neurons):
                yield
        else:
            with silenced(self.vit, done.neurons.neurons):
                yield

    def _output(self, seen: Observation) -> tuple[str, Tensor]:
        """The model's own output: its name and (B, E)."""
        if seen.pooled is not None:
            return "pooled", seen.pooled.flatten(1)
        if self.vit.layout.class_token:
            return "class token", seen.last_hidden_state[:, 0]
        return "mean patch", seen.last_hidden_state[:, self.vit.layout.prefix :].mean(dim=1)


def _floats(values: Tensor) -> Floats:
    return np.asarray(values.float().cpu().numpy(), np.float32)


def _doubles(values: Tensor) -> Doubles:
    return np.asarray(values.double().cpu().numpy(), np.float64)


def _keeper(sums: dict[int, Doubles], layer: int, register: int) -> Callable[..., None]:
    def keep(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        sums[layer] = _doubles(args[0][:, register].double().sum(dim=0))

    return keep


@torch.inference_mode()
def _contributions(
    vit: VisionTransformer, partial: Partial, threshold: float
) -> Contributions | None:
    """The same as ``contributions.py`` computes with numpy, where the activations are."""
    tokens = partial.tokens
    prefix, count = vit.layout.prefix, vit.layout.count
    is_outlier = patch_norms(vit, tokens) > threshold
    per_image = is_outlier.sum(dim=1)
    has = per_image > 0
    if not bool(has.any()):
        return None
    image, position = is_outlier.nonzero(as_tuple=True)
    position = position + prefix
    directions = F.normalize(tokens[image, position].float(), dim=-1)  # (n, D)
    mean = directions.new_zeros(len(tokens), directions.shape[1])
    mean = F.normalize(mean.index_add(0, image, directions), dim=-1)[has]  # (B', D)
    # A weight per token picks the ordinary patches inside one product, without a copy of hidden.
    ordinary = tokens.new_zeros(tokens.shape[:2])
    ordinary[:, prefix:count] = (~is_outlier).to(ordinary.dtype)
    ordinary = ordinary[has].unsqueeze(1)  # (B', 1, T)
    share = (1 / per_image[image])[:, None]  # of its image's mean, (n, 1)
    sums: list[tuple[Tensor, ...]] = []
    for layer, h in sorted(partial.hidden.items()):
        block = vit.blocks[layer]
        weight = block.down.weight.float()  # (D, m)
        gamma = 1.0 if block.scale is None else block.scale.float()
        at = h[image, position].float()  # (n, m)
        elsewhere = torch.bmm(ordinary, h if bool(has.all()) else h[has]).squeeze(1).float()
        rows = (
            at * ((directions * gamma) @ weight),
            elsewhere * ((mean * gamma) @ weight),
            at,
            at * share,
        )
        sums.append(tuple(r.sum(dim=0, dtype=torch.float64) for r in rows))
    by_layer = [tuple(map(_doubles, of_layer)) for of_layer in sums]
    return Contributions.of_batch(by_layer, per_image.cpu().numpy(), is_outlier.shape[1])
