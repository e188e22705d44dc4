"""Engines by name, and :func:`open_graph`, which opens the one asked for or says why not.

An engine that was asked for and cannot run is an error, never a silent fallback; nor is one that
needs a build ever built silently. A new engine is one module and one row in :data:`MODULES`.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from regraft import engine_cache
from regraft.engine_key import CacheKey, graph_hashes
from regraft.engines.base import Engine
from regraft.engines.options import (
    BuildOption,
    BuildOptions,
    BuildProgress,
    EngineOptions,
    Shape,
)
from regraft.errors import EngineError, InputError

if TYPE_CHECKING:
    from regraft.bundle import Bundle

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
    "open_graph",
]

# ONNX Runtime (from 1.29 on) reports to its maker as soon as it is imported, and leaves an
# identifier in the home folder; `disable_telemetry_events` comes too late for that. Nobody asked
# for either.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_log = logging.getLogger("regraft")
AUTO = "auto"
# Name -> module and class. Modules load on use: some import what is not installed everywhere.
MODULES = {
    "ort-cpu": "regraft.engines.ort_cpu:OrtCpuEngine",
    "openvino": "regraft.engines.openvino:OpenVinoEngine",
    "ort-cuda": "regraft.engines.ort_cuda.engine:OrtCudaEngine",
    "tensorrt": "regraft.engines.tensorrt.engine:TensorrtEngine",
}
# What `auto` tries, in this order, of those in MODULES. openvino has to be asked for.
AUTO_ORDER = ("tensorrt", "ort-cuda", "ort-cpu")
NAMES = (AUTO, *MODULES)


def open_graph(
    bundle: Bundle,
    graph: str = "model",
    engine: str = AUTO,
    options: EngineOptions | None = None,
    *,
    built: Path | None = None,
) -> Engine:
    """Opens a graph of a bundle with an engine, in the form that the engine prefers.

    Args:
        bundle: which holds the graph.
        graph: one of :data:`regraft.manifest.GRAPHS`.
        engine, options, built: as of :func:`open_engine`.

    Raises:
        BundleError: the bundle does not hold the graph.
        InputError, EngineError: as :func:`open_engine`.
    """
    return open_engine(
        bundle.graph(graph),
        engine,
        precision=bundle.manifest.precision,
        options=options,
        built=built,
        variants=bundle.variants(graph),
    )


def open_engine(
    graph: Path,
    engine: str = AUTO,
    *,
    precision: str = "fp32",
    options: EngineOptions | None = None,
    built: Path | None = None,
    variants: Mapping[str, Path] | None = None,
) -> Engine:
    """Opens a file with an engine; :func:`open_graph` does it for a bundle's.

    Args:
        graph: the ONNX file.
        engine: one of :data:`NAMES`; ``auto`` takes the first that can run here, and the result's
            ``name`` says which.
        precision: fp32, fp16 or bf16, as the bundle's manifest says.
        options: how the engine may use the machine.
        built: for an engine that needs a build, a folder that its ``build`` wrote a moment ago,
            which is opened unchecked; None takes the one of the cache that was built last.
        variants: forms of the graph that an engine may prefer, see
            :meth:`regraft.bundle.Bundle.variants`.

    Raises:
        InputError: there is no engine of that name.
        EngineError: it cannot run here, cannot run this precision, refuses the graph, or was not
            built on this machine.
    """
    options, variants = options or EngineOptions(), variants or {}
    if engine == AUTO:
        return _first_available(graph, precision, options, variants)
    kind = engine_class(engine)
    precision = kind.arithmetic(precision, options.precision)
    graph = kind.file_of(graph, variants)
    if kind.is_built and built is None:
        if opened := _from_cache(kind, graph, precision, options):
            return opened
        if kind.must_be_built(precision, graph):
            asked = f" --precision {precision}" if options.precision else ""
            raise EngineError(
                f"{engine}: {graph.name} was not built in {precision} on this machine, or for "
                "another version, device or content; "
                f"run: regraft build {graph.parent} --engine {engine}{asked} --images DIR"
            )
        _warn_unverified(engine, graph)
    return kind(graph, precision, options, built)


def engine_class(name: str) -> type[Engine]:
    """The class of an engine; loads its module.

    Raises:
        InputError: there is no engine of that name.
    """
    if name in MODULES:
        module, _, kind = MODULES[name].partition(":")
        loaded: type[Engine] = getattr(importlib.import_module(module), kind)
        return loaded
    raise InputError(f"there is no engine {name!r}; expected one of {', '.join(NAMES)}")


def cache_key(
    kind: type[Engine], graph: Path, precision: str, options: BuildOptions | None = None
) -> CacheKey:
    """What a built engine depends on, here and now.

    Args:
        kind: an engine with ``is_built`` that is available.
        graph: the ONNX file.
        precision: as ``kind.arithmetic`` says.
        options: every build option; None where they do not matter.
    """
    version, device = kind.environment()
    version += kind.toolchain(graph)
    graph_sha256, weights_sha256 = graph_hashes(graph)
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


def _warn_unverified(engine: str, graph: Path) -> None:
    _log.warning(
        "%s: %s was not verified on this machine; regraft build %s --engine %s --images DIR",
        engine,
        graph.name,
        graph.parent,
        engine,
    )


def _first_available(
    graph: Path, precision: str, options: EngineOptions, variants: Mapping[str, Path]
) -> Engine:
    reasons: list[str] = []
    passed_over: list[str] = []
    for kind in (engine_class(name) for name in AUTO_ORDER if name in MODULES):
        reason = kind.unavailable(precision)
        if reason is not None:
            reasons.append(f"{kind.name}: {reason}")
            continue
        file, asked = kind.file_of(graph, variants), kind.arithmetic(precision, options.precision)
        if not kind.is_built:
            for name in passed_over:
                _log.warning(
                    "auto: %s could run here, but %s is not built; runs %s. regraft build %s "
                    "--engine %s --images DIR",
                    *(name, graph.name, kind.name, graph.parent, name),
                )
            return kind(file, asked, options)
        if opened := _from_cache(kind, file, asked, options):
            return opened
        if not kind.must_be_built(asked, file):
            _warn_unverified(kind.name, file)
            return kind(file, asked, options)
        reasons.append(f"{kind.name}: is not built; `regraft build` does it")
        if file != graph:  # the bundle has a graph for this engine, so its user expects it
            passed_over.append(kind.name)
    raise EngineError(f"no engine can run here: {'; '.join(reasons)}")
