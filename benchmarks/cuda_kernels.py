"""Where the time goes on a card: the kernels of forms of the graph, and of torch.compile's.

Run as ``python -m benchmarks.cuda_kernels``. Counts and times per run, from CUPTI through PyTorch's
profiler, which sees every kernel of the process. Profiled runs are slower than others; the sums
here explain a difference, ``benchmarks.cuda_overhead`` measures it.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks import vits
from benchmarks.cuda_forms import FORMS
from benchmarks.cuda_graphs import OUTPUT, open_cuda, write_forms
from benchmarks.machine import RESULTS, circumstances
from regraft_export.trace import DTYPES, trace

RUNS = 20


def main() -> None:
    """Profiles and writes the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name")
    parser.add_argument("--image-size", type=int, help="pixels (default: the model's)")
    parser.add_argument("--precision", default="fp16", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--touched", type=int, nargs="+", default=[4, 5, 6], help="layers")
    parser.add_argument("--neurons", type=int, default=10, help="in all")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS / "cuda_kernels.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    vit = vits.load(args.model, args.image_size)
    size = vits.image_size(vit)
    result: dict[str, Any] = {**circumstances("benchmarks.cuda_kernels"), "model": args.model}
    result["image_size"] = list(size)
    with tempfile.TemporaryDirectory() as folder:
        neurons = vits.some_neurons(vit, args.touched, args.neurons)
        chosen = {name: FORMS[name] for name in args.forms}
        write_forms(Path(folder), trace(vit, size, args.precision), neurons, chosen)
        for batch in args.batch_sizes:
            pixels = np.random.default_rng(0).normal(size=(batch, 3, *size)).astype(np.float32)
            found = result[f"batch {batch}"] = {}
            for name in chosen:
                with open_cuda(Path(folder), name, args.precision) as engine:
                    engine.run(pixels, [OUTPUT])
                    found[name] = kernels(partial(engine.device_seconds, batch, RUNS))
            if not args.no_compile:
                found["torch.compile"] = kernels(_compiled(vit, pixels, args.precision))
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for batch in args.batch_sizes:
        for name, rows in result[f"batch {batch}"].items():
            total = sum(us for _, us in rows.values())
            print(f"\nbatch {batch}, {name}: {total:.1f} us")
            for kernel, (count, us) in list(rows.items())[:25]:
                print(f"{us:9.1f} us {count:6.1f} x {kernel[:110]}")


def _compiled(vit: Any, pixels: Any, precision: str) -> Callable[[], object]:
    module = copy.deepcopy(vit.module).to(DTYPES[precision]).cuda()
    compiled: Any = torch.compile(module, mode="reduce-overhead")
    tensor = torch.from_numpy(pixels).cuda().to(DTYPES[precision])

    def work() -> None:
        with torch.inference_mode():
            for _ in range(RUNS):
                compiled(tensor)
        torch.cuda.synchronize()

    return work


def kernels(work: Callable[[], object]) -> dict[str, tuple[float, float]]:
    """Kernel -> how often and how many microseconds per run, largest first."""
    for _ in range(3):
        work()
    profiler: Any = profile
    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        work()
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in found.profiler.kineto_results.events():
        if event.device_type() == DeviceType.CUDA:
            sums[event.name()][0] += 1 / RUNS
            sums[event.name()][1] += event.duration_ns() / 1e3 / RUNS
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    return {name: (round(count, 2), round(us, 2)) for name, (count, us) in ordered}


if __name__ == "__main__":
    main()
