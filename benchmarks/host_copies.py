"""What copies by several threads gain, from arrays in the host's memory to arrays there.

Run as ``python -m benchmarks.host_copies BUNDLE`` on a machine with a card, with a bundle that was
built there. The patched graph is open once for each number of threads; a whole ``run`` of each is
timed in turn, and beside it the device alone, by its own clock.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import RESULTS, card_clocks, circumstances, rounded, write_results
from regraft.bundle import Bundle
from regraft.engines import EngineOptions, open_graph
from regraft.timing import Ratio, race


def main() -> None:
    """Measures and writes benchmarks/results/host_copies.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Bundle.open)
    parser.add_argument("--engine", default="ort-cuda")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each batch")
    parser.add_argument("--out", type=Path, default=RESULTS / "host_copies.json")
    args = parser.parse_args()
    manifest = args.bundle.manifest
    batches = _measure(args)
    result = {
        **circumstances("benchmarks.host_copies"),
        "clocks": card_clocks(),
        "model": manifest.model["source"],
        "precision": manifest.precision,
        "batches": batches,
    }
    table = _table(result)
    print("\n".join(table))
    write_results(args.out, result, table)


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        engines = {}
        for threads in args.threads:
            opened = open_graph(args.bundle, "model", args.engine, EngineOptions(threads=threads))
            engines[threads] = stack.enter_context(opened)
        return [_batch(engines, batch, args.seconds) for batch in args.batch_sizes]


def _batch(engines: dict[int, Any], batch: int, seconds: float) -> dict[str, Any]:
    first, one = next(iter(engines.items()))
    pixels = np.random.default_rng(0).normal(size=(batch, 3, *one.size))
    pixels = pixels.astype(np.float32)
    expected = one.run(pixels)

    def check(name: str, got: Any) -> None:
        for output, array in got.items():
            if not np.array_equal(array, expected[output]):
                raise SystemExit(f"{name} threads: {output} is not what {first} gave")

    rivals = {str(threads): partial(engine.run, pixels) for threads, engine in engines.items()}
    times = race(rivals, seconds=seconds, check=check)
    base = times[str(first)]
    return {
        "batch": batch,
        "rounds": len(base.seconds),
        "copied_mb": round((pixels.nbytes + sum(a.nbytes for a in expected.values())) / 1e6, 1),
        "device_ms": round(one.device_seconds(batch, 20) * 1e3, 3) if one.has_clock else None,
        "threads": {
            name: {
                "median_ms": round(t.median * 1e3, 3),
                "over_first": rounded(Ratio.of(t, base), 4),
            }
            for name, t in times.items()
        },
    }


def _table(result: dict[str, Any]) -> list[str]:
    rows = [
        f"{result['model']}, {result['precision']}, {result['clocks']}. Ratios: over the first "
        "number of threads, median over rounds with its 95 % interval.",
        "",
        "| batch | copied, MB | device alone, ms | threads | ms | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for b in result["batches"]:
        for threads, t in b["threads"].items():
            ratio = "{} ({} to {})".format(*t["over_first"])
            rows.append(
                f"| {b['batch']} | {b['copied_mb']} | {b['device_ms']} | {threads} "
                f"| {t['median_ms']} | {ratio} |"
            )
    return rows


if __name__ == "__main__":
    main()
