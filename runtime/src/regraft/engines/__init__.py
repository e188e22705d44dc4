"""Engines by name, and :func:`open_engine`, which opens the one asked for or says why not.

An engine that was asked for and cannot run is an error, never a silent fallback; nor is one that
needs a build ever built silently. A new engine is one module and one row in :data:`MODULES`.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from regraft import engine_cache
from regraft.engine_cache import CacheKey
from regraft.engines.base import (
    BuildOption,
    BuildOptions,
    BuildProgress,
    Engine,
    EngineOptions,
    Shape,
)
from regraft.errors import EngineError, InputError

__all__ = [
    "AUTO",
    "NAMES",
    "BuildOption",
    "BuildOptions",
    "BuildProgress",
    "Engine",
    "EngineOptions",
    "Shape",
    "cache_key",
    "engine_class",
    "open_engine",
]

# ONNX Runtime (from 1.29 on) reports to its maker as soon as it is imported, and leaves an
# identifier in the home folder; `disable_telemetry_events` comes too late for that. Nobody asked
# for either.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

AUTO = "auto"
# Name -> module and class. Modules load on use: some import what is not installed everywhere.
MODULES = {
    "ort-cpu": "regraft.engines.ort_cpu:OrtCpuEngine",
    "openvino": "regraft.engines.openvino:OpenVinoEngine",
    "tensorrt": "regraft.engines.tensorrt.engine:TensorrtEngine",
}
# What `auto` tries, in this order, of those in MODULES. openvino has to be asked for.
AUTO_ORDER = ("tensorrt", "ort-cuda", "ort-cpu")
# Names that the command line knows and a later version builds.
PLANNED = ("ort-cuda",)
NAMES = (AUTO, *MODULES, *PLANNED)


def open_engine(
    graph: Path,
    engine: str = AUTO,
    *,
    precision: str = "fp32",
    options: EngineOptions | None = None,
    built: Path | None = None,
) -> Engine:
    """Opens a graph with an engine.

    Args:
        graph: the ONNX file.
        engine: one of :data:`NAMES`; ``auto`` takes the first that can run here, and the result's
            ``name`` says which.
        precision: fp32, fp16 or bf16, as the bundle's manifest says.
        options: how the engine may use the machine.
        built: for an engine that needs a build, a folder that its ``build`` wrote a moment ago,
            which is opened unchecked; None takes the one of the cache that was built last.

    Raises:
        InputError: there is no engine of that name.
        EngineError: it cannot run here, cannot run this precision, refuses the graph, or was not
            built on this machine.
    """
    options = options or EngineOptions()
    if engine == AUTO:
        return _first_available(graph, precision, options)
    kind = engine_class(engine)
    precision = kind.arithmetic(precision, options.precision)
    if kind.needs_build and built is None:
        opened = _from_cache(kind, graph, precision, options)
        if opened is None:
            asked = f" --precision {precision}" if options.precision else ""
            raise EngineError(
                f"{engine}: {graph.name} was not built in {precision} on this machine, or for "
                "another version, device or content; "
                f"run: regraft build {graph.parent} --engine {engine}{asked} --images DIR"
            )
        return opened
    return kind(graph, precision, options, built)


def engine_class(name: str) -> type[Engine]:
    """The class of an engine; loads its module.

    Raises:
        InputError: there is no engine of that name.
        EngineError: this version does not have it.
    """
    if name in MODULES:
        module, _, kind = MODULES[name].partition(":")
        loaded: type[Engine] = getattr(importlib.import_module(module), kind)
        return loaded
    if name in PLANNED:
        raise EngineError(f"{name}: is not in this version; use {' or '.join(MODULES)}")
    raise InputError(f"there is no engine {name!r}; expected one of {', '.join(NAMES)}")


def cache_key(
    kind: type[Engine], graph: Path, precision: str, options: BuildOptions | None = None
) -> CacheKey:
    """What a built engine depends on, here and now.

    Args:
        kind: an engine with ``needs_build`` that is available.
        graph: the ONNX file.
        precision: as ``kind.arithmetic`` says.
        options: every build option; None where they do not matter.
    """
    version, device = kind.environment()
    graph_sha256, weights_sha256 = engine_cache.graph_hashes(graph)
    return CacheKey(
        engine=kind.name,
        version=version,
        device=device,
        precision=precision,
        graph_sha256=graph_sha256,
        weights_sha256=weights_sha256,
        options=dict(options or {}),
    )


def _from_cache(
    kind: type[Engine], graph: Path, precision: str, options: EngineOptions
) -> Engine | None:
    """What was built of a graph, opened; None if it was not built. A damaged entry is an error."""
    if reason := kind.unavailable(precision):
        raise EngineError(f"{kind.name}: {reason}")
    key = cache_key(kind, graph, precision)
    with engine_cache.held(key):
        entry = engine_cache.latest(key, graph)
        return None if entry is None else kind(graph, precision, options, entry.folder)


def _first_available(graph: Path, precision: str, options: EngineOptions) -> Engine:
    reasons = []
    for kind in (engine_class(name) for name in AUTO_ORDER if name in MODULES):
        reason = kind.unavailable(precision)
        if reason is None and kind.needs_build:
            asked = kind.arithmetic(precision, options.precision)
            if opened := _from_cache(kind, graph, asked, options):
                return opened
            reason = "is not built; `regraft build` does it"
        elif reason is None:
            return kind(graph, kind.arithmetic(precision, options.precision), options)
        reasons.append(f"{kind.name}: {reason}")
    raise EngineError(f"no engine can run here: {'; '.join(reasons)}")
