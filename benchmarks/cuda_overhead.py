"""What the patch costs on a card: baseline, patched, the paper taken literally, and PyTorch.

Run as ``python -m benchmarks.cuda_overhead`` on a machine with a card. Each model is exported once;
then all rivals of one batch size run in one process, in an order that changes every round, and what
they return is checked against PyTorch with hooks in float32. Times are the card's own, of several
runs in a row, without copies; ``first_ms`` are single runs, with the time to start them. Graphs
with regraft's own operators are compared with a baseline that has them, too. A rival
that fails or finds no memory is left out and its reason recorded; without the baseline nothing is
timed. ``--operators-only`` leaves out all but the graphs that the patch's cost is measured with.
A result file that exists is continued; a cell of the same settings is replaced. How the
rivals take turns, :mod:`benchmarks.cuda_rounds` says: ``over_baseline`` of our own graphs is from
close comparison, ``of_each`` has every opened graph's own median there; all else is from runs at
their pace.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import vits
from benchmarks.cuda_cells import keep, rows_of
from benchmarks.cuda_graphs import Form, write_forms
from benchmarks.cuda_rivals import (
    BASES,
    COMPILED,
    EAGER,
    FORMS,
    HOOKS,
    LITERAL,
    OPENED,
    OWN_BASELINE,
    Rivals,
    base_of,
    constants_of,
)
from benchmarks.cuda_rounds import SETTLED, Rival, at_their_pace, closely, fills_the_card, ratio
from benchmarks.machine import RESULTS, card_clocks, circumstances, rounded
from regraft.engines.ort_cuda.operators import source_sha256
from regraft.neurons import Neurons
from regraft.timing import Ratio, Times
from regraft_export.trace import trace
from regraft_export.vit.structure import VisionTransformer

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
    parser.add_argument(
        "--close-seconds",
        type=float,
        help="for the close comparison of graphs with operators (default: --seconds)",
    )
    parser.add_argument("--rounds", type=int, default=20, help="per batch size, at least")
    parser.add_argument(
        "--openings",
        type=int,
        default=3,
        help="how often what the aims are about is open at a time (less where memory is short)",
    )
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--literal", action="store_true", help="with the literal translation")
    parser.add_argument(
        "--operators-only",
        action="store_true",
        help="only graphs with operators: unpatched, patched, and with a constant row",
    )
    parser.add_argument("--export", type=Path, metavar="DIR", help="only write the graphs there")
    parser.add_argument("--graphs", type=Path, metavar="DIR", help="take what --export wrote")
    parser.add_argument("--out", type=Path, help="default: one in benchmarks/results")
    args = parser.parse_args()
    subject = "operators" if args.operators_only else "overhead"
    args.out = args.out or RESULTS / f"cuda_{subject}.json"
    if args.operators_only and (args.compile or args.literal):
        parser.error("--operators-only is without --compile and --literal")
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
            rivals = partial(Rivals, folder, vit, neurons, batch, args.precision, args.openings)
            cell = _Cell(rivals, vit, batch, args).measure()
            keep(args.out, cell)
            _forget_memory()
            print("\n".join(rows_of(cell)), flush=True)


def _export(
    folder: Path, vit: VisionTransformer, neurons: Neurons, args: argparse.Namespace
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    traced = trace(vit, vits.image_size(vit), args.precision)
    constants = constants_of(vit, neurons)
    write_forms(folder, traced, neurons, _forms(args), constants=constants, literal=args.literal)


def _forms(args: argparse.Namespace) -> dict[str, Form]:
    """The graphs that are asked for, the unpatched one first."""
    return {name: FORMS[name] for name in OPENED} if args.operators_only else FORMS


class _Cell:
    """One model, precision and batch size."""

    def __init__(
        self,
        make: Callable[[], Rivals],  # which may find no memory
        vit: VisionTransformer,
        batch: int,
        args: argparse.Namespace,
    ) -> None:
        self.make, self.vit, self.batch, self.args = make, vit, batch, args
        self.failures: dict[str, str] = {}

    def measure(self) -> dict[str, Any]:
        """The cell, with what failed and why."""
        found: dict[str, Any] = {"rivals": {}}
        try:
            found = self._measured()
        except _FAILURES as error:
            self.failures["all"] = _reason(error)
        return {**self._about(), **found, "failures": self.failures}

    def _measured(self) -> dict[str, Any]:
        args = self.args
        rivals: dict[str, Rival] = {}
        with ExitStack() as stack, torch.no_grad():
            all_of = self.make()
            graphs = list(_forms(args))
            for name in [*graphs, *([LITERAL] if args.literal else [])]:
                self._add(rivals, name, partial(all_of.graph, stack, name))
            others = [] if args.operators_only else [HOOKS, EAGER]
            for name in [*others, *([COMPILED] if args.compile else [])]:
                self._add(rivals, name, partial(all_of.torch, stack, name))
            for name in [name for name in rivals if base_of(name) not in rivals]:
                self.failures[name] = "runs, but the unpatched graph it is compared with does not"
                del rivals[name]
            first = graphs[0]
            if first not in rivals:
                return {"rivals": {}}
            full = fills_the_card(rivals[first])
            times, firsts = at_their_pace(rivals, full, seconds=args.seconds, rounds=args.rounds)
            close = self._closely(all_of.graphs)
        return {
            "engine": all_of.details,
            "rounds": len(times[first].seconds),
            "close_rounds": {base: len(close[base][0].seconds) for base in BASES if base in close},
            "settled_ms": round(1e3 * SETTLED) if full else 0,
            "rivals": self._rows(all_of, times, firsts, close),
        }

    def _closely(self, graphs: Mapping[str, Sequence[Rival]]) -> dict[str, list[Times]]:
        """Graphs with operators among themselves, and those without."""
        close: dict[str, list[Times]] = {}
        for base in BASES:
            same = {name: opened for name, opened in graphs.items() if base_of(name) == base}
            if base not in same:
                continue
            seconds = self.args.close_seconds if base == OWN_BASELINE else None
            close |= closely(same, seconds=self.args.seconds if seconds is None else seconds)
        return close

    def _add(self, rivals: dict[str, Rival], name: str, make: Callable[[], Rival]) -> None:
        """Adds a rival that was checked, or the reason why there is none."""
        try:
            rivals[name] = make()
        except _FAILURES as error:
            self.failures[name] = _reason(error)
            print(f"{name}: {self.failures[name]}", file=sys.stderr)
        if name in self.failures:  # here the failed rival's frames are gone, and hold no memory
            _forget_memory()

    def _rows(
        self,
        all_of: Rivals,
        times: Mapping[str, Times],
        firsts: Mapping[str, Times],
        close: Mapping[str, Sequence[Times]],
    ) -> dict[str, Any]:
        rows = {}
        for name, t in times.items():
            same, base = close.get(name, []), base_of(name)
            over = ratio(same, close[base]) if same else Ratio.of(t, times[base])
            hooks = Ratio.of(times[HOOKS], t) if HOOKS in times else None
            rows[name] = {
                "median_ms": round(t.median * 1e3, 4),
                "first_ms": round(firsts[name].median * 1e3, 4),
                "first_p99_ms": round(firsts[name].p99 * 1e3, 4),
                "images_per_second": round(self.batch / t.median, 1),
                "over_baseline": rounded(over, 4),
                "of_each": [round(one.median * 1e3, 4) for one in same],
                "hooks_over_it": hooks and rounded(hooks, 3),
                "relative_error": float(f"{all_of.errors[name]:.2g}"),
                "memory_mib": round(all_of.memory[name]),
            }
        return rows

    def _about(self) -> dict[str, Any]:
        return {
            **circumstances("benchmarks.cuda_overhead"),
            "clocks": card_clocks(),
            "model": self.args.model,
            "image_size": list(vits.image_size(self.vit)),
            "tokens": self.vit.layout.count,
            "blocks": self.vit.layout.depth,
            "precision": self.args.precision,
            "touched_layers": self.args.touched,
            "neurons": self.args.neurons,
            "batch": self.batch,
            "operators": source_sha256()[:16],
        }


def _reason(error: BaseException) -> str:
    """A failure in one line: PyTorch tells of its memory at length."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _forget_memory() -> None:
    """Gives back what PyTorch keeps for itself, compiled graphs' pools too."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
