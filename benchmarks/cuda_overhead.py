"""What the patch costs on a card: baseline, patched, the paper taken literally, and PyTorch.

Run as ``python -m benchmarks.cuda_overhead`` on a machine with a card. Each model is exported once;
then all rivals of one batch size run in one process, in an order that changes every round, and what
they return is checked against PyTorch with hooks in float32. Times are the card's own, of several
runs in a row, without copies; ``first_ms`` are single runs, with the time to start them. Graphs
with regraft's own operators are compared with a baseline that has them, too. A rival
that fails or finds no memory is left out and its reason recorded; without the baseline nothing is
timed. A result file that exists is continued; a cell of the same settings is replaced. How the
rivals take turns, :mod:`benchmarks.cuda_rounds` says: ``over_baseline`` of our own graphs is from
close comparison, ``of_each`` has every opened graph's own median there; all else is from runs at
their pace.
"""

from __future__ import annotations

import argparse
import copy
import gc
import subprocess
import sys
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
from benchmarks.cuda_cells import keep, rows_of
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
from benchmarks.cuda_rounds import SETTLED, Rival, at_their_pace, closely, fills_the_card, ratio
from benchmarks.machine import RESULTS, circumstances
from regraft.engines.ort_cuda.operators import source_sha256
from regraft.neurons import Neurons
from regraft.timing import Ratio, Times
from regraft_export.graph.cuda.fuse import Choices
from regraft_export.trace import DTYPES, trace
from regraft_export.vit.hooks import redirected, register_replaced
from regraft_export.vit.structure import VisionTransformer

KV, OWN_KV = "variant kv", "variant kv, operators"
OWN = Choices(operators=True)
OWN_BASELINE = "baseline, operators"
FORMS = {
    BASELINE: Form(None),
    "patched": Form(PER_NEURON),
    "constant": Form(CONSTANT),
    KV: Form(PER_NEURON, kv=True),
    OWN_BASELINE: Form(None, OWN),
    "patched, operators": Form(PER_NEURON, OWN),
    "constant, operators": Form(CONSTANT, OWN),
    OWN_KV: Form(PER_NEURON, OWN, kv=True),
}
HOOKS, EAGER, COMPILED = "PyTorch with hooks", "PyTorch unpatched", "torch.compile unpatched"
# What the aims are about is opened so often: see benchmarks.cuda_rounds.
OPENED = {OWN_BASELINE: 3, "patched, operators": 3, "constant, operators": 3}
# check_error exits; torch's memory and compiler errors, and our engine's.
_FAILURES = (Exception, SystemExit)


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
            keep(args.out, cell)
            _forget_memory()
            print("\n".join(rows_of(cell)), flush=True)


def _export(
    folder: Path, vit: VisionTransformer, neurons: Neurons, args: argparse.Namespace
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    traced = trace(vit, vits.image_size(vit), args.precision)
    constants = vits.some_constants(vit, min(args.touched) + 1)
    write_forms(folder, traced, neurons, FORMS, constants=constants, literal=args.literal)


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
        self.failures: dict[str, str] = {}
        self.full = False
        self.graphs: dict[str, list[Rival]] = {}

    def measure(self) -> dict[str, Any]:
        """The cell, with what failed and why."""
        times: dict[str, Times] = {}
        firsts: dict[str, Times] = {}
        close: dict[str, list[Times]] = {}
        try:
            times, firsts, close = self._measured()
        except _FAILURES as error:
            self.failures["all"] = _reason(error)
        return self._result(times, firsts, close)

    def _measured(self) -> tuple[dict[str, Times], dict[str, Times], dict[str, list[Times]]]:
        right, plain = self._right()
        rivals: dict[str, Rival] = {}
        with ExitStack() as stack, torch.no_grad():
            right |= {BASELINE: plain, OWN_BASELINE: plain}
            for name in [*FORMS, *(["literal"] if self.args.literal else [])]:
                self._add(rivals, name, partial(self._graph, stack, name, right))
            dtype = DTYPES[self.args.precision]
            tensor = torch.from_numpy(self.pixels).cuda().to(dtype)
            for name in [HOOKS, EAGER, *([COMPILED] if self.args.compile else [])]:
                expected = right["patched"] if name == HOOKS else plain
                self._add(rivals, name, partial(self._torch, stack, name, tensor, expected))
            if BASELINE not in rivals:
                return {}, {}, {}
            seconds, rounds = self.args.seconds, self.args.rounds
            self.full = fills_the_card(rivals[BASELINE])
            times, firsts = at_their_pace(rivals, self.full, seconds=seconds, rounds=rounds)
            return times, firsts, closely(self.graphs, seconds=seconds)

    def _add(self, rivals: dict[str, Rival], name: str, make: Callable[[], Rival]) -> None:
        """Adds a rival that was checked, or the reason why there is none."""
        try:
            rivals[name] = make()
        except _FAILURES as error:
            self.failures[name] = _reason(error)
            print(f"{name}: {self.failures[name]}", file=sys.stderr)
        if name in self.failures:  # here the failed rival's frames are gone, and hold no memory
            _forget_memory()

    def _graph(self, stack: ExitStack, name: str, right: dict[str, Array]) -> Rival:
        """One of the graphs for ``ort-cuda``, opened as often as it is to be."""
        with ExitStack() as opened:
            same = [self._opened(opened, name, right) for _ in range(OPENED.get(name, 1))]
            stack.enter_context(opened.pop_all())
        self.graphs[name] = same
        return same[0]

    def _opened(self, stack: ExitStack, name: str, right: dict[str, Array]) -> Rival:
        with ExitStack() as opened:
            free = torch.cuda.mem_get_info()[0]
            engine = opened.enter_context(open_cuda(self.folder, name, self.args.precision))
            got = engine.run(self.pixels, [OUTPUT])[OUTPUT]
            engine.device_seconds(self.batch, 2)
            self.memory.setdefault(name, (free - torch.cuda.mem_get_info()[0]) / 2**20)
            error = check_error(name, got, right[name], self.args.precision)
            self.errors[name] = max(error, self.errors.get(name, 0.0))
            self.details = self.details or engine.details()
            enough_runs(engine, self.batch)
            stack.enter_context(opened.pop_all())
        return partial(engine.device_seconds, self.batch)

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
            if form.redirect is not None and not form.kv
        }
        constants = vits.some_constants(self.vit, min(self.args.touched) + 1)
        right[KV] = run(register_replaced(self.vit, self.neurons.neurons, constants))
        right |= {"literal": right["patched"], OWN_KV: right[KV]}
        return right, run(nullcontext())

    def _torch(self, stack: ExitStack, name: str, tensor: Tensor, right: Array) -> Rival:
        """PyTorch in the same precision: with hooks, unpatched, or unpatched but compiled."""
        before = torch.cuda.memory_allocated()
        with ExitStack() as opened:
            vit = copy.deepcopy(self.vit)
            vit.module.to(tensor.dtype)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run = _forward(vit.module)
            if name == HOOKS:
                opened.enter_context(redirected(vit, self.neurons))
            if name == COMPILED:
                torch._dynamo.reset()
                run = torch.compile(run, mode="reduce-overhead")
            else:
                run = torch.inference_mode()(run)  # which torch.compile does not take everywhere
            for _ in range(3):
                features, _ = run(tensor)
            got = features.float().cpu().numpy()
            self.errors[name] = check_error(name, got, right, self.args.precision)
            self.memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            stack.enter_context(opened.pop_all())
        return _on_card(run, tensor)

    def _result(
        self,
        times: dict[str, Times],
        firsts: dict[str, Times],
        close: dict[str, list[Times]],
    ) -> dict[str, Any]:
        rows = {}
        for name, t in times.items():
            same = close.get(name, [])
            own = name.endswith(", operators") and OWN_BASELINE in times
            base = OWN_BASELINE if own else BASELINE
            over = ratio(same, close[base]) if same else Ratio.of(t, times[base])
            hooks = Ratio.of(times[HOOKS], t) if HOOKS in times else None
            rows[name] = {
                "median_ms": round(t.median * 1e3, 4),
                "first_ms": round(firsts[name].median * 1e3, 4),
                "first_p99_ms": round(firsts[name].p99 * 1e3, 4),
                "images_per_second": round(self.batch / t.median, 1),
                "over_baseline": [round(x, 4) for x in (over.median, over.low, over.high)],
                "of_each": [round(one.median * 1e3, 4) for one in same],
                "hooks_over_it": hooks
                and [round(x, 3) for x in (hooks.median, hooks.low, hooks.high)],
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
            "rounds": len(times[BASELINE].seconds) if times else 0,
            "close_rounds": len(close[BASELINE][0].seconds) if close else 0,
            "settled_ms": round(1e3 * SETTLED) if self.full else 0,
            "operators": source_sha256()[:16],
            "rivals": rows,
            "failures": self.failures,
        }


def _features(module: Any, tensor: Tensor) -> Array:
    return np.asarray(module.forward_features(tensor).float().cpu().numpy())


def _reason(error: BaseException) -> str:
    """A failure in one line: PyTorch tells of its memory at length."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _forget_memory() -> None:
    """Gives back what PyTorch keeps for itself, compiled graphs' pools too."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _forward(module: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The model's forward, which also returns the features: what is timed is what is checked."""

    def run(tensor: Tensor) -> tuple[Tensor, Tensor]:
        features = module.forward_features(tensor)
        return features, module.forward_head(features)

    return run


def _on_card(run: Callable[[Tensor], Any], tensor: Tensor) -> Rival:
    def seconds(runs: int) -> float:
        event: Any = torch.cuda.Event
        start, stop = (event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(runs):
            run(tensor)
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / runs

    return seconds


def _clocks() -> str:
    query = ["--query-gpu=name,clocks.sm,clocks.mem,clocks.max.sm", "--format=csv,noheader"]
    return subprocess.run(
        ["nvidia-smi", *query], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
