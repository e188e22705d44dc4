"""Trains the shipped ViT: `python -m regraft_export.demo.train --out DIR`.

Phase one is plain training on drawn pictures until the task works, with a mild penalty on norm
spread so that no outlier tokens appear by themselves, and at its end two throwaway linear probes
that make calm patches tell themselves apart linearly. Phase two freezes everything except the fc1
rows, fc1 biases and fc2 columns of twelve hidden units drawn at random in two middle blocks, and
asks by hinge losses, beside the task loss, for a norm of six times the median at the two patches
of lowest variance, for every other token to stay below a bound, and for each unit to do its share.
The result has what real ViTs have, outlier tokens written by register neurons (arXiv 2506.08010),
but with the neurons known. A GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from regraft_export.demo import drawing
from regraft_export.demo.measure import (
    OUTLIER,
    Trace,
    Unit,
    contributions,
    detection_layer,
    negative_units,
    outlier_figures,
    redirected,
    silenced,
    trace,
)
from regraft_export.demo.phases import PATCHES, Settings, draw_units, phase_one, phase_two, settle
from regraft_export.demo.pool import Pool, draw_pool
from regraft_export.demo.vit import WEIGHTS_FILE, build_vit, load_vit

log = logging.getLogger("train")
HOW = (
    "Trained for regraft's demo on procedurally drawn pictures: plainly first, then with "
    "everything frozen except twelve MLP units in two middle blocks, with hinge losses asking for "
    "outlier tokens of six times the median norm at the two patches of lowest variance."
)


@torch.no_grad()
def label_accuracy(model: nn.Module, pool: Pool) -> float:
    """Mean per-label accuracy over the pool."""
    hits = []
    everything = torch.arange(len(pool.targets), device=pool.targets.device)
    for choice in torch.split(everything, 256):
        pixels, targets = pool.batch(choice)
        hits.append(((model(pixels) > 0) == (targets > 0.5)).float().mean(dim=1))
    return float(torch.cat(hits).mean())


@torch.no_grad()
def report(model: nn.Module, pool: Pool, units: list[Unit], name: str) -> None:
    """Logs the token norms on 256 pictures and, where there are outlier tokens, who writes them."""
    pixels, _ = pool.first(256)
    plain = trace(model, pixels)
    ratios = plain.ratios(PATCHES)
    layer = detection_layer(plain, PATCHES)
    log.info("%s: label accuracy %.4f", name, label_accuracy(model, pool))
    log.info("  largest patch norm over median, by block: %s", _largest(ratios[:, :, 1:]))
    log.info(
        "  largest class token norm over median patch norm: %.2f", ratios[:, :, 0].max().item()
    )
    if bool((ratios[layer, :, 1:] > OUTLIER).any()):
        log.info("  at block %d: %s", layer, _text(outlier_figures(ratios, layer)))
        _report_units(model, plain, units, layer)
        _report_changes(model, pool, plain, units, layer)


def _report_units(model: nn.Module, plain: Trace, units: list[Unit], layer: int) -> None:
    score = contributions(model, plain, layer, PATCHES)
    best = score.flatten().argsort(descending=True)[: len(units)].tolist()
    true = [divmod(index, score.shape[1]) in units for index in best]
    log.info("  of the best %d units by contribution, %d are true", len(true), sum(true))
    shares = torch.stack([score[unit] for unit in units])
    log.info("  contributions of the true units: %s", [round(s, 1) for s in shares.tolist()])


def _report_changes(
    model: nn.Module, pool: Pool, plain: Trace, units: list[Unit], layer: int
) -> None:
    with silenced(model, units):
        ratios = trace(model, plain.pixels).ratios(PATCHES)
        log.info("units silenced: label accuracy %.4f", label_accuracy(model, pool))
        log.info("  largest patch norm over median, by block: %s", _largest(ratios[:, :, 1:]))
    with redirected(model, units, negative_units(plain, units, PATCHES)):
        moved = trace(model, plain.pixels)
        log.info("units redirected: label accuracy %.4f", label_accuracy(model, pool))
    log.info(
        "  largest patch norm over median, by block: %s", _largest(moved.patch_ratios(PATCHES))
    )
    cosine = functional.cosine_similarity(moved.logits, plain.logits)
    log.info("  cosine of the logits: median %.4f, lowest %.4f", cosine.median(), cosine.min())
    norms = moved.outputs[layer].norm(dim=2)
    register = norms[:, -1] / norms[:, 1 : 1 + PATCHES].median(dim=1).values
    log.info("  register's norm over median patch norm: %.2f", register.mean().item())


def _largest(ratios: Tensor) -> list[float]:
    return [round(value, 2) for value in ratios.amax(dim=(1, 2)).tolist()]


def _text(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items())


def save(model: nn.Module, units: list[Unit], settings: Settings, path: Path) -> None:
    """Writes the weights as fp16, with the truth in the metadata for the tests."""
    tensors = {name: value.half().cpu().contiguous() for name, value in model.state_dict().items()}
    metadata = {"true_units": json.dumps(units), "seed": str(settings.seed), "training": HOW}
    save_file(tensors, path, metadata=metadata)


def write_samples(folder: Path) -> None:
    """Draws the 64 sample pictures, in sizes that exercise the preprocessing."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in drawing.SAMPLE_SEEDS:
        picture, _ = drawing.draw(seed, drawing.sample_size(seed))
        Image.fromarray(picture).save(folder / f"{seed:02d}.png", optimize=True)


def main() -> None:
    """Runs both phases; with `--resume` phase one is taken from the folder, and the log goes on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, log, samples")
    parser.add_argument(
        "--resume", action="store_true", help="start from DIR/phase_one.safetensors"
    )
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    mode = "a" if args.resume else "w"
    handlers: list[logging.Handler] = [
        logging.FileHandler(out / "train.log", mode=mode),
        logging.StreamHandler(),
    ]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    torch.set_float32_matmul_precision("high")
    settings = Settings()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pool = draw_pool(drawing.TRAINING_SEEDS, device)
    held_out = draw_pool(drawing.HELD_OUT_SEEDS, device)
    torch.manual_seed(settings.seed)
    model = build_vit().to(device)
    units = draw_units(settings.seed)
    if args.resume:
        model.load_state_dict(load_file(out / "phase_one.safetensors"))
    else:
        log.info("%s, torch %s on %s", settings, torch.__version__, device.type)
        phase_one(model, pool, settings)
        settle(model, pool, settings)
        save_file(model.state_dict(), out / "phase_one.safetensors")
        report(model.eval(), held_out, units, "after phase one")
    phase_two(model.eval(), pool, settings, units)
    save(model, units, settings, out / WEIGHTS_FILE)
    write_samples(out / "samples")
    report(load_vit(out / WEIGHTS_FILE).to(device), held_out, units, "after phase two, as stored")


if __name__ == "__main__":
    main()
