"""The table and the picture of what ``benchmarks.cuda_overhead`` measured.

Run as ``python -m benchmarks.cuda_plot``; needs no card. Over the unpatched graph stand, for each
model and batch size, the redirect, its variant without a reduction, and the paper taken literally.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

from benchmarks.cuda_overhead import _rows
from benchmarks.machine import RESULTS

RIVALS = {"patched": "#2563eb", "constant": "#0f9d8a", "literal": "#9aa5b1"}
NAMES = {"constant": "value = constant", "literal": "the paper, literally"}


def main() -> None:
    """Writes the table (.md) and the picture (.png) beside the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, nargs="?", default=RESULTS / "cuda_overhead.json")
    args = parser.parse_args()
    cells = json.loads(args.result.read_text())["cells"]
    lines = [f"# {args.result.stem}", ""]
    for cell in cells:
        versions = ", ".join(f"{name} {v}" for name, v in cell["versions"].items())
        lines += [*_rows(cell), "", f"`{cell['command']}`; {cell['clocks']}; {versions}", ""]
    args.result.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    _plot(cells, args.result.with_suffix(".png"))


def _plot(cells: list[dict[str, Any]], path: Path) -> None:
    mpl.use("Agg")
    models = list(dict.fromkeys((c["model"], c["tokens"], c["blocks"]) for c in cells))
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(3 * len(models), 3.6), sharey=True, layout="constrained"
    )
    for axis, (model, tokens, blocks) in zip(axes, models, strict=True):
        chosen = [c for c in cells if (c["model"], c["tokens"]) == (model, tokens)]
        for i, (rival, colour) in enumerate(RIVALS.items()):
            places = [x + 0.27 * (i - 1) for x in range(len(chosen))]
            heights = [100 * (c["rivals"][rival]["over_baseline"][0] - 1) for c in chosen]
            bars = axis.bar(places, heights, 0.25, color=colour, label=NAMES.get(rival, rival))
            axis.bar_label(bars, fmt="%.1f", fontsize=6, padding=2)
        layers = len(chosen[0]["touched_layers"])
        axis.set_title(f"{model}\n{tokens} tokens, {layers} of {blocks} blocks touched", fontsize=8)
        axis.set_xticks(range(len(chosen)), [str(c["batch"]) for c in chosen])
        axis.set_xlabel("batch", fontsize=8)
        axis.axhline(0, color="#52606d", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("time over the unpatched graph, %", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    device = cells[0]["engine"]["device"]
    figure.suptitle(f"ort-cuda, {cells[0]['precision']}, {device}", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
