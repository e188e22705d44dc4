"""The table and the picture of what ``benchmarks.cuda_overhead`` measured.

Run as ``python -m benchmarks.cuda_plot``; needs no card. Over the unpatched graph stand, for each
model, its settings and batch size, the redirect, its form without a reduction, both also with
regraft's own operators, the variant kv, and the paper taken literally.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

from benchmarks.cuda_cells import key_of, rows_of
from benchmarks.machine import RESULTS
from regraft.engines.ort_cuda.operators import source_sha256

RIVALS = {
    "literal": "#9aa5b1",
    "patched": "#2563eb",
    "patched, operators": "#93b4f5",
    "variant kv": "#b45309",
    "constant": "#0f766e",
    "constant, operators": "#7fd1c4",
}
_WIDTH = 0.84  # of a cell's bars
_COLUMNS = 5  # panels in a row
_PRESENT = source_sha256()[:16]  # the operators as they are now
# Versions whose kernels are the same machine code (cuobjdump, sm_90): one for these figures.
_SAME_KERNELS = {"ee4fe60770886471": "9129a8bfd7973179"}
NAMES = {
    "literal": "the paper, literally",
    "patched, operators": "patched, both with own operators",
    "constant": "value = constant",
    "constant, operators": "value = constant, both with own operators",
}


def main() -> None:
    """Writes the table (.md) and the picture (.png) beside the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, nargs="?", default=RESULTS / "cuda_overhead.json")
    args = parser.parse_args()
    cells = json.loads(args.result.read_text())["cells"]
    lines = [f"# {args.result.stem}", ""]
    for cell in cells:
        versions = ", ".join(f"{name} {v}" for name, v in cell["versions"].items())
        host = f"{cell['processor']}, {cell['cores']} cores"
        about = f"`{cell['command']}`; {cell['clocks']}; {host}; {versions}"
        lines += [*rows_of(cell), "", about, ""]
    args.result.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    _plot(cells, args.result.with_suffix(".png"))


def _plot(cells: list[dict[str, Any]], path: Path) -> None:
    """A panel for each model with its settings; what was not measured has no bar."""
    mpl.use("Agg")
    panels: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["rivals"]:
            panels.setdefault(key_of(cell)[:-1], []).append(cell)
    if not panels:
        raise SystemExit("no cell of the result has figures, so there is nothing to plot")
    measured = [cell for chosen in panels.values() for cell in chosen]
    shown = [rival for rival in RIVALS if any(rival in cell["rivals"] for cell in measured)]
    if not shown:
        raise SystemExit("the result has unpatched graphs alone, so there is nothing to plot")
    own = " with operators" if all(rival.endswith(", operators") for rival in shown) else ""
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 3.4 * rows), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    most = _operators_of_most(measured)
    for axis, chosen in zip(axes.flat, panels.values(), strict=False):
        _panel(axis, sorted(chosen, key=lambda cell: int(cell["batch"])), shown, most)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel(f"time over the unpatched graph{own}, %", fontsize=8)
    bars = {
        label: bar
        for axis in axes.flat
        for bar, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        bars.values(),
        bars.keys(),
        fontsize=7,
        frameon=False,
        ncols=len(shown),
        loc="outside lower center",
    )
    figure.suptitle(_title(measured, most), fontsize=10)
    figure.savefig(path, dpi=110)


def _title(cells: list[dict[str, Any]], most: str | None) -> str:
    devices = dict.fromkeys(cell["engine"]["device"] for cell in cells)
    title = f"ort-cuda, {'; '.join(devices)}; lines: 95 % intervals"
    if most != _PRESENT:
        title += "; own operators of an earlier version"
    if any(_kernels_of(cell) != most for cell in cells):
        title += "; *: own operators of another version"
    return title


def _operators_of_most(cells: list[dict[str, Any]]) -> str | None:
    """The version of most cells, or the present one if any has it."""
    versions = Counter(_kernels_of(cell) for cell in cells)
    return _PRESENT if _PRESENT in versions else versions.most_common(1)[0][0]


def _kernels_of(cell: dict[str, Any]) -> str | None:
    """The version of a cell's operators; of several with the same kernels the last."""
    version = cell.get("operators")
    return _SAME_KERNELS.get(version, version) if version else None


def _tenths(percent: float) -> str:
    return f"{round(percent, 1) + 0.0:.1f}"  # no -0.0


def _panel(axis: Any, cells: list[dict[str, Any]], shown: list[str], most: str | None) -> None:
    width = _WIDTH / len(shown)
    for i, rival in enumerate(shown):
        known = [(x, c["rivals"][rival]) for x, c in enumerate(cells) if rival in c["rivals"]]
        if not known:
            continue
        places = [x + width * (i - (len(shown) - 1) / 2) for x, _ in known]
        over = [[100 * (x - 1) for x in figures["over_baseline"]] for _, figures in known]
        heights = [median for median, _, _ in over]
        reach = [[m - low for m, low, _ in over], [high - m for m, _, high in over]]
        bars = axis.bar(
            places, heights, width, color=RIVALS[rival], label=NAMES.get(rival, rival),
            yerr=reach, error_kw={"elinewidth": 0.6, "ecolor": "#52606d"},
        )  # fmt: skip
        axis.bar_label(bars, fmt=_tenths, fontsize=4.5 if len(shown) > 3 else 6, padding=1)
    first = cells[0]
    about = f"{first['tokens']} tokens, {first['precision']}, {first['neurons']} neurons in"
    layers = f"{len(first['touched_layers'])} of {first['blocks']} blocks"
    axis.set_title(f"{first['model']}\n{about} {layers}", fontsize=7)
    labels = [f"{c['batch']}{'*' if _kernels_of(c) != most else ''}" for c in cells]
    axis.set_xticks(range(len(cells)), labels)
    axis.set_xlim(-0.6, max(len(cells), 3) - 0.4)  # a bar is nowhere much wider than elsewhere
    axis.set_xlabel("batch", fontsize=8)
    axis.axhline(0, color="#52606d", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
