"""The CPU engines side by side: ort-cpu, and openvino in fp32 and bf16, patched and unpatched.

Run as ``python -m benchmarks.cpu_engines``. All rivals run in one process, in an order that changes
every round; what they return is checked. Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray

from benchmarks.machine import RESULTS, circumstances, rounded, write_results
from regraft.engines import Engine, EngineOptions, engine_class, open_engine
from regraft.neurons import Neurons, RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft.timing import Ratio, Times, race
from regraft_export.graph.patch import Patch, Wanted, build
from regraft_export.trace import trace
from regraft_export.vit.structure import from_module
from regraft_export.weights_file import WeightsFile

Array = NDArray[np.float32]
BASELINE, PATCHED = "baseline", "patched"
OUTPUT = "last_hidden_state"
# Relative Frobenius error to ort-cpu: the limits of `regraft verify`.
LIMITS = {"fp32": 1e-4, "bf16": 2e-2}


def main() -> None:
    """Measures and writes benchmarks/results/cpu_engines.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name")
    parser.add_argument("--touched", type=int, nargs="+", default=[4, 5, 6], help="layers")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=60.0, help="per batch size")
    parser.add_argument("--rounds", type=int, default=20, help="per batch size, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_engines.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        size = _write(args.model, args.touched, Path(folder))
        engines = _engines(Path(folder), EngineOptions(args.threads, spinning=True))
        result: dict[str, Any] = {
            **circumstances("benchmarks.cpu_engines"),
            "model": args.model,
            "touched_layers": args.touched,
            "threads": args.threads,
            "engines": {name: engine.details() for name, engine in engines.items()},
            "batches": [],
        }
        for batch in args.batch_sizes:
            pixels = np.random.default_rng(batch).normal(size=(batch, 3, *size))
            result["batches"].append(_measure(engines, pixels.astype(np.float32), args))
    table = _table(result)
    print("\n".join(table))
    write_results(args.out, result, table)


def _write(model: str, layers: list[int], folder: Path) -> tuple[int, int]:
    """Both graphs, with two neurons a touched layer; returns (H, W)."""
    module = timm.create_model(model, pretrained=False).eval().requires_grad_(False)
    size: tuple[int, int] = module.default_cfg["input_size"][1:]
    traced = trace(from_module(module, size), size)
    neurons = Neurons(tuple(RegisterNeuron(i, index) for i in layers for index in (7, 70)))
    with WeightsFile(folder) as weights:
        for name, patch in ((BASELINE, None), (PATCHED, Patch(neurons, RedirectOptions()))):
            weights.save(build(traced, patch, Wanted()).proto, f"{name}.onnx")
    return size


def _engines(folder: Path, options: EngineOptions) -> dict[str, Engine]:
    """Rival -> engine: the graph it runs is the last word of its name."""
    engines: dict[str, Engine] = {}
    for graph in (BASELINE, PATCHED):
        path = folder / f"{graph}.onnx"
        engines[f"ort-cpu fp32 {graph}"] = open_engine(path, "ort-cpu", options=options)
        openvino = engine_class("openvino")
        for precision in LIMITS:
            if reason := openvino.unavailable(precision):
                print(f"openvino {precision}: left out: {reason}")
                continue
            built = folder / f"{graph}-{precision}"
            built.mkdir()
            openvino.build(path, precision, {}, built, lambda what, done, of: None)
            engines[f"openvino {precision} {graph}"] = openvino(path, precision, options, built)
    return engines


def _measure(engines: dict[str, Engine], pixels: Array, args: argparse.Namespace) -> dict[str, Any]:
    expected = {
        graph: engines[f"ort-cpu fp32 {graph}"].run(pixels) for graph in (BASELINE, PATCHED)
    }
    errors: dict[str, float] = dict.fromkeys(engines, 0.0)

    def check(name: str, output: object) -> None:
        _, precision, graph = name.split()
        right = expected[graph][OUTPUT]
        error = float(np.linalg.norm(np.asarray(output) - right) / np.linalg.norm(right))
        errors[name] = max(errors[name], error)
        if not error <= LIMITS[precision]:
            raise SystemExit(f"{name} differs from ort-cpu by {error:.1e} while it is timed")

    rivals: dict[str, Callable[[], object]] = {
        name: lambda engine=engine: engine.run(pixels, [OUTPUT])[OUTPUT]  # type: ignore[misc]
        for name, engine in engines.items()
    }
    times = race(rivals, seconds=args.seconds, rounds=args.rounds, check=check)
    return {
        "batch": len(pixels),
        "rounds": len(next(iter(times.values())).seconds),
        "rivals": {name: _figures(name, t, times, errors[name]) for name, t in times.items()},
    }


def _figures(name: str, t: Times, times: dict[str, Times], error: float) -> dict[str, Any]:
    engine, precision, graph = name.split()
    over_ort = Ratio.of(t, times[f"ort-cpu fp32 {graph}"])
    over_baseline = Ratio.of(t, times[f"{engine} {precision} {BASELINE}"])
    return {
        "median_ms": round(t.median * 1e3, 3),
        "p99_ms": round(t.p99 * 1e3, 3),
        "over_ort_cpu": rounded(over_ort, 4),
        "over_own_baseline": rounded(over_baseline, 4),
        "relative_error_to_ort_cpu": float(f"{error:.2g}"),
    }


def _table(result: dict[str, Any]) -> list[str]:
    rows = [
        f"{result['model']}, two neurons in each of {len(result['touched_layers'])} layers, "
        f"{result['threads']} threads. Ratios are medians over rounds with 95 % intervals; the "
        "error is the relative Frobenius error of last_hidden_state to ort-cpu on the same graph.",
        "",
        "| batch | engine, precision, graph | median ms | over ort-cpu | over its own baseline "
        "| error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for batch in result["batches"]:
        for name, f in batch["rivals"].items():
            ratios = [
                "{} ({} to {})".format(*f[key]) for key in ("over_ort_cpu", "over_own_baseline")
            ]
            row = (batch["batch"], name, f["median_ms"], *ratios, f["relative_error_to_ort_cpu"])
            rows.append("| " + " | ".join(map(str, row)) + " |")
    return rows


if __name__ == "__main__":
    main()
