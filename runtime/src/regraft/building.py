"""Building engines: compiled for this machine, verified on images, and only then cached.

A build that is interrupted, refused, or misses a limit of the parity gate leaves the cache as it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.bundle import Bundle
from regraft.engine_cache import Draft, latest, new_entry
from regraft.engine_key import CacheKey
from regraft.engines import (
    BuildOption,
    BuildOptions,
    BuildProgress,
    Engine,
    EngineOptions,
    cache_key,
    engine_class,
)
from regraft.errors import EngineError, InputError, UsageError
from regraft.verification import Reference, Verification, verify

# What an engine runs; the probes always run on ort-cpu.
GRAPHS = ("model", "baseline")


@dataclass(frozen=True)
class Plan:
    """What a build would do.

    Attributes:
        kind: the engine.
        precision: of its arithmetic.
        options: every build option of the engine.
        keys: graph name -> cache key; empty for an engine that is not built.
        graphs: graph name -> the file of it that the engine takes.
    """

    kind: type[Engine]
    precision: str
    options: BuildOptions
    keys: Mapping[str, CacheKey] = field(default_factory=dict)
    graphs: Mapping[str, Path] = field(default_factory=dict)


def plan(
    bundle: Bundle, engine: str, given: Mapping[str, str], precision: str | None = None
) -> Plan:
    """Checks everything that can be checked before the work.

    Args:
        bundle: what to build for.
        engine: by name; not ``auto``.
        given: build options as typed.
        precision: of the arithmetic; None for the bundle's.

    Raises:
        UsageError: there is no such build option, or a value is wrong.
        EngineError: the engine cannot run here, or not in this precision.
    """
    kind = engine_class(engine)
    resolved = kind.arithmetic(bundle.manifest.precision, precision)
    if reason := kind.unavailable(resolved):
        raise EngineError(f"{engine}: {reason}")
    options = resolve_options(engine, kind.build_options, given)
    kind.check_build(resolved, options)
    names = [g for g in GRAPHS if g in bundle.manifest.graphs] if kind.is_built else []
    graphs = {name: kind.file_of(bundle.graph(name), bundle.variants(name)) for name in names}
    keys = {name: cache_key(kind, graph, resolved, options) for name, graph in graphs.items()}
    return Plan(kind, resolved, options, keys, graphs)


def is_current(planned: Plan) -> bool:
    """Whether every graph was built like this, and nothing else was built of it since.

    Raises:
        EngineError: an entry is damaged or of unknown origin.
    """
    entries = {name: latest(key, planned.graphs[name]) for name, key in planned.keys.items()}
    return all(
        entry is not None and entry.folder == planned.keys[name].folder
        for name, entry in entries.items()
    )


def build(
    bundle: Bundle,
    planned: Plan,
    batches: Iterable[NDArray[np.float32]],
    reference: Reference,
    *,
    threads: int | None = None,
    progress: BuildProgress = lambda phase, done, total: None,
    on_batch: Callable[[int], None] | None = None,
    on_verified: Callable[[Verification], None] | None = None,
) -> tuple[Verification, dict[str, Any]]:
    """Builds, verifies, and puts what passed into the cache.

    Args:
        bundle: what to build for.
        planned: what :func:`plan` returned for it.
        batches: preprocessed images, each (B, 3, H, W) float32; at least one.
        reference: yields the right outputs.
        threads: inside one run; None for the cores that may be used.
        progress: is told how far a build is.
        on_batch: called with each verified batch's size.
        on_verified: called with the findings, before a missed limit becomes an error.

    Returns:
        The verification, and for each graph what was built, as JSON values.

    Raises:
        EngineError: the engine refuses a graph.
        InputError: there were no images.
        GateError: a limit was missed; nothing was cached.
    """
    reports: dict[str, Any] = {}
    with ExitStack() as stack:
        drafts: dict[str, Draft] = {}
        for name, key in planned.keys.items():
            graph = planned.graphs[name]
            draft = drafts[name] = stack.enter_context(new_entry(key, graph))
            reports[name] = planned.kind.build(
                graph, planned.precision, planned.options, draft.folder, progress
            )
        found = verify(
            bundle,
            batches,
            reference,
            planned.kind.name,
            EngineOptions(threads, precision=planned.precision),
            built={name: draft.folder for name, draft in drafts.items()},
            on_batch=on_batch,
        )
        if not found.images:
            raise InputError("none of the images could be read; parity is proven on real images")
        if on_verified:
            on_verified(found)
        found.gate()
        for name, draft in drafts.items():
            draft.report = {"build": reports[name], "verification": found.to_json()}
    is_current(planned)  # a damaged neighbour would stop whoever opens it next
    return found, reports


def resolve_options(
    engine: str, known: Iterable[BuildOption], given: Mapping[str, str]
) -> dict[str, int | str]:
    """Build options as typed, checked and completed with defaults.

    Raises:
        UsageError: an option does not exist or its value is wrong.
    """
    by_name = {option.name: option for option in known}
    for name in given:
        if name not in by_name:
            names = ", ".join(by_name) or "none"
            raise UsageError(f"{engine}: there is no build option {name!r}; it has {names}")
    return {
        name: option.default if name not in given else _value(engine, option, given[name])
        for name, option in by_name.items()
    }


def _value(engine: str, option: BuildOption, text: str) -> int | str:
    if isinstance(option.default, str):
        if option.choices and text not in option.choices:
            raise UsageError(
                f"{engine}: build option {option.name} is {text!r}; expected one of "
                f"{', '.join(option.choices)}"
            )
        return text
    try:
        number = int(text)
    except ValueError:
        number = option.least - 1
    if number < option.least:
        raise UsageError(
            f"{engine}: build option {option.name} is {text!r}; expected an integer from "
            f"{option.least}"
        )
    return number
