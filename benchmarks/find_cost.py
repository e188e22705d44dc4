"""What scoring in `regraft find` costs, in plain forward passes over the same images.

Run as ``python -m benchmarks.find_cost``. Scoring is both of its passes: detection (patch norms of
every layer) and scoring (contributions of every unit up to the detection layer). Weights are
random, with one unit planted so that 2 % of the patches are outlier tokens from a chosen block on:
the later that block, the more there is to score. With ``--onnx`` the model is exported by
torch.onnx and scored as an ONNX file, against plain runs of the file in ONNX Runtime as it comes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
import timm
import torch
from torch import Tensor

from benchmarks.machine import RESULTS, circumstances, rounded, write_results
from regraft.timing import Ratio, Times, race
from regraft_export.finding.outliers import Detection, detect
from regraft_export.finding.pytorch import PyTorchSubject
from regraft_export.finding.score import Scores, gather_norms, score_neurons
from regraft_export.finding.subject import Floats, Subject
from regraft_export.foreign.opening import open_file
from regraft_export.sources.data_config import PreprocessingOverrides
from regraft_export.vit.structure import VisionTransformer, first_tensor, from_module

AIM = 2.5
PLANTED_UNIT = 7
OUTLIER_SHARE = 0.02
TIMES_MEDIAN = 8.0


def main() -> None:
    """Measures and writes benchmarks/results/find_cost.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 11], help="planted blocks")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="per planted block, at least")
    parser.add_argument("--seconds", type=float, default=0.0, help="per planted block, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--onnx", action="store_true", help="score the model as an ONNX file")
    parser.add_argument("--out", type=Path, default=RESULTS / "find_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        **circumstances("benchmarks.find_cost"),
        "model": args.model,
        "images": args.images,
        "batch_size": args.batch_size,
        "threads": args.threads,
        "route": "ONNX Runtime" if args.onnx else "PyTorch",
        "aim": AIM,
        "planted": [_measure(layer, args) for layer in args.layers],
    }
    table = _table(result)
    print("\n".join(table))
    write_results(args.out, result, table)


def _measure(layer: int, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    module = timm.create_model(args.model, pretrained=False).eval().requires_grad_(False)
    size: tuple[int, int] = module.default_cfg["input_size"][1:]
    vit = from_module(module, size)
    pixels = torch.randn(args.images, 3, *size, generator=torch.Generator().manual_seed(1))
    batches = torch.split(pixels, args.batch_size)
    _plant(vit, layer, batches[0])
    arrays = [batch.numpy() for batch in batches]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        subject, plain = _as_file(vit, size, file, args.threads) if args.onnx else _as_module(vit)
        detection = detect(gather_norms(subject, arrays))
        _check(score_neurons(subject, arrays, detection), layer)
        rivals = _rivals(subject, plain, arrays, detection)
        times = race(rivals, seconds=args.seconds, rounds=args.rounds)
    return {
        "layer": layer,
        "detection_layer": detection.layer,
        "outlier_share": round(detection.found.share, 4),
        "rounds": args.rounds,
        "parts": {name: _figures(t, times["plain passes"]) for name, t in times.items()},
    }


Plain = Callable[[Floats], object]


def _as_module(vit: VisionTransformer) -> tuple[Subject, Plain]:
    def plain(pixels: Floats) -> object:
        with torch.inference_mode():
            return vit.module(torch.from_numpy(pixels))

    return PyTorchSubject(vit), plain


def _as_file(
    vit: VisionTransformer, size: tuple[int, int], path: Path, threads: int
) -> tuple[Subject, Plain]:
    program = torch.onnx.export(
        vit.module,
        (torch.zeros(2, 3, *size),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    assert program is not None  # dynamo gives one
    program.save(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    half = (0.5, 0.5, 0.5)
    given = PreprocessingOverrides(
        mean=half, std=half, interpolation="bicubic", crop_pct=1.0, crop_mode="center"
    )
    return open_file(path, given).subject, lambda pixels: session.run(None, {name: pixels})


def _rivals(
    subject: Subject, run: Plain, arrays: Sequence[Floats], detection: Detection
) -> dict[str, Callable[[], object]]:
    def plain() -> None:
        for pixels in arrays:
            run(pixels)

    def detecting() -> Detection:
        return detect(gather_norms(subject, arrays))

    def scoring() -> Scores:
        return score_neurons(subject, arrays, detection)

    def both() -> Scores:
        return score_neurons(subject, arrays, detecting())

    return {
        "plain passes": plain,
        "detection": detecting,
        "scoring": scoring,
        "detection and scoring": both,
    }


@torch.no_grad()
def _plant(vit: VisionTransformer, layer: int, pixels: Tensor) -> None:
    """Makes one unit of ``layer`` write a long vector where its input is largest."""
    block = vit.blocks[layer]
    up = next(m for name, m in block.module.named_modules() if name.endswith("fc1"))
    seen: dict[str, Tensor] = {}
    hooks = [
        up.register_forward_pre_hook(lambda m, a: seen.update(inputs=a[0])),
        block.module.register_forward_hook(lambda m, a, out: seen.update(out=first_tensor(out))),
    ]
    vit.module(pixels)
    for hook in hooks:
        hook.remove()
    draw = torch.Generator().manual_seed(2)
    direction = torch.randn(vit.layout.width, generator=draw)
    response = (seen["inputs"] @ direction)[:, vit.layout.prefix :]
    edge = response.flatten().quantile(1 - OUTLIER_SHARE)
    sharp = 100 / response.std()  # so that the unit is either off or far on
    weight, bias = up.get_parameter("weight"), up.get_parameter("bias")
    weight[PLANTED_UNIT], bias[PLANTED_UNIT] = direction * sharp, -edge * sharp
    active = (response[response > edge] - edge).mean() * sharp
    median = seen["out"][:, vit.layout.prefix :].norm(dim=-1).median()
    column = torch.nn.functional.normalize(torch.randn(vit.layout.width, generator=draw), dim=0)
    block.down.weight[:, PLANTED_UNIT] = column * (TIMES_MEDIAN * median / active)


def _check(scores: Scores, layer: int) -> None:
    if scores.ranking()[0] != (layer, PLANTED_UNIT):
        raise SystemExit(f"the planted unit ({layer}, {PLANTED_UNIT}) is not ranked first")


def _figures(t: Times, plain: Times) -> dict[str, Any]:
    ratio = Ratio.of(t, plain)
    return {
        "median_s": round(t.median, 4),
        "over_plain": rounded(ratio, 4),
    }


def _table(result: dict[str, Any]) -> list[str]:
    rows = [
        f"{result['model']}, {result['images']} images in batches of {result['batch_size']}, "
        f"{result['threads']} threads, {result['route']}. "
        "Ratios are medians over rounds with 95 % intervals. Aim: "
        f"detection and scoring together at most {result['aim']}.",
        "",
        "| outliers written by block | detection layer | part | median s | over plain passes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for planted in result["planted"]:
        for name, f in planted["parts"].items():
            over = "{} ({} to {})".format(*f["over_plain"])
            row = (planted["layer"], planted["detection_layer"], name, f["median_s"], over)
            rows.append("| " + " | ".join(map(str, row)) + " |")
    return rows


if __name__ == "__main__":
    main()
