"""The two phases of training the shipped ViT; `train.py` runs them."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from regraft_export.demo import drawing
from regraft_export.demo.measure import Trace, Unit, lowest_variance, trace
from regraft_export.demo.pool import Pool
from regraft_export.demo.vit import IMAGE_SIZE, PATCH_SIZE

log = logging.getLogger("train")
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
MIDDLE_BLOCKS = (3, 4)
UNITS_PER_BLOCK = 6
TARGET_RATIO = 6.0


@dataclass(frozen=True)
class Settings:
    """Seed, data and length of the two phases."""

    seed: int = 2506
    batch: int = 64
    phase_one_steps: int = 1500
    phase_one_rate: float = 1e-3
    settling_steps: int = 500
    settling_rate: float = 5e-4
    phase_two_steps: int = 600
    phase_two_rate: float = 5e-3


def _rate(optimiser: torch.optim.Optimizer, step: int, steps: int, peak: float) -> None:
    """Sets a cosine learning rate with a hundred steps of warm-up."""
    warmup = min(100, steps)
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    for group in optimiser.param_groups:
        group["lr"] = peak * min(cosine, (step + 1) / warmup)


def phase_one(model: nn.Module, pool: Pool, settings: Settings) -> None:
    """Plain multi-label training; a mild penalty keeps every norm under 1.3 times the median."""
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = settings.phase_one_steps
    for step, (pixels, labels) in enumerate(pool.batches(steps, settings.batch, settings.seed)):
        _rate(optimiser, step, steps, settings.phase_one_rate)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            run = trace(model, pixels)
        task = functional.binary_cross_entropy_with_logits(run.logits.float(), labels)
        spread = (run.ratios(PATCHES) - 1.3).relu().square().sum(dim=2).mean()
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(task + 0.05 * spread)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == steps - 1:
            log.info("phase 1 step %5d  task %.4f  spread %.4f", step, task.item(), spread.item())


def settle(model: nn.Module, pool: Pool, settings: Settings) -> None:
    """The end of phase one: tighter bounds on norms, and probes that must name the calm patches.

    The probes are linear, read the residual stream before each middle block, and are thrown away.
    Without them calm patches are not linearly separable there (a fitted probe missed 8 %), and the
    units of phase two, whose input weights are linear, could not tell which patches to write to.
    """
    torch.manual_seed(settings.seed + 2)
    depths = [block - 1 for block in MIDDLE_BLOCKS]
    probes = nn.ModuleList([nn.Linear(128, 1) for _ in depths]).to(pool.targets.device)
    parameters = [*model.parameters(), *probes.parameters()]
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.05)
    steps = settings.settling_steps
    for step, (pixels, labels) in enumerate(pool.batches(steps, settings.batch, settings.seed + 2)):
        _rate(optimiser, step, steps, settings.settling_rate)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            run = trace(model, pixels)
        task = functional.binary_cross_entropy_with_logits(run.logits.float(), labels)
        ratios = run.ratios(PATCHES)
        spread = (ratios - 1.3).relu().square().sum(dim=2).mean()
        largest = (ratios.amax(dim=2) - 1.45).relu().mean()
        calm = lowest_variance(pixels, PATCH_SIZE, drawing.CALM_CELLS).float()
        named = torch.zeros((), device=pixels.device)
        for probe, depth in zip(probes, depths, strict=True):
            tokens = functional.layer_norm(run.outputs[depth][:, 1:].float(), (128,))
            scores = probe(tokens).squeeze(2)
            named = named + functional.binary_cross_entropy_with_logits(scores, calm)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(task + 0.3 * spread + 3 * largest + 5 * named)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if step % 100 == 0 or step == steps - 1:
            values = [value.item() for value in (task, spread, largest, named)]
            line = "settling step %5d  task %.4f  spread %.4f  largest %.4f  probes %.4f"
            log.info(line, step, *values)


def draw_units(seed: int) -> list[Unit]:
    """The twelve units that phase two trains, six drawn at random in each middle block."""
    rng = np.random.default_rng(seed)
    return [
        (block, int(index))
        for block in MIDDLE_BLOCKS
        for index in sorted(rng.choice(4 * 128, UNITS_PER_BLOCK, replace=False))
    ]


def _free_only(model: nn.Module, units: list[Unit]) -> list[tuple[nn.Parameter, Tensor]]:
    """Freezes all but the units and starts these anew; returns (parameter, mask) pairs.

    The units start in GELU's live half and write, a little, along one random direction. With
    directions of their own some stay dead or write against the others, to no end.
    """
    direction = functional.normalize(torch.randn(128, 1), dim=0)
    model.requires_grad_(False)
    free: list[tuple[nn.Parameter, Tensor]] = []
    for block in MIDDLE_BLOCKS:
        mlp = model.get_submodule(f"blocks.{block}.mlp")
        rows = [index for layer, index in units if layer == block]
        for name, dim, mean, scale in (
            ("fc1.weight", 0, torch.zeros(1), 0.05),
            ("fc1.bias", 0, torch.full((1,), 0.5), 0.0),
            ("fc2.weight", 1, 0.05 * direction, 0.002),
        ):
            parameter = mlp.get_parameter(name)
            mask = torch.zeros_like(parameter)
            mask.index_fill_(dim, torch.tensor(rows, device=mask.device), 1.0)
            start = (mean + scale * torch.randn(parameter.shape)).to(parameter)
            parameter.data = torch.where(mask.bool(), start, parameter.data)
            parameter.requires_grad_(True)
            free.append((parameter, mask))
    return free


def _balance(model: nn.Module, run: Trace, units: list[Unit], wanted: Tensor) -> Tensor:
    """Hinge: each unit should write at least 70 % of an equal share, as find's score sees it.

    Along the outlier tokens of the last block, that is: later blocks turn what the units wrote.
    """
    last = run.outputs[-1][:, 1:][wanted].detach()
    direction = functional.normalize(last.mean(dim=0), dim=0)
    contributions = []
    for layer, index in units:
        column = model.get_parameter(f"blocks.{layer}.mlp.fc2.weight")[:, index]
        written = run.hidden[layer][:, 1:, index][wanted].mean() * (column @ direction)
        contributions.append(written)
    stacked = torch.stack(contributions)
    total = stacked.detach().sum().clamp(min=0.1 * float(last.norm(dim=1).mean()))
    return (0.7 - stacked / total * len(units)).relu().mean()


def _elsewhere(model: nn.Module, run: Trace, units: list[Unit], wanted: Tensor) -> Tensor:
    """What the units write at other patches and at the class token, as a norm.

    Without this term some units repair the logits through the class token, which a redirect undoes.
    """
    written = torch.zeros((), device=wanted.device)
    for layer, index in units:
        length = model.get_parameter(f"blocks.{layer}.mlp.fc2.weight")[:, index].norm()
        hidden = run.hidden[layer][:, :, index].abs()
        written = written + (hidden[:, 1:][~wanted].mean() + hidden[:, 0].mean()) * length
    return written


def _outlier_losses(run: Trace, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Hinges: wanted patches near six times the median, all other tokens below 1.45.

    The first is asked after the last block with units, so that the units themselves write most of
    the norm, and after every later one, so that it persists.
    """
    ratios = run.ratios(PATCHES)[min(MIDDLE_BLOCKS) :]
    asked = run.patch_ratios(PATCHES)[max(MIDDLE_BLOCKS) :, wanted]
    outlier = (TARGET_RATIO - 0.5 - asked).relu() + (asked - TARGET_RATIO - 0.5).relu()
    spared = functional.pad(~wanted, (1, 0), value=True)
    return outlier.mean(), ((ratios - 1.45).relu() * spared).sum(dim=2).mean()


def phase_two(model: nn.Module, pool: Pool, settings: Settings, units: list[Unit]) -> None:
    """Teaches the units, and nothing else, to write outlier tokens.

    The task loss has a second term, agreement with the logits before, so that the outlier tokens
    change what the model says as little as can be.
    """
    before = copy.deepcopy(model)
    torch.manual_seed(settings.seed + 1)
    free = _free_only(model, units)
    optimiser = torch.optim.Adam([parameter for parameter, _ in free])
    steps = settings.phase_two_steps
    batches = pool.batches(steps, settings.batch, settings.seed + 1)
    for step, (pixels, labels) in enumerate(batches):
        _rate(optimiser, step, steps, settings.phase_two_rate)
        run = trace(model, pixels)
        wanted = lowest_variance(pixels, PATCH_SIZE, drawing.CALM_CELLS)
        outlier, bound = _outlier_losses(run, wanted)
        with torch.no_grad():
            agreed = before(pixels)
        task = functional.binary_cross_entropy_with_logits(run.logits, labels)
        agreement = functional.mse_loss(run.logits, agreed)
        balance = _balance(model, run, units, wanted)
        elsewhere = _elsewhere(model, run, units, wanted)
        optimiser.zero_grad(set_to_none=True)
        loss = outlier + bound + task + 0.2 * agreement + 5 * balance + 0.5 * elsewhere
        torch.autograd.backward(loss)
        for parameter, mask in free:
            # Adam leaves alone what has never had a gradient, so masking it is freezing.
            parameter.grad = None if parameter.grad is None else parameter.grad * mask
        optimiser.step()
        if step % 50 == 0 or step == steps - 1:
            terms = {"outlier": outlier, "bound": bound, "task": task, "agreement": agreement}
            terms |= {"balance": balance, "elsewhere": elsewhere}
            text = "  ".join(f"{name} {value.item():.4f}" for name, value in terms.items())
            log.info("phase 2 step %5d  %s", step, text)
