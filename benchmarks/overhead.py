"""What the patch costs: baseline, patched, kv, the paper literally, PyTorch with hooks, compiled.

Run as ``python -m benchmarks.overhead``. All rivals run in one process, in an order that changes
every round; what they return is checked. Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray

from benchmarks.literal import literal_graph
from benchmarks.machine import RESULTS, circumstances, rounded, write_results
from benchmarks.vits import some_constants, some_neurons
from regraft.engines import EngineOptions, open_engine
from regraft.neurons import Neurons
from regraft.redirect import RedirectOptions
from regraft.timing import Ratio, Times, race
from regraft_export.graph.patch import Patch, Traced, Wanted, build
from regraft_export.register_constants import RegisterConstants
from regraft_export.trace import trace
from regraft_export.vit.hooks import redirected, register_replaced
from regraft_export.vit.structure import VisionTransformer, from_module
from regraft_export.weights_file import WeightsFile

Array = NDArray[np.float32]
Rival = Callable[[], Array]
PATCHED, BASELINE, KV = "patched", "baseline", "variant kv"
TOLERANCE = 1e-4  # relative Frobenius error to PyTorch with hooks, float32


def main() -> None:
    """Measures and writes benchmarks/results/overhead.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name")
    parser.add_argument("--touched", type=int, nargs="+", default=[4, 5, 6], help="layers")
    parser.add_argument("--neurons", type=int, default=10, help="in all")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=120.0, help="per batch size")
    parser.add_argument("--rounds", type=int, default=20, help="per batch size, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    module = timm.create_model(args.model, pretrained=False).eval().requires_grad_(False)
    size: tuple[int, int] = module.default_cfg["input_size"][1:]
    vit = from_module(module, size)
    neurons = some_neurons(vit, args.touched, args.neurons)
    traced = trace(vit, size)
    result: dict[str, Any] = {
        **circumstances("benchmarks.overhead"),
        "model": args.model,
        "tokens": vit.layout.count,
        "touched_layers": args.touched,
        "neurons": args.neurons,
        "threads": args.threads,
        "batches": [],
    }
    constants = some_constants(vit, min(args.touched) + 1)
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), traced, neurons, constants)
        for batch in args.batch_sizes:
            drawn = np.random.default_rng(batch).normal(size=(batch, 3, *size))
            pixels = drawn.astype(np.float32)
            rivals, notes = _rivals(Path(folder), vit, neurons, pixels, args)
            _check(rivals, partial(_with_constants, vit, neurons, constants, pixels))
            result["batches"].append(_measure(rivals, batch, args) | {"notes": notes})
    table = _table(result)
    print("\n".join(table))
    write_results(args.out, result, table)


def _with_constants(
    vit: VisionTransformer, neurons: Neurons, constants: RegisterConstants, pixels: Array
) -> Array:
    with torch.inference_mode(), register_replaced(vit, neurons.neurons, constants):
        return np.asarray(vit.module(torch.from_numpy(pixels)).numpy())


def _write(folder: Path, traced: Traced, neurons: Neurons, constants: RegisterConstants) -> None:
    constant = RedirectOptions(value="constant")
    with WeightsFile(folder) as weights:
        weights.save(build(traced, None, Wanted()).proto, f"{BASELINE}.onnx")
        patch = Patch(neurons, RedirectOptions())
        weights.save(build(traced, patch, Wanted()).proto, f"{PATCHED}.onnx")
        weights.save(build(traced, Patch(neurons, constant), Wanted()).proto, "constant.onnx")
        weights.save(literal_graph(traced, neurons), "literal.onnx")
        kv = Patch(neurons, RedirectOptions(), constants)
        weights.save(build(traced, kv, Wanted()).proto, f"{KV}.onnx")


def _rivals(
    folder: Path,
    vit: VisionTransformer,
    neurons: Neurons,
    pixels: Array,
    args: argparse.Namespace,
) -> tuple[dict[str, Rival], list[str]]:
    tensor = torch.from_numpy(pixels)
    notes: list[str] = []

    def hooked() -> Array:
        with torch.inference_mode(), redirected(vit, neurons):
            return np.asarray(vit.module(tensor).numpy())

    def eager() -> Array:
        with torch.inference_mode():
            return np.asarray(vit.module(tensor).numpy())

    rivals: dict[str, Rival] = {}
    for name in (BASELINE, PATCHED, "constant", KV, "literal"):
        rivals[name] = _graph(folder / f"{name}.onnx", pixels, args.threads)
    rivals |= {"PyTorch with hooks": hooked, "PyTorch unpatched": eager}
    if not args.no_compile:
        compiled = torch.compile(vit.module)

        def run_compiled() -> Array:
            with torch.inference_mode():
                return np.asarray(compiled(tensor).numpy())

        try:
            run_compiled()
            rivals["torch.compile unpatched"] = run_compiled
        except Exception as error:  # whatever the compiler lacks here is the result
            notes.append(f"torch.compile does not work here: {type(error).__name__}: {error}"[:300])
    return rivals, notes


def _graph(path: Path, pixels: Array, threads: int) -> Rival:
    engine = open_engine(path, "ort-cpu", options=EngineOptions(threads, spinning=True))
    return lambda: engine.run(pixels, ["pooler_output"])["pooler_output"]


def _check(rivals: dict[str, Rival], with_constants: Rival) -> None:
    groups = {
        "PyTorch with hooks": (rivals["PyTorch with hooks"], (PATCHED, "literal")),
        "PyTorch unpatched": (rivals["PyTorch unpatched"], (BASELINE,)),
        "PyTorch with constants": (with_constants, (KV,)),
    }
    for reference, (run, names) in groups.items():
        right = run()
        for name in names:
            error = np.linalg.norm(rivals[name]() - right) / np.linalg.norm(right)
            if not error <= TOLERANCE:
                raise SystemExit(f"{name} differs from {reference} by {error:.1e}")


def _measure(rivals: dict[str, Rival], batch: int, args: argparse.Namespace) -> dict[str, Any]:
    expected = {name: rival() for name, rival in rivals.items()}

    def same(name: str, output: object) -> None:
        if not np.allclose(np.asarray(output), expected[name], rtol=1e-3, atol=1e-4):
            raise SystemExit(f"{name} returned something else while it was timed")

    times = race(rivals, seconds=args.seconds, rounds=args.rounds, check=same)
    return {
        "batch": batch,
        "rounds": len(times[BASELINE].seconds),
        "rivals": {name: _figures(t, times) for name, t in times.items()},
    }


def _figures(t: Times, times: dict[str, Times]) -> dict[str, Any]:
    over, hooks = Ratio.of(t, times[BASELINE]), Ratio.of(times["PyTorch with hooks"], t)
    return {
        "median_ms": round(t.median * 1e3, 3),
        "p99_ms": round(t.p99 * 1e3, 3),
        "over_baseline": rounded(over, 4),
        "speedup_over_hooks": rounded(hooks, 3),
    }


def _table(result: dict[str, Any]) -> list[str]:
    rows = [
        f"{result['model']}, {result['tokens']} tokens, float32, {result['neurons']} neurons in "
        f"{len(result['touched_layers'])} layers, {result['threads']} threads. Ratios are medians "
        "over rounds with 95 % intervals. The variant kv has constants in every block behind the "
        "first touched one.",
        "",
        "| batch | rival | median ms | p99 ms | time over baseline | PyTorch with hooks over it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for batch in result["batches"]:
        for name, f in batch["rivals"].items():
            over = "{} ({} to {})".format(*f["over_baseline"])
            hooks = "{} ({} to {})".format(*f["speedup_over_hooks"])
            row = (batch["batch"], name, f["median_ms"], f["p99_ms"], over, hooks)
            rows.append("| " + " | ".join(map(str, row)) + " |")
        rows += [f"\n{note}\n" for note in batch["notes"]]
    return rows


if __name__ == "__main__":
    main()
