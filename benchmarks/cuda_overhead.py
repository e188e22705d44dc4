"""What the patch costs on a card: baseline, patched, the paper taken literally, and PyTorch.

Run as ``python -m benchmarks.cuda_overhead`` on a machine with a card. Each model is exported once;
then all rivals of one batch size run in one process, in an order that changes every round, and what
they return is checked against PyTorch with hooks in float32. Times are the card's own, of several
runs in a row, without copies; ``first_ms`` are single runs, with the time to start them.
Of torch.compile it is the eager module that is checked. A result file that exists is continued; a
cell of the same model, size, precision and batch is replaced.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import vits
from benchmarks.cuda_graphs import (
    BASELINE,
    CONSTANT,
    OUTPUT,
    PER_NEURON,
    Array,
    Form,
    check_error,
    enough_runs,
    open_cuda,
    write_forms,
)
from benchmarks.machine import RESULTS, circumstances, write_results
from regraft.engines import Engine
from regraft.neurons import Neurons
from regraft.timing import Ratio, Times, compare
from regraft_export.trace import DTYPES, trace
from regraft_export.vit.hooks import redirected
from regraft_export.vit.structure import VisionTransformer

FORMS = {BASELINE: Form(None), "patched": Form(PER_NEURON), "constant": Form(CONSTANT)}
HOOKS, EAGER, COMPILED = "PyTorch with hooks", "PyTorch unpatched", "torch.compile unpatched"
Rival = Callable[[int], float]  # runs in a row -> seconds per run
SAMPLE = 0.01  # seconds of runs in a row that make one figure


def main() -> None:
    """Measures and writes the result, JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name")
    parser.add_argument("--image-size", type=int, help="pixels (default: the model's)")
    parser.add_argument("--depth", type=int, help="fewer blocks than the model has")
    parser.add_argument("--precision", default="fp16", choices=["fp16", "bf16"])
    parser.add_argument("--touched", type=int, nargs="+", default=[4, 5, 6], help="layers")
    parser.add_argument("--neurons", type=int, default=10, help="in all")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--seconds", type=float, default=5.0, help="per batch size")
    parser.add_argument("--rounds", type=int, default=20, help="per batch size, at least")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--literal", action="store_true", help="with the literal translation")
    parser.add_argument("--export", type=Path, metavar="DIR", help="only write the graphs there")
    parser.add_argument("--graphs", type=Path, metavar="DIR", help="take what --export wrote")
    parser.add_argument("--out", type=Path, default=RESULTS / "cuda_overhead.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    vit = vits.load(args.model, args.image_size, args.depth)
    neurons = vits.some_neurons(vit, args.touched, args.neurons)
    if args.export:
        _export(args.export, vit, neurons, args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.graphs or Path(temporary)
        if not args.graphs:
            _export(folder, vit, neurons, args)
        vit.module.cuda()
        for batch in args.batch_sizes:
            cell = _Cell(folder, vit, neurons, batch, args).measure()
            _keep(args.out, cell)
            print("\n".join(_rows(cell)), flush=True)


def _export(
    folder: Path, vit: VisionTransformer, neurons: Neurons, args: argparse.Namespace
) -> None:
    traced = trace(vit, vits.image_size(vit), args.precision)
    write_forms(folder, traced, neurons, FORMS, literal=args.literal)


class _Cell:
    """One model, precision and batch size."""

    def __init__(
        self,
        folder: Path,
        vit: VisionTransformer,
        neurons: Neurons,
        batch: int,
        args: argparse.Namespace,
    ) -> None:
        self.folder, self.vit, self.neurons = folder, vit, neurons
        self.batch, self.args = batch, args
        drawn = np.random.default_rng(batch).normal(size=(batch, 3, *vits.image_size(vit)))
        self.pixels: Array = drawn.astype(np.float32)
        self.memory: dict[str, float] = {}
        self.errors: dict[str, float] = {}
        self.details: dict[str, str] = {}

    def measure(self) -> dict[str, Any]:
        right, plain = self._right()
        rivals: dict[str, Rival] = {}
        with ExitStack() as stack, torch.inference_mode():
            for name in [*FORMS, *(["literal"] if self.args.literal else [])]:
                engine = stack.enter_context(self._engine(name))
                expected = plain if name == BASELINE else right[name]
                got = engine.run(self.pixels, [OUTPUT])[OUTPUT]
                self.errors[name] = check_error(name, got, expected, self.args.precision)
                self.details = self.details or engine.details()
                enough_runs(engine, self.batch)
                rivals[name] = partial(engine.device_seconds, self.batch)
            rivals |= self._torch(stack, right["patched"], plain)
            times, firsts = self._times(rivals)
        return self._result(times, firsts)

    def _right(self) -> tuple[dict[str, Array], Array]:
        """What each graph must yield, by PyTorch with hooks in float32 on the card."""
        tensor = torch.from_numpy(self.pixels).cuda()

        def run(context: Any) -> Array:
            with torch.inference_mode(), context:
                parts = [_features(self.vit.module, p) for p in torch.split(tensor, 8)]
                return np.concatenate(parts)

        right = {
            name: run(redirected(self.vit, self.neurons, form.redirect))
            for name, form in FORMS.items()
            if form.redirect is not None
        }
        right["literal"] = right["patched"]
        return right, run(nullcontext())

    def _engine(self, name: str) -> Engine:
        free = torch.cuda.mem_get_info()[0]
        engine = open_cuda(self.folder, name, self.args.precision)
        engine.run(self.pixels, [OUTPUT])
        engine.device_seconds(self.batch, 2)
        self.memory[name] = (free - torch.cuda.mem_get_info()[0]) / 2**20
        return engine

    def _torch(self, stack: ExitStack, right: Array, plain: Array) -> dict[str, Rival]:
        """PyTorch in the same precision: with hooks, unpatched, and unpatched but compiled."""
        dtype = DTYPES[self.args.precision]
        tensor = torch.from_numpy(self.pixels).cuda().to(dtype)
        hooked, eager = (copy.deepcopy(self.vit) for _ in range(2))
        for vit in (hooked, eager):
            vit.module.to(dtype)
        stack.enter_context(redirected(hooked, self.neurons))
        modules: dict[str, Any] = {HOOKS: hooked.module, EAGER: eager.module}
        if self.args.compile:
            torch._dynamo.reset()
            modules[COMPILED] = torch.compile(eager.module, mode="reduce-overhead")
        rivals = {}
        for name, module in modules.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            for _ in range(3):
                module(tensor)
            got = eager.module if name == COMPILED else module
            out = _features(got, tensor)
            expected = right if name == HOOKS else plain
            self.errors[name] = check_error(name, out, expected, self.args.precision)
            peak = torch.cuda.max_memory_allocated() - before
            weights = sum(p.numel() * p.element_size() for p in eager.module.parameters())
            self.memory[name] = (peak + weights) / 2**20
            rivals[name] = _on_card(module, tensor)
        return rivals

    def _times(self, rivals: dict[str, Rival]) -> tuple[dict[str, Times], dict[str, Times]]:
        seconds, rounds = self.args.seconds, self.args.rounds
        runs = {name: max(1, round(SAMPLE / rival(3))) for name, rival in rivals.items()}
        times = compare(
            {name: partial(rival, runs[name]) for name, rival in rivals.items()},
            seconds=seconds,
            rounds=rounds,
        )
        singles = {name: partial(rival, 1) for name, rival in rivals.items()}
        return times, compare(singles, seconds=seconds / 3, rounds=rounds)

    def _result(self, times: dict[str, Times], firsts: dict[str, Times]) -> dict[str, Any]:
        rows = {}
        for name, t in times.items():
            over, hooks = Ratio.of(t, times[BASELINE]), Ratio.of(times[HOOKS], t)
            rows[name] = {
                "median_ms": round(t.median * 1e3, 4),
                "first_ms": round(firsts[name].median * 1e3, 4),
                "first_p99_ms": round(firsts[name].p99 * 1e3, 4),
                "images_per_second": round(self.batch / t.median, 1),
                "over_baseline": [round(x, 4) for x in (over.median, over.low, over.high)],
                "hooks_over_it": [round(x, 3) for x in (hooks.median, hooks.low, hooks.high)],
                "relative_error": float(f"{self.errors[name]:.2g}"),
                "memory_mib": round(self.memory[name]),
            }
        return {
            **circumstances("benchmarks.cuda_overhead"),
            "engine": self.details,
            "clocks": _clocks(),
            "model": self.args.model,
            "image_size": list(vits.image_size(self.vit)),
            "tokens": self.vit.layout.count,
            "blocks": self.vit.layout.depth,
            "precision": self.args.precision,
            "touched_layers": self.args.touched,
            "neurons": self.args.neurons,
            "batch": self.batch,
            "rounds": len(times[BASELINE].seconds),
            "rivals": rows,
        }


def _features(module: Any, tensor: Tensor) -> Array:
    return np.asarray(module.forward_features(tensor).float().cpu().numpy())


def _on_card(module: Any, tensor: Tensor) -> Rival:
    def seconds(runs: int) -> float:
        event: Any = torch.cuda.Event
        start, stop = (event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(runs):
            module(tensor)
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / runs

    return seconds


def _clocks() -> str:
    query = ["--query-gpu=name,clocks.sm,clocks.mem,clocks.max.sm", "--format=csv,noheader"]
    return subprocess.run(
        ["nvidia-smi", *query], capture_output=True, text=True, check=True
    ).stdout.strip()


def _keep(path: Path, cell: dict[str, Any]) -> None:
    """Puts a cell into the result file, in place of one of the same name."""
    known = json.loads(path.read_text())["cells"] if path.exists() else []
    cells = [c for c in known if _key(c) != _key(cell)] + [cell]
    table = [line for c in cells for line in ["", *_rows(c)]]
    write_results(path, {**circumstances("benchmarks.cuda_overhead"), "cells": cells}, table)


def _key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return (cell["model"], *cell["image_size"], cell["precision"], cell["batch"])


def _rows(cell: dict[str, Any]) -> list[str]:
    size = "x".join(map(str, cell["image_size"]))
    rows = [
        f"{cell['model']}, {size}, {cell['tokens']} tokens, {cell['blocks']} blocks, "
        f"{cell['precision']}, batch "
        f"{cell['batch']}, layers {cell['touched_layers']} touched, {cell['engine']['device']}",
        "",
        "| rival | ms | single run (p99) | over baseline | hooks over it | images/s | MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, f in cell["rivals"].items():
        over = "{} ({} to {})".format(*f["over_baseline"])
        first = f"{f['first_ms']} ({f['first_p99_ms']})"
        row = (name, f["median_ms"], first, over, f["hooks_over_it"][0], f["images_per_second"])
        rows.append("| " + " | ".join(map(str, (*row, f["memory_mib"]))) + " |")
    return rows


if __name__ == "__main__":
    main()
