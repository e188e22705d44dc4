"""`regraft extract` into a folder: one process, several, and a Ray cluster on the same machine.

Run as ``python -m benchmarks.bulk BUNDLE``, in an environment that has Ray for its rows. Whole
commands are timed, start included, on two numbers of images, so that start-up and time per image
come apart: on N equal machines Ray needs start + per_image * images / N.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.extract import pictures
from benchmarks.machine import RESULTS, circumstances, write_results

WAYS = {"one process": [], "two processes": ["--processes", "2"], "ray, one node": ["--ray"]}


def main() -> None:
    """Measures and writes benchmarks/results/bulk.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--images", type=int, nargs=2, default=(16, 112), metavar="N")
    parser.add_argument("--megapixels", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "bulk.json")
    args = parser.parse_args()
    ways = dict(WAYS)
    if importlib.util.find_spec("ray") is None:
        del ways["ray, one node"]
    seconds: dict[str, dict[int, list[float]]] = {
        way: {count: [] for count in args.images} for way in ways
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = pictures(Path(folder), 16, args.megapixels)
        for number in range(args.rounds):
            order = list(ways) if number % 2 == 0 else list(reversed(ways))
            for way in order:
                for count in args.images:
                    images = [paths[i % len(paths)] for i in range(count)]
                    seconds[way][count].append(_time(args.bundle, images, ways[way]))
    rows = [_row(way, times) for way, times in seconds.items()]
    result = {**circumstances("benchmarks.bulk"), "megapixels": args.megapixels, "rows": rows}
    table = _table(rows)
    print("\n".join(table))
    write_results(args.out, result, table)


def _time(bundle: str, images: list[Path], words: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "features"
        command = [sys.executable, "-m", "regraft", "extract", bundle, *map(str, images)]
        command += ["--out", str(out), "--outputs", "cls", "--json", *words]
        started = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        took = time.perf_counter() - started
        if json.loads(done.stdout)["images"] != len(images):
            raise SystemExit("not every image was extracted")
        if pq.read_table(out)["cls"].null_count:
            raise SystemExit("features are missing")
    return took


def _row(way: str, times: dict[int, list[float]]) -> dict[str, Any]:
    (few, short), (many, long) = ((count, min(taken)) for count, taken in times.items())
    per_image = (long - short) / (many - few)
    return {
        "way": way,
        "seconds": {str(count): [round(s, 2) for s in taken] for count, taken in times.items()},
        "ms_per_image": round(per_image * 1e3, 1),
        "start_s": round(short - per_image * few, 1),
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Whole commands, best of the rounds; start is what is left at no image.",
        "",
        "| | ms/image | start s |",
        "| --- | --- | --- |",
    ]
    return [*lines, *(f"| {r['way']} | {r['ms_per_image']} | {r['start_s']} |" for r in rows)]


if __name__ == "__main__":
    main()
