"""Whether the rewrites for ort-cuda would gain anything on the CPU engines, each left out in turn.

Run as ``python -m benchmarks.cpu_rewrites``. The patched graph in float32: as it is exported for
these engines, with every rewrite of ``model.cuda.onnx``, and with every rewrite but one. All rivals
of an engine run in one process, in an order that changes every round; what they return is checked
against the portable graph. An engine that refuses a graph is said to.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import vits
from benchmarks.cuda_graphs import OUTPUT, PER_NEURON, Array, check_error
from benchmarks.machine import RESULTS, circumstances, rounded, write_results
from regraft.engines import Engine, EngineOptions, engine_class, open_engine
from regraft.errors import EngineError
from regraft.timing import Ratio, race
from regraft_export.graph.cuda.choices import Choices
from regraft_export.graph.cuda.fuse import fuse, prepare
from regraft_export.graph.patch import Patch, Wanted, build
from regraft_export.trace import trace
from regraft_export.weights_file import WeightsFile

PORTABLE, ALL = "portable", "all rewrites"
# Registers are cut off in the graph: only the runner of ort-cuda copies parts.
FORMS = {
    ALL: Choices(whole=False),
    "without patches as a product": Choices(whole=False, patches=False),
    "without one Pad and one constant": Choices(whole=False, tokens=False),
    "without moved biases": Choices(whole=False, biases=False),
    "without the redirect's form": Choices(whole=False, write="added", maximum="reduce"),
}


def main() -> None:
    """Measures and writes benchmarks/results/cpu_rewrites.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name")
    parser.add_argument("--depth", type=int, help="fewer blocks, to try the script")
    parser.add_argument("--touched", type=int, nargs="+", default=[4, 5, 6], help="layers")
    parser.add_argument("--neurons", type=int, default=10, help="in all")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=40.0, help="per engine and batch size")
    parser.add_argument(
        "--rounds", type=int, default=10, help="per engine and batch size, at least"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_rewrites.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        **circumstances("benchmarks.cpu_rewrites"),
        "model": args.model,
        "touched_layers": args.touched,
        "threads": args.threads,
        "cells": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        size = _write(Path(folder), args)
        options = EngineOptions(args.threads, spinning=True)
        for engine in ("ort-cpu", "openvino"):
            engines, refused = _engines(Path(folder), engine, options)
            for batch in args.batch_sizes:
                pixels = np.random.default_rng(batch).normal(size=(batch, 3, *size))
                cell = _measure(engines, pixels.astype(np.float32), args)
                result["cells"].append({"engine": engine, "refused": refused, **cell})
            for opened in engines.values():
                opened.close()
    table = _table(result)
    print("\n".join(table))
    write_results(args.out, result, table)


def _write(folder: Path, args: argparse.Namespace) -> tuple[int, int]:
    vit = vits.load(args.model, depth=args.depth)
    size = vits.image_size(vit)
    traced = trace(vit, size)
    patch = Patch(vits.some_neurons(vit, args.touched, args.neurons), PER_NEURON)
    with WeightsFile(folder) as weights:
        weights.save(build(traced, patch, Wanted()).proto, f"{PORTABLE}.onnx")
        for name, choices in FORMS.items():
            fused = fuse(prepare(traced, choices), patch, Wanted(), choices)
            weights.save(fused.proto, f"{name}.onnx")
    return size


def _engines(
    folder: Path, kind: str, options: EngineOptions
) -> tuple[dict[str, Engine], dict[str, str]]:
    """Rival -> engine, and rival -> why there is none."""
    engines: dict[str, Engine] = {}
    refused: dict[str, str] = {}
    for name in (PORTABLE, *FORMS):
        graph, built = folder / f"{name}.onnx", None
        try:
            if engine_class(kind).is_built:
                built = folder / f"{name}-{kind}"
                built.mkdir()
                engine_class(kind).build(graph, "fp32", {}, built, lambda what, done, of: None)
            engines[name] = open_engine(graph, kind, options=options, built=built)
        except EngineError as error:
            refused[name] = str(error)[:300]
    return engines, refused


def _measure(engines: dict[str, Engine], pixels: Array, args: argparse.Namespace) -> dict[str, Any]:
    right = engines[PORTABLE].run(pixels, [OUTPUT])[OUTPUT]

    def check(name: str, output: object) -> None:
        check_error(name, np.asarray(output, np.float32), right, "fp32")

    rivals: dict[str, Callable[[], object]] = {
        name: lambda engine=engine: engine.run(pixels, [OUTPUT])[OUTPUT]  # type: ignore[misc]
        for name, engine in engines.items()
    }
    times = race(rivals, seconds=args.seconds, rounds=args.rounds, check=check)
    rows = {}
    for name, t in times.items():
        over = Ratio.of(t, times[PORTABLE])
        rows[name] = {
            "median_ms": round(t.median * 1e3, 3),
            "over_portable": rounded(over, 4),
        }
    return {"batch": len(pixels), "rounds": len(times[PORTABLE].seconds), "rivals": rows}


def _table(result: dict[str, Any]) -> list[str]:
    rows = [
        f"{result['model']}, patched, fp32, {result['threads']} threads. Ratios are medians over "
        "rounds with 95 % intervals.",
        "",
        "| engine | batch | graph | median ms | over portable |",
        "| --- | --- | --- | --- | --- |",
    ]
    for cell in result["cells"]:
        for name, f in cell["rivals"].items():
            over = "{} ({} to {})".format(*f["over_portable"])
            row = (cell["engine"], cell["batch"], name, f["median_ms"], over)
            rows.append("| " + " | ".join(map(str, row)) + " |")
    refused = {
        f"{c['engine']} refuses: {n}: {why}"
        for c in result["cells"]
        for n, why in c["refused"].items()
    }
    return [*rows, "", *sorted(refused)] if refused else rows


if __name__ == "__main__":
    main()
