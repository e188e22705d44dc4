"""The cells of ``benchmarks.cuda_overhead``: how they are kept, and as a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import circumstances, write_results


def keep(path: Path, cell: dict[str, Any]) -> None:
    """Puts a cell into the result file, in place of one of the same name."""
    known = json.loads(path.read_text())["cells"] if path.exists() else []
    same = [c for c in known if key_of(c) == key_of(cell)]
    if not cell["rivals"] and any(c["rivals"] for c in same):
        print("failed; what was measured before is kept", file=sys.stderr)
        return
    lost = {name for c in same for name in c["rivals"]} - {*cell["rivals"], *cell["failures"]}
    if lost:
        print(
            f"{path} has this cell with {', '.join(sorted(lost))}, too, and keeps it; choose "
            "another --out",
            file=sys.stderr,
        )
        return
    cells = [c for c in known if c not in same] + [cell]
    table = [line for c in cells for line in ["", *rows_of(c)]]
    write_results(path, {**circumstances("benchmarks.cuda_overhead"), "cells": cells}, table)


def key_of(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a cell another one."""
    names = ("model", "image_size", "blocks", "precision", "touched_layers", "neurons", "batch")
    return tuple(str(cell[name]) for name in names)


def rows_of(cell: dict[str, Any]) -> list[str]:
    """A cell as Markdown."""
    size, engine = "x".join(map(str, cell["image_size"])), cell.get("engine", {})
    rows = [
        f"{cell['model']}, {size}, {cell['tokens']} tokens, {cell['blocks']} blocks, "
        f"{cell['precision']}, batch "
        f"{cell['batch']}, {cell['neurons']} neurons in layers {cell['touched_layers']}, "
        f"{engine.get('device', cell['clocks'])}, ONNX Runtime {engine.get('onnxruntime', '?')}, "
        f"operators {cell.get('operators', 'of an earlier version')}",
        "",
        "| rival | ms | single run (p99) | over baseline | hooks over it | images/s | MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, f in cell["rivals"].items():
        over = "{} ({} to {})".format(*f["over_baseline"])
        first = f"{f['first_ms']} ({f['first_p99_ms']})"
        hooks = f["hooks_over_it"][0] if f["hooks_over_it"] else "-"
        row = (name, f["median_ms"], first, over, hooks, f["images_per_second"])
        rows.append("| " + " | ".join(map(str, (*row, f["memory_mib"]))) + " |")
    failed = [f"- {name}: {reason}" for name, reason in cell.get("failures", {}).items()]
    return [*rows, *(["", "Not measured:", "", *failed] if failed else [])]
