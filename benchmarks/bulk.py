"""`regraft extract` into a folder: one process, several, and a Ray cluster on the same machine.

Run as ``python -m benchmarks.bulk BUNDLE``, in an environment that has Ray for its row. Whole
commands are timed, start included, on two numbers of images, so that start-up and time per image
come apart: on N equal machines Ray needs start + per_image * images / N. On a card, where decoding
is the limit, ``--processes`` shows what several processes gain, each with the engine for itself.
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
from benchmarks.machine import RESULTS, card_clocks, circumstances, write_results
from regraft.bundle import Bundle

RAY = "ray, one node"


def main() -> None:
    """Measures and writes benchmarks/results/bulk.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--images", type=int, nargs=2, default=(16, 112), metavar="N")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--megapixels", type=float, default=2.0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--batch-size", type=int, help="default: the command's")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "bulk.json")
    args = parser.parse_args()
    result = {**circumstances("benchmarks.bulk"), **_measure(args)}
    table = _table(result)
    print("\n".join(table))
    write_results(args.out, result, table)


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    few, many = sorted(args.images)
    manifest = Bundle.open(args.bundle).manifest
    ways = {str(n): ["--processes", str(n)] for n in args.processes}
    if importlib.util.find_spec("ray") is not None:
        ways[RAY] = ["--ray"]
    batch = ["--batch-size", str(args.batch_size)] if args.batch_size else []
    engines = set[str]()
    seconds: dict[str, dict[int, list[float]]] = {way: {few: [], many: []} for way in ways}
    with tempfile.TemporaryDirectory() as temporary:
        paths = pictures(Path(temporary), 16, args.megapixels)
        for number in range(args.rounds):
            for way in list(ways) if number % 2 == 0 else list(reversed(ways)):
                for count, taken in seconds[way].items():
                    words = ["--engine", args.engine, *batch, *ways[way]]
                    took, engine = _time(args.bundle, _copies(paths, count), count, words)
                    taken.append(took)
                    engines.add(engine)
    about = {"model": manifest.model["source"], "precision": manifest.precision}
    about |= {"engine": ", ".join(sorted(engines)), "megapixels": args.megapixels}
    card = {"card": card_clocks()} if engines & {"ort-cuda", "tensorrt"} else {}
    return {**about, **card, "rows": [_row(way, times) for way, times in seconds.items()]}


def _copies(paths: list[Path], count: int) -> Path:
    """A folder of so many pictures: links, each with a name of its own."""
    folder = paths[0].with_name(f"{count} pictures")
    if not folder.exists():
        folder.mkdir()
        for i in range(count):
            (folder / f"{i:06d}.jpg").hardlink_to(paths[i % len(paths)])
    return folder


def _time(bundle: str, images: Path, count: int, words: list[str]) -> tuple[float, str]:
    """Seconds of the whole command, and the engine that it chose."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "features"
        command = [sys.executable, "-m", "regraft", "extract", bundle, str(images)]
        command += ["--out", str(out), "--outputs", "cls", "--json", *words]
        started = time.perf_counter()
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        took = time.perf_counter() - started
        if done.returncode != 0:
            raise SystemExit(done.stderr.strip() or f"extract ended with {done.returncode}")
        summary = json.loads(done.stdout)
        if summary["images"] != count:
            raise SystemExit("not every image was extracted")
        if pq.read_table(out)["cls"].null_count:
            raise SystemExit("features are missing")
    return took, summary["engine"]


def _row(way: str, times: dict[int, list[float]]) -> dict[str, Any]:
    (few, short), (many, long) = ((count, min(taken)) for count, taken in times.items())
    per_image = (long - short) / (many - few)
    return {
        "way": way,
        "seconds": {str(count): [round(s, 2) for s in taken] for count, taken in times.items()},
        "ms_per_image": round(per_image * 1e3, 3),
        "start_s": round(short - per_image * few, 1),
    }


def _table(result: dict[str, Any]) -> list[str]:
    card = f", {result['card']}" if "card" in result else ""
    lines = [
        f"{result['model']}, {result['precision']}, {result['engine']}{card}; JPEG files of "
        f"{result['megapixels']} megapixels, `cls` into a folder. Whole commands, best of the "
        "rounds; start is what is left at no image.",
        "",
        "| processes | ms/image | images/s | start s |",
        "| --- | --- | --- | --- |",
    ]
    rows = [(r["way"], r["ms_per_image"], r["start_s"]) for r in result["rows"]]
    return [*lines, *(f"| {way} | {ms} | {1e3 / ms:.0f} | {start} |" for way, ms, start in rows)]


if __name__ == "__main__":
    main()
