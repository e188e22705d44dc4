"""Which form of the graph for CUDA is fastest: every choice of the redirect and of the rewrites.

Run as ``python -m benchmarks.cuda_forms`` on a machine with a card. For one model and precision it
makes the baseline and the patched graph in every form, and times them in one process, in an order
that changes every round; what they return is compared with the portable graph. Times are the
card's own, of several runs in a row, without copies. A result file that exists is continued: batch
sizes that it has with the same settings are not measured again, so that short sessions add up.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import vits
from benchmarks.cuda_graphs import (
    BASELINE,
    CONSTANT,
    OUTPUT,
    PER_NEURON,
    Form,
    enough_runs,
    expect_equal,
    open_cuda,
    write_forms,
    write_portable,
)
from benchmarks.machine import RESULTS, circumstances, rounded, write_results
from regraft.timing import Ratio, compare
from regraft_export.graph.cuda.choices import Choices
from regraft_export.trace import trace
from regraft_export.vit.structure import VisionTransformer

FORMS = {
    BASELINE: Form(None),
    "residual, topk": Form(PER_NEURON, Choices(write="residual", maximum="topk")),
    "residual, reduce": Form(PER_NEURON, Choices(write="residual", maximum="reduce")),
    "wide, topk": Form(PER_NEURON, Choices(write="wide", maximum="topk")),
    "row, topk": Form(PER_NEURON, Choices(write="row", maximum="topk")),
    "added, topk": Form(PER_NEURON, Choices(write="added", maximum="topk")),
    "operators": Form(PER_NEURON, Choices(operators=True)),
    "operators, baseline": Form(None, Choices(operators=True)),
    "operators, constant": Form(CONSTANT, Choices(operators=True)),
    "constant, residual": Form(CONSTANT, Choices(write="residual", constants="residual")),
    "constant, wide": Form(CONSTANT, Choices(write="wide")),
    "constant, added": Form(CONSTANT, Choices(write="residual", constants="added")),
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
    parser.add_argument("--out", type=Path, default=RESULTS / "cuda_forms.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    vit = vits.load(args.model, args.image_size, args.depth)
    neurons = vits.some_neurons(vit, args.touched, args.neurons)
    settings = {
        "model": args.model,
        "image_size": list(vits.image_size(vit)),
        "tokens": vit.layout.count,
        "blocks": vit.layout.depth,
        "precision": args.precision,
        "touched_layers": args.touched,
        "neurons": args.neurons,
    }
    models = _known(args.out)
    result = next((m for m in models if {k: m.get(k) for k in settings} == settings), None)
    if result is None:
        result = {**circumstances("benchmarks.cuda_forms"), **settings, "batches": []}
        models.append(result)
    done = {batch["batch"] for batch in result["batches"]}
    with tempfile.TemporaryDirectory() as folder:
        size = vits.image_size(vit)
        exact = trace(vit, size)
        half = exact if args.precision == "fp32" else trace(vit, size, args.precision)
        write_forms(Path(folder), half, neurons, FORMS)
        write_portable(Path(folder), exact, neurons)
        for batch in [b for b in args.batch_sizes if b not in done]:
            result["batches"].append(_measure(Path(folder), vit, batch, args))
            whole = {**circumstances("benchmarks.cuda_forms"), "models": models}
            write_results(args.out, whole, [line for m in models for line in ["", *_table(m)]])
    print("\n".join(_table(result)))


def _known(path: Path) -> list[dict[str, Any]]:
    """What was measured before, a part for each of the settings."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["models"] if path.exists() else []
    return found


def _measure(
    folder: Path, vit: VisionTransformer, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    drawn = np.random.default_rng(batch).normal(size=(batch, 3, *vits.image_size(vit)))
    pixels = drawn.astype(np.float32)
    engines = {name: open_cuda(folder, name, args.precision) for name in FORMS}
    expect_equal(folder, engines, FORMS, pixels)
    runs = {}
    for name, engine in engines.items():
        engine.run(pixels, [OUTPUT])  # what is in its buffers is what is timed
        runs[name] = enough_runs(engine, batch)

    def rival(name: str) -> Callable[[], float]:
        return lambda: engines[name].device_seconds(batch, runs[name])

    times = compare({n: rival(n) for n in FORMS}, seconds=args.seconds, rounds=args.rounds)
    details = engines[BASELINE].details()
    for engine in engines.values():
        engine.close()
    rows = {}
    for name, t in times.items():
        over = Ratio.of(t, times[BASELINE])
        rows[name] = {
            "median_ms": round(t.median * 1e3, 4),
            "over_baseline": rounded(over, 4),
        }
    rounds = len(times[BASELINE].seconds)
    return {"batch": batch, "rounds": rounds, "engine": details, "forms": rows}


def _table(result: dict[str, Any]) -> list[str]:
    details = result["batches"][0]["engine"]
    rows = [
        f"{result['model']}, {result['tokens']} tokens, {result['blocks']} blocks, "
        f"{result['precision']}, {result['neurons']} neurons in layers "
        f"{result['touched_layers']}; {details['device']}, onnxruntime "
        f"{details['onnxruntime']}. Times by the card's clock, runs in a row, without copies; "
        "ratios are medians over rounds with 95 % intervals.",
        "",
        "| batch | form | median ms | time over baseline |",
        "| --- | --- | --- | --- |",
    ]
    for batch in result["batches"]:
        for name, f in batch["forms"].items():
            over = "{} ({} to {})".format(*f["over_baseline"])
            row = (batch["batch"], name, f["median_ms"], over)
            rows.append("| " + " | ".join(map(str, row)) + " |")
    return rows


if __name__ == "__main__":
    main()
