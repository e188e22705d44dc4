"""What `regraft serve` leaves of the engine's own throughput, and what it takes besides.

Run as ``python -m benchmarks.serve``, on a quiet machine: ViT-B in random weights (or
``--bundle``), float32, ``--threads`` for engine and server alike. In every round, in an order that
changes, for ``--seconds`` each: the engine alone in this process at each batch size, and the server
over HTTP and gRPC at each concurrency, one image (binary) a request, closed loop. The clients take
their share of the same cores. Ideal queueing time is concurrency / the engine's best throughput.
Idle memory and start are also given without the model: less what a process takes that does nothing
but open it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from benchmarks.machine import RESULTS, circumstances, write_results
from benchmarks.serve_load import OUTPUT, load_with, over_grpc, over_http
from benchmarks.served import Array, Served, serving
from regraft.bundle import Bundle
from regraft.engines import Engine, EngineOptions, open_graph
from regraft.neurons import Neurons, RegisterNeuron
from regraft_export.export_options import ExportOptions
from regraft_export.exporting import export_bundle
from regraft_export.outlier_level import OutlierLevel
from regraft_export.sources import load
from regraft_export.vit.structure import from_module

TOUCHED = (4, 5, 6)
AIMS = {"throughput": 0.95, "p99": 1.5, "idle_mb": 150.0, "start_s": 0.6}
# A process that opens the model and nothing else, or only what runs it: seconds and memory.
_BARE = """
import sys, time, re, numpy, onnxruntime
from pathlib import Path
from regraft.bundle import Bundle
from regraft.engines import EngineOptions, open_graph
begun = time.perf_counter()
if sys.argv[2:]:
    bundle = Bundle.open(sys.argv[1])
    engine = open_graph(bundle, "model", "ort-cpu", EngineOptions(threads=int(sys.argv[2])))
    engine.run(numpy.zeros((1, 3, *engine.size), numpy.float32), list(bundle.manifest.outputs))
took = time.perf_counter() - begun
print(took, re.search(r"^Pss:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1])
"""

_MODEL = "vit_base_patch16_224"


def vit_b() -> torch.nn.Module:
    """ViT-B/16 at 224 px in random weights, which do not change the time."""
    torch.manual_seed(0)
    module: torch.nn.Module = timm.create_model(_MODEL, num_classes=0)
    return module


def main() -> None:
    """Measures and writes benchmarks/results/serve.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=None, help="(default: ViT-B)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-batch", type=int, help="of the server (default: its own)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = args.bundle or _export(Path(folder) / "bundle")
        result = {
            **circumstances("benchmarks.serve"),
            "model": _model_of(args.bundle),
            "threads": args.threads,
            "max_batch": args.max_batch,
            "aims": AIMS,
            **_idle(bundle, Path(folder), args),
            **_throughput(bundle, Path(folder), args),
        }
    table = _table(result)
    print("\n".join(table))
    write_results(args.out, result, table)


def _export(out: Path) -> Path:
    loaded = load(f"python:{Path(__file__).resolve()}:vit_b")
    vit = from_module(loaded.module, loaded.preprocessing.image_size)
    neurons = Neurons(tuple(RegisterNeuron(i, j, value=1.0) for i in TOUCHED for j in (7, 70)))
    pixels = np.random.default_rng(0).normal(size=(2, 3, *loaded.preprocessing.image_size))
    export_bundle(
        loaded,
        vit,
        neurons,
        lambda: iter([pixels.astype(np.float32)]),
        OutlierLevel(TOUCHED[-1], 1e6),
        out,
        ExportOptions(),
    )
    return out


def _model_of(bundle: Path | None) -> str:
    """The model that is served; the own one is exported from this file, whose path says nothing."""
    if bundle is None:
        return f"timm {_MODEL}, random weights"
    return Bundle.open(bundle, verify_hashes=False).manifest.model["source"]


def _words(bundle: Path, args: argparse.Namespace) -> list[str]:
    words = [f"vit={bundle}", "--engine", "ort-cpu", "--threads", str(args.threads)]
    return words if args.max_batch is None else [*words, "--max-batch", str(args.max_batch)]


def _idle(bundle: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Start and idle memory, whole and without the model; medians."""
    rows: list[tuple[float, float, float, float]] = []
    for _ in range(args.starts):
        with serving(_words(bundle, args), folder / "log") as server:
            time.sleep(1)
            start, memory = server.start_seconds, server.memory_mb()
            server.stop()
        (_, without), (took, whole) = _bare(bundle), _bare(bundle, str(args.threads))
        rows.append((start, memory, start - took, memory - (whole - without)))
    names = ("start_s", "idle_mb", "start_without_model_s", "idle_without_model_mb")
    middle = np.median(np.array(rows), axis=0)
    return {name: round(float(value), 3) for name, value in zip(names, middle, strict=True)}


def _bare(bundle: Path, *threads: str) -> tuple[float, float]:
    words = [sys.executable, "-c", _BARE, str(bundle), *threads]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    seconds, kib = done.stdout.split()
    return float(seconds), int(kib) * 1024 / 1e6


def _throughput(bundle: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    opened = Bundle.open(bundle, verify_hashes=False)
    engine = open_graph(opened, "model", "ort-cpu", EngineOptions(threads=args.threads))
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(1, 3, *engine.size)).astype(np.float32)
    right = engine.run(pixels, [OUTPUT])[OUTPUT]
    rates: dict[str, list[float]] = {}
    waits: dict[str, list[float]] = {}
    with serving(_words(bundle, args), folder / "log") as server:
        ways = _ways(server, engine, pixels, right, args)
        for number in range(args.rounds):
            names = list(ways)
            order = names if number % 2 == 0 else names[::-1]
            for name in order:
                rate, seconds = ways[name]()
                rates.setdefault(name, []).append(rate)
                waits.setdefault(name, []).extend(seconds)
        loaded_mb = server.memory_mb()
        if (code := server.stop()) != 0:
            raise SystemExit(f"the server ended with {code}")
    alone = {name: float(np.median(r)) for name, r in rates.items() if name.startswith("engine")}
    best = max(alone, key=lambda name: alone[name])
    rows = []
    for name in (n for n in rates if n not in alone):
        ideal = int(name.split()[-1]) / alone[best]
        p50, p99 = (float(q) for q in np.quantile(waits[name], (0.5, 0.99)))
        row = {"way": name, "images_per_s": float(np.median(rates[name])), "p50_s": p50}
        ratio = float(np.median(np.array(rates[name]) / np.array(rates[best])))
        row |= {"over_engine": ratio, "p99_s": p99, "p99_over_ideal": p99 / ideal}
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return {
        "rounds": args.rounds,
        "seconds": args.seconds,
        "engine_images_per_s": {name: round(rate, 3) for name, rate in alone.items()},
        "best": best,
        "after_load_mb": round(loaded_mb, 1),
        "ways": rows,
    }


def _ways(
    server: Served, engine: Engine, pixels: Array, right: Array, args: argparse.Namespace
) -> dict[str, Callable[[], tuple[float, list[float]]]]:
    """Name -> one round of it: images per second, and every request's seconds."""

    def alone(batch: int) -> tuple[float, list[float]]:
        images = np.repeat(pixels, batch, axis=0)
        engine.run(images, [OUTPUT])
        begun, runs = time.perf_counter(), 0
        while time.perf_counter() - begun < args.seconds:
            engine.run(images, [OUTPUT])
            runs += 1
        return batch * runs / (time.perf_counter() - begun), []

    def load(ask: Callable[[Served, Array], Any], clients: int) -> tuple[float, list[float]]:
        return load_with(lambda: ask(server, pixels), clients, right, args.seconds)

    ways: dict[str, Callable[[], tuple[float, list[float]]]] = {
        f"engine, batch {batch}": lambda b=batch: alone(b)  # type: ignore[misc]
        for batch in args.batch_sizes
    }
    for kind, ask in (("HTTP", over_http), ("gRPC", over_grpc)):
        for clients in args.concurrency:
            ways[f"{kind}, concurrency {clients}"] = (
                lambda a=ask, c=clients: load(a, c)  # type: ignore[misc]
            )
    return ways


def _table(result: dict[str, Any]) -> list[str]:
    engine = ", ".join(f"{n}: {r:.2f}/s" for n, r in result["engine_images_per_s"].items())
    lines = [
        f"{result['model']}, float32, {result['threads']} threads, {result['rounds']} rounds of "
        f"{result['seconds']:g} s. {engine}.",
        "",
        f"Start {result['start_s']:.2f} s, without the model {result['start_without_model_s']:.2f} "
        f"s (aim {AIMS['start_s']}); idle {result['idle_mb']:.0f} MB, without the model "
        f"{result['idle_without_model_mb']:.0f} MB (aim {AIMS['idle_mb']:.0f}); after the load "
        f"{result['after_load_mb']:.0f} MB.",
        "",
        "Aims at concurrency 32: at least 0.95 of the engine, p99 under 1.5 of the ideal.",
        "",
        f"| | images/s | over {result['best']} | p50 s | p99 s | p99 over ideal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["ways"]:
        figures = ("images_per_s", "over_engine", "p50_s", "p99_s", "p99_over_ideal")
        lines.append(f"| {row['way']} | " + " | ".join(f"{row[f]:.3f}" for f in figures) + " |")
    return lines


if __name__ == "__main__":
    main()
