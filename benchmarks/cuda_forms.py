"""Which form of the graph for CUDA is fastest: every choice of the redirect and of the rewrites.

Run as ``python -m benchmarks.cuda_forms`` on a machine with a card. For one model and precision it
makes the baseline and the patched graph in every form, and times them in one process, in an order
that changes every round; what they return is compared with the portable graph. A result file that
exists is continued: batch sizes it has are not measured again, so that short sessions add up.
``--engine ort-cpu`` tries the script without a card, and says nothing about CUDA.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray

from benchmarks.machine import RESULTS, circumstances, write_results
from regraft.engines import Engine, EngineOptions, open_engine
from regraft.neurons import Neurons, RegisterNeuron
from regraft.parity import LIMITS
from regraft.redirect import RedirectOptions
from regraft.timing import Ratio, race
from regraft_export.graph.cuda.fuse import Choices, fuse, prepare
from regraft_export.graph.patch import Patch, Traced, Wanted, build
from regraft_export.trace import trace
from regraft_export.vit.structure import VisionTransformer, from_module
from regraft_export.weights_file import WeightsFile

Array = NDArray[np.float32]
BASELINE = "baseline"
OUTPUT = "last_hidden_state"
PER_NEURON, CONSTANT = RedirectOptions(), RedirectOptions("constant")
# Name -> redirect (None: unpatched) and form.
FORMS: dict[str, tuple[RedirectOptions | None, Choices]] = {
    BASELINE: (None, Choices()),
    "baseline, biases kept": (None, Choices(biases=False)),
    "baseline, convolution": (None, Choices(patches=False, tokens=False)),
    "row, topk": (PER_NEURON, Choices("row", "topk")),
    "row, reduce": (PER_NEURON, Choices("row", "reduce")),
    "wide, topk": (PER_NEURON, Choices("wide", "topk")),
    "wide, reduce": (PER_NEURON, Choices("wide", "reduce")),
    "added, topk": (PER_NEURON, Choices("added", "topk")),
    "added, reduce": (PER_NEURON, Choices("added", "reduce")),
    "constant, added": (CONSTANT, Choices("added")),
    "constant, wide": (CONSTANT, Choices("wide")),
}


def main() -> None:
    """Measures and writes the result, JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name")
    parser.add_argument("--image-size", type=int, help="pixels (default: the model's)")
    parser.add_argument("--depth", type=int, help="fewer blocks, to try the script")
    parser.add_argument("--precision", default="fp16", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--touched", type=int, nargs="+", default=[4, 5, 6], help="layers")
    parser.add_argument("--neurons", type=int, default=10, help="in all")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--seconds", type=float, default=20.0, help="per batch size")
    parser.add_argument("--rounds", type=int, default=20, help="per batch size, at least")
    parser.add_argument("--engine", default="ort-cuda", choices=["ort-cuda", "ort-cpu"])
    parser.add_argument("--out", type=Path, default=RESULTS / "cuda_forms.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    vit = _model(args)
    neurons = _neurons(vit, args.touched, args.neurons)
    result = _known(args.out) or {
        **circumstances("benchmarks.cuda_forms"),
        "model": args.model,
        "precision": args.precision,
        "engine": args.engine,
        "touched_layers": args.touched,
        "batches": [],
    }
    done = {batch["batch"] for batch in result["batches"]}
    with tempfile.TemporaryDirectory() as folder:
        exact = trace(vit, _size(vit))
        half = exact if args.precision == "fp32" else trace(vit, _size(vit), args.precision)
        _write(Path(folder), exact, half, neurons)
        for batch in [b for b in args.batch_sizes if b not in done]:
            result["batches"].append(_measure(Path(folder), vit, batch, args))
            write_results(args.out, result, _table(result))
    print("\n".join(_table(result)))


def _known(path: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def _model(args: argparse.Namespace) -> VisionTransformer:
    options: dict[str, Any] = {"img_size": args.image_size} if args.image_size else {}
    if args.depth:
        options["depth"] = args.depth
    module = timm.create_model(args.model, pretrained=False, num_classes=0, **options)
    size = (args.image_size,) * 2 if args.image_size else module.default_cfg["input_size"][1:]
    return from_module(module.eval().requires_grad_(False), tuple(size))


def _size(vit: VisionTransformer) -> tuple[int, int]:
    embed: Any = vit.module.patch_embed
    height, width = embed.img_size
    return int(height), int(width)


def _neurons(vit: VisionTransformer, layers: list[int], count: int) -> Neurons:
    rng = np.random.default_rng(0)
    hidden = vit.blocks[0].down.in_features
    chosen = [(layers[i % len(layers)], int(rng.integers(hidden))) for i in range(count)]
    return Neurons(tuple(RegisterNeuron(a, b, value=1.0) for a, b in dict.fromkeys(chosen)))


def _write(folder: Path, exact: Traced, traced: Traced, neurons: Neurons) -> None:
    """The forms in the precision that is timed, and what they must yield, in float32."""
    with WeightsFile(folder) as weights:
        for name, (redirect, choices) in FORMS.items():
            patch = None if redirect is None else Patch(neurons, redirect)
            proto = fuse(prepare(traced, choices), patch, Wanted(), choices).proto
            weights.save(proto, f"{name}.cuda.onnx")
        for name, redirect in (("per-neuron", PER_NEURON), ("constant", CONSTANT)):
            weights.save(build(exact, Patch(neurons, redirect), Wanted()).proto, f"{name}.onnx")
        weights.save(build(exact, None, Wanted()).proto, "None.onnx")


def _measure(
    folder: Path, vit: VisionTransformer, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    drawn = np.random.default_rng(batch).normal(size=(batch, 3, *_size(vit)))
    pixels = drawn.astype(np.float32)
    engines = {name: _open(folder / f"{name}.cuda.onnx", args) for name in FORMS}
    _check(folder, engines, pixels, args)

    def rival(engine: Engine) -> Callable[[], Array]:
        return lambda: engine.run(pixels, [OUTPUT])[OUTPUT]

    times = race(
        {name: rival(engine) for name, engine in engines.items()},
        seconds=args.seconds,
        rounds=args.rounds,
    )
    for engine in engines.values():
        engine.close()
    rows = {}
    for name, t in times.items():
        over = Ratio.of(t, times[BASELINE])
        rows[name] = {
            "median_ms": round(t.median * 1e3, 4),
            "p99_ms": round(t.p99 * 1e3, 4),
            "over_baseline": [round(x, 4) for x in (over.median, over.low, over.high)],
        }
    return {"batch": batch, "rounds": len(times[BASELINE].seconds), "forms": rows}


def _open(path: Path, args: argparse.Namespace) -> Engine:
    return open_engine(path, args.engine, precision=args.precision, options=EngineOptions())


def _check(
    folder: Path, engines: dict[str, Engine], pixels: Array, args: argparse.Namespace
) -> None:
    """Every form equals the portable graph in float32, or nothing is timed."""
    limit = LIMITS[args.precision].relative_error
    for name, (redirect, _) in FORMS.items():
        portable = folder / f"{None if redirect is None else redirect.value}.onnx"
        with open_engine(portable, "ort-cpu") as engine:
            right = engine.run(pixels[:2], [OUTPUT])[OUTPUT]
        got = engines[name].run(pixels[:2], [OUTPUT])[OUTPUT]
        error = np.linalg.norm(got - right) / np.linalg.norm(right)
        if not error <= limit:
            raise SystemExit(f"{name} differs from the portable graph by {error:.1e}")


def _table(result: dict[str, Any]) -> list[str]:
    rows = [
        f"{result['model']}, {result['precision']}, {result['engine']}, layers "
        f"{result['touched_layers']} touched. Times include copies in and out; ratios are medians "
        "over rounds with 95 % intervals.",
        "",
        "| batch | form | median ms | p99 ms | time over baseline |",
        "| --- | --- | --- | --- | --- |",
    ]
    for batch in result["batches"]:
        for name, f in batch["forms"].items():
            over = "{} ({} to {})".format(*f["over_baseline"])
            row = (batch["batch"], name, f["median_ms"], f["p99_ms"], over)
            rows.append("| " + " | ".join(map(str, row)) + " |")
    return rows


if __name__ == "__main__":
    main()
