"""Engines by name, and :func:`open_engine`, which opens the one asked for or says why not.

An engine that was asked for and cannot run is an error, never a silent fallback. A new engine is
one module and one row in :data:`MODULES`.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from regraft.engines.base import Engine, EngineOptions, Shape
from regraft.errors import EngineError, InputError

__all__ = ["AUTO", "NAMES", "Engine", "EngineOptions", "Shape", "open_engine"]

AUTO = "auto"
# Name -> module and class. Modules load on use: some import what is not installed everywhere.
# In the order in which `auto` tries them.
MODULES = {"ort-cpu": "regraft.engines.ort_cpu:OrtCpuEngine"}
# Names that the command line knows and a later version builds.
PLANNED = ("ort-cuda", "tensorrt", "openvino")
NAMES = (AUTO, *MODULES, *PLANNED)


def open_engine(
    graph: Path,
    engine: str = AUTO,
    *,
    precision: str = "fp32",
    options: EngineOptions | None = None,
) -> Engine:
    """Opens a graph with an engine.

    Args:
        graph: the ONNX file.
        engine: one of :data:`NAMES`; ``auto`` takes the first that can run here, and the result's
            ``name`` says which.
        precision: fp32, fp16 or bf16, as the bundle's manifest says.
        options: how the engine may use the machine.

    Raises:
        InputError: there is no engine of that name.
        EngineError: it cannot run here, cannot run this precision, or refuses the graph.
    """
    if engine not in NAMES:
        raise InputError(f"there is no engine {engine!r}; expected one of {', '.join(NAMES)}")
    if engine in PLANNED:
        raise EngineError(f"{engine}: is not in this version; use {' or '.join(MODULES)}")
    kind = _first_available(precision) if engine == AUTO else _load(engine)
    return kind(graph, precision, options or EngineOptions())


def _load(name: str) -> type[Engine]:
    module, _, kind = MODULES[name].partition(":")
    loaded: type[Engine] = getattr(importlib.import_module(module), kind)
    return loaded


def _first_available(precision: str) -> type[Engine]:
    reasons = []
    for name in MODULES:
        kind = _load(name)
        reason = kind.unavailable(precision)
        if reason is None:
            return kind
        reasons.append(f"{name}: {reason}")
    raise EngineError(f"no engine can run here: {'; '.join(reasons)}")
