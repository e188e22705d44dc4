"""What a measurement was made with, and results as JSON with a Markdown table beside it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from regraft.engines.cores import processor
from regraft.timing import Ratio

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "timm", "transformers", "onnx", "onnxruntime", "numpy", "pillow")


def circumstances(module: str) -> dict[str, Any]:
    """Command, processor, cores, versions."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: v for name in _PACKAGES if (v := _version(name))},
    }


def card_clocks() -> str:
    """Name and clocks of the first card in CUDA_VISIBLE_DEVICES, as nvidia-smi tells them."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["-i", card, "--query-gpu=name,clocks.sm,clocks.mem,clocks.max.sm"]
    command = ["nvidia-smi", *query, "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout if done.returncode == 0 else f"unknown: {done.stdout}").strip()


def rounded(ratio: Ratio, digits: int) -> list[float]:
    """Median, lower and upper end of its interval, as results keep a ratio."""
    return [round(x, digits) for x in (ratio.median, ratio.low, ratio.high)]


def write_results(path: Path, result: Mapping[str, Any], table: Sequence[str]) -> None:
    """Writes ``path`` (JSON) and the table beside it (.md)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    heading = f"# {path.stem}\n\n`{result['command']}`\n\n{result['processor']}, "
    heading += f"{result['cores']} cores; Python {result['python']}; "
    heading += ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    text = heading + "\n\n" + "\n".join(table) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        if name == "onnxruntime":  # which several packages bring, also side by side
            return str(importlib.import_module(name).__version__)
        return version(name)
    except (PackageNotFoundError, ModuleNotFoundError):
        return None
