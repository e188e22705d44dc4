"""Randomly initialised ViTs in which known units write outlier tokens, and pictures for them.

At the end: an exported bundle, exports without tracing, and the command line in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.support import bundles, shared
from torch import Tensor, nn

from regraft_export.graph.patch import Traced
from regraft_export.trace import trace
from regraft_export.vit.structure import VisionTransformer, first_tensor, from_module

Unit = tuple[int, int]
SIZE, PATCH = 64, 8


def flagged_pictures(count: int, seed: int, size: int = SIZE, patch: int = PATCH) -> Tensor:
    """(count, 3, size, size): noise, and in each picture two flat patches of one colour."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, size, size, generator=draw)
    side = size // patch
    for picture in pixels:
        for place in torch.randperm(side * side, generator=draw)[:2].tolist():
            row, col = divmod(place, side)
            area = (slice(row * patch, (row + 1) * patch), slice(col * patch, (col + 1) * patch))
            picture[:, *area] = torch.tensor([1.5, -1.0, 0.5])[:, None, None]
    return pixels


@dataclass(frozen=True)
class Planted:
    """A ViT, its true units, and those of them that act through negative activations."""

    vit: VisionTransformer
    units: tuple[Unit, ...]
    negative: tuple[Unit, ...]


def up_projections(block: nn.Module) -> tuple[nn.Linear, nn.Linear | None]:
    """The Linear in front of the non-linearity, and in SwiGLU the one that gives the value."""
    parts = {name.rpartition(".")[2]: module for name, module in block.named_modules()}
    return (parts["fc1"], None) if "fc1" in parts else (parts["gate_proj"], parts["up_proj"])


def separate(inputs: Tensor, flagged: Tensor) -> tuple[Tensor, Tensor]:
    """A row (D,) and bias with row . x + bias = 1 at flagged tokens on average, -1 elsewhere."""
    yes, no = inputs[flagged], inputs[~flagged]
    row = yes.mean(0) - no.mean(0)
    high, low = (yes @ row).mean(), (no @ row).mean()
    scale = 2 / (high - low)
    return row * scale, 1 - high * scale


def plant(
    module: nn.Module,
    pixels: Tensor,
    units: Sequence[Unit],
    *,
    negative: Sequence[Unit] = (),
    norm: float = 8.0,
) -> Planted:
    """Makes ``units`` write tokens of about ``norm`` times the median at the flat patches.

    The units of one layer share the work; later layers write as much again. A negative unit holds
    GELU's least value (SwiGLU: a large negative one) there and 0 elsewhere.
    """
    vit = from_module(module, (pixels.shape[2], pixels.shape[3]))
    draw = torch.Generator().manual_seed(1)
    target = torch.nn.functional.normalize(torch.randn(vit.layout.width, generator=draw), dim=0)
    rows, cols = vit.layout.grid
    cells = pixels.unfold(2, pixels.shape[2] // rows, pixels.shape[2] // rows)
    cells = cells.unfold(3, pixels.shape[3] // cols, pixels.shape[3] // cols)
    is_flat = (cells.std(dim=(4, 5)).amax(dim=1) < 1e-4).flatten(1)
    flagged = torch.cat([torch.zeros(len(pixels), vit.layout.prefix, dtype=torch.bool), is_flat], 1)
    layers = sorted({layer for layer, _ in units})
    for layer in layers:
        here = [index for at, index in units if at == layer]
        up, value = up_projections(vit.blocks[layer].module)
        with torch.no_grad():
            inputs, out = _seen(vit, pixels, layer, up)
            row, bias = separate(inputs, flagged)
            median = out[:, vit.layout.prefix :].norm(dim=-1).median()
            share = norm * median / len(here) / len(layers)
            for index in here:
                sign = -1.0 if (layer, index) in negative else 1.0
                activation = _set_unit(up, value, index, row, bias, sign)
                column = target * share / activation
                scale = vit.blocks[layer].scale
                vit.blocks[layer].down.weight[:, index] = (
                    column if scale is None else column / scale
                )
    return Planted(vit, tuple(units), tuple(negative))


def _seen(
    vit: VisionTransformer, pixels: Tensor, layer: int, up: nn.Linear
) -> tuple[Tensor, Tensor]:
    """What the MLP's first Linear of a layer is given, and what the block gives."""
    seen: dict[str, Tensor] = {}
    block = vit.blocks[layer].module
    hooks = [
        up.register_forward_pre_hook(lambda m, a: seen.update(inputs=a[0])),
        block.register_forward_hook(lambda m, a, out: seen.update(out=first_tensor(out))),
    ]
    vit.module(pixels)
    for hook in hooks:
        hook.remove()
    return seen["inputs"], seen["out"]


def _set_unit(
    up: nn.Linear, value: nn.Linear | None, index: int, row: Tensor, bias: Tensor, sign: float
) -> float:
    """Sets one unit's rows; returns its activation at flagged tokens."""
    if value is not None:
        # The gate is about 12 or 0 (silu of plus or minus 12), the value +1 or -1 everywhere.
        up.weight[index], up.bias[index] = 12 * row, 12 * bias
        value.weight[index], value.bias[index] = 0.0, sign
        return 12.0 * sign
    if sign > 0:
        up.weight[index], up.bias[index] = 12 * row, 12 * bias
        return 12.0
    # GELU's least value, -0.17, is at -0.75; elsewhere the input is -12.75 and the value 0.
    up.weight[index], up.bias[index] = 6 * row, 6 * bias - 6.75
    return -0.17


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small run faster on one thread, and much faster where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pictures() -> Callable[..., Tensor]:
    """See :func:`flagged_pictures`."""
    return flagged_pictures


@pytest.fixture(scope="session")
def planter() -> Callable[..., Planted]:
    """See :func:`plant`."""
    return plant


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with every kind of output; do not change it."""
    return bundles.exported(tmp_path_factory)


@pytest.fixture
def quick_trace(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take the planted model's trace from a store; tracing has tests of its own."""

    def stored(vit: object, size: tuple[int, int], precision: str = "fp32") -> Traced:
        assert size == bundles.SIZE
        name = f"trace-planted-{precision}"
        return shared.once(
            tmp_path_factory, name, lambda _: trace(bundles.vit(), bundles.SIZE, precision)
        )

    monkeypatch.setattr("regraft_export.exporting.trace", stored)
