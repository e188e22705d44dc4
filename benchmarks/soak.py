"""Hours of good, bad and broken requests to `regraft serve`: what it answers, and what it keeps.

Run as ``python -m benchmarks.soak BUNDLE``; ``--seconds`` (an hour) and ``--clients`` (8) bound it,
and nothing leaves 127.0.0.1. Every client draws what it does next: good requests over HTTP and
gRPC, each answer compared with the Extractor's; wrong ones, each with the status that it must get;
and connections that are cut at random, within a request or before its answer. Fails if an answer
is wrong, a whole request is not answered, memory, descriptors or threads grow, or the server does
not end with 0. Writes what it counted as JSON to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import circumstances
from benchmarks.served import Served, serving
from benchmarks.soak_client import Client, Wrong
from benchmarks.soak_expected import Expected

_GROWTH_MB = 24.0  # of the median memory, from the second quarter of the time to the last one
_GROWTH_COUNT = 16  # of descriptors and threads, likewise
_EVERY = 5.0  # seconds between looks at the server


def main() -> int:
    """Runs the soak; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON file (default: none)")
    args = parser.parse_args()
    expected = Expected(args.bundle)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        words = [f"vit={args.bundle}", "--max-body", "8", "--drain-delay", "0"]
        with serving(words, log) as server:
            counts, wrong, looks = _load(server, expected, args)
            faults = [*wrong, *_growth(looks), *_left_over(server)]
            if (code := server.stop()) != 0:
                faults.append(f"the server ended with {code}")
        said = log.read_text()
        if "Traceback" in said:
            faults.append(f"the server's log has a traceback: {said[-2000:]}")
    result = {
        **circumstances("benchmarks.soak"),
        "seconds": args.seconds,
        "counts": dict(sorted(counts.items())),
        "looks": looks[:: max(1, len(looks) // 60)],
        "faults": faults[:50],
    }
    print(json.dumps({k: v for k, v in result.items() if k != "looks"}, indent=1))
    print("first and last look:", looks[:1], looks[-1:])
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if faults else 0


def _load(
    server: Served, expected: Expected, args: argparse.Namespace
) -> tuple[Counter[str], list[str], list[dict[str, Any]]]:
    """What the clients counted and found wrong, and the looks at the server meanwhile."""
    until = time.monotonic() + args.seconds
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        with Client(server, expected, random.Random(args.seed * 1000 + number)) as client:
            while time.monotonic() < until and len(wrong) < 50:
                outcome = fault = ""
                try:
                    outcome = client.step()
                except Wrong as error:
                    fault = str(error)
                except Exception as error:
                    fault = f"{client.doing}: {type(error).__name__}: {error}"[:400]
                with lock:
                    counts[f"{client.doing}{f': {outcome}' if outcome else ''}"] += 1
                    if fault:
                        wrong.append(fault)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(args.clients)]
    for thread in threads:
        thread.start()
    begun, looks = time.monotonic(), []
    while any(thread.is_alive() for thread in threads):
        if not server.alive():
            wrong.append("the server ended by itself")
            break
        looks.append(
            {
                "at": round(time.monotonic() - begun),
                "memory_mb": round(server.memory_mb(), 1),
                "files": server.open_files(),
                "threads": server.threads(),
            }
        )
        time.sleep(min(_EVERY, args.seconds / 40))
    for thread in threads:
        thread.join()
    return counts, wrong, looks


def _growth(looks: list[dict[str, Any]]) -> list[str]:
    quarter = len(looks) // 4
    faults = []
    limits = {"memory_mb": _GROWTH_MB, "files": _GROWTH_COUNT, "threads": _GROWTH_COUNT}
    for name, limit in limits.items():
        early = median(look[name] for look in looks[quarter : 2 * quarter] or looks)
        late = median(look[name] for look in looks[-quarter:] or looks)
        if late - early > limit:
            faults.append(f"{name} grew from {early} to {late}")
    return faults


def _left_over(server: Served) -> list[str]:
    """What the server still holds, a moment after the last request."""
    time.sleep(2)
    text = server.get("/metrics").decode()
    rows = [line for line in text.splitlines() if line.startswith("nv_inference_pending")]
    return [f"still in the queue: {row}" for row in rows if not row.endswith(" 0")]


if __name__ == "__main__":
    sys.exit(main())
