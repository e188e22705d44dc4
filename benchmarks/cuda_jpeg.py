"""From JPEG files to features on a card: baseline, patched, and decoding alone.

Run as ``python -m benchmarks.cuda_jpeg`` on a machine with a card. Files are decoded and
preprocessed by all cores; the engine copies one batch while it computes another, as
``Extractor.stream(ahead=True)`` does. All rivals read the same files in one process, in an order
that changes every round.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import vits
from benchmarks.cuda_graphs import BASELINE, OUTPUT, open_cuda, write_forms
from benchmarks.cuda_rivals import FORMS as ALL
from benchmarks.cuda_rivals import OWN_BASELINE
from benchmarks.extract import pictures
from benchmarks.machine import RESULTS, circumstances, rounded, write_results
from regraft.engines import Engine
from regraft.pipeline import batches
from regraft.preprocessing import Preprocessing
from regraft.timing import Ratio, race
from regraft_export.trace import trace

# Named as cuda_overhead names them, whose graphs --graphs takes.
FORMS = {name: ALL[name] for name in (BASELINE, "patched", OWN_BASELINE, "patched, operators")}
DECODING = "decoding alone"


def main() -> None:
    """Measures and writes the result, JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name")
    parser.add_argument("--precision", default="fp16", choices=["fp16", "bf16"])
    parser.add_argument("--graphs", type=Path, metavar="DIR", help="what cuda_overhead exported")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--megapixels", type=float, default=0.2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "cuda_jpeg.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.graphs or Path(temporary)
        if not args.graphs:
            vit = vits.load(args.model)
            neurons = vits.some_neurons(vit, [4, 5, 6], 10)
            write_forms(folder, trace(vit, vits.image_size(vit), args.precision), neurons, FORMS)
        some = pictures(Path(temporary), 32, args.megapixels)
        paths = [some[i % len(some)] for i in range(args.images)]
        result = {**circumstances("benchmarks.cuda_jpeg"), **_measure(args, folder, paths)}
    table = _table(result)
    print("\n".join(table))
    write_results(args.out, result, table)


def _measure(args: argparse.Namespace, folder: Path, paths: list[Path]) -> dict[str, Any]:
    engines = {name: open_cuda(folder, name, args.precision) for name in FORMS}
    half = (0.5, 0.5, 0.5)
    size = engines[BASELINE].size
    preprocessing = Preprocessing(size, half, half, "shortest-edge", size, "bicubic")

    def rival(engine: Engine | None) -> Callable[[], int]:
        def once() -> int:
            done, waiting = 0, deque[Callable[[], Any]]()
            for batch in batches(paths, preprocessing, args.batch_size):
                done += len(batch.indices)
                if engine is not None:
                    waiting.append(engine.start(batch.pixels, [OUTPUT]))
                if len(waiting) > 1:
                    waiting.popleft()()
            for finish in waiting:
                finish()
            return done

        return once

    rivals = {**{name: rival(engine) for name, engine in engines.items()}, DECODING: rival(None)}
    times = race(rivals, seconds=0, rounds=args.rounds)
    details = engines[BASELINE].details()
    for engine in engines.values():
        engine.close()
    rows = {}
    for name, t in times.items():
        over = Ratio.of(t, times[BASELINE])
        rows[name] = {
            "images_per_second": round(len(paths) / t.median, 1),
            "over_baseline": rounded(over, 4),
        }
    about = {"model": args.model, "precision": args.precision, "images": len(paths)}
    about |= {"megapixels": args.megapixels, "batch": args.batch_size, "rounds": args.rounds}
    return {**about, "engine": details, "rivals": rows}


def _table(result: dict[str, Any]) -> list[str]:
    rows = [
        f"{result['model']}, {result['precision']}, {result['images']} JPEG files of "
        f"{result['megapixels']} megapixels, batch {result['batch']}, "
        f"{result['engine']['device']}; last_hidden_state copied back.",
        "",
        "| rival | images/s | time over baseline |",
        "| --- | --- | --- |",
    ]
    for name, f in result["rivals"].items():
        rows.append(
            "| {} | {} | {} ({} to {}) |".format(name, f["images_per_second"], *f["over_baseline"])
        )
    return rows


if __name__ == "__main__":
    main()
