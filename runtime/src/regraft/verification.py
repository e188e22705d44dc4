"""Verification of a bundle on images: parity of an engine with a reference, and the effect.

The reference is exchangeable: at export PyTorch with hooks; in production, where there is no
PyTorch, the very graph that export verified, run by ort-cpu with its optimiser off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from regraft.bundle import Bundle
from regraft.effect import Effect, EffectMeter
from regraft.engines import Engine, EngineOptions, open_graph
from regraft.errors import GateError
from regraft.manifest import CUDA_GRAPHS
from regraft.parity import LIMITS, Comparison, Meter

SCHEMA = 1
_ORIGINALS = {cuda: name for name, cuda in CUDA_GRAPHS.items()}


class Reference(Protocol):
    """Something that yields the right outputs of a graph."""

    name: str

    def run(
        self, graph: str, pixels: NDArray[np.float32], outputs: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        """The named outputs of a graph (model, baseline, probe, probe_baseline)."""


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Attributes:
        engine: what was verified.
        precision: of the engine's arithmetic, which chooses the limits.
        reference: what it was compared with.
        images: how many.
        parity: one comparison per graph and output.
        effect: what the patch does; None without probe graphs, or where they are bf16.
        cure: what may help where the gate fails, to end its message; mostly empty.
    """

    engine: str
    precision: str
    reference: str
    images: int
    parity: tuple[Comparison, ...]
    effect: Effect | None
    cure: str = ""

    @property
    def failures(self) -> list[str]:
        """One line per missed limit."""
        return [line for comparison in self.parity for line in comparison.failures]

    @property
    def passed(self) -> bool:
        """Whether something was compared and every limit holds."""
        return bool(self.parity) and self.images > 0 and not self.failures

    def to_json(self) -> dict[str, Any]:
        """The content of ``verify.json``."""
        return {
            "schema": SCHEMA,
            "engine": self.engine,
            "precision": self.precision,
            "reference": self.reference,
            "images": self.images,
            "passed": self.passed,
            "limits": vars(LIMITS[self.precision]),
            "parity": [comparison.to_json() for comparison in self.parity],
            "effect": None if self.effect is None else self.effect.to_json(),
        }

    def gate(self) -> None:
        """Raises GateError, naming every missed limit, unless the verification passed."""
        if not self.passed:
            reasons = "; ".join(self.failures) or "nothing was compared"
            raise GateError(f"{self.engine} is not equal to {self.reference}: {reasons}{self.cure}")


class UnoptimisedGraph:
    """The reference without PyTorch: the bundle's own graphs, ort-cpu with its optimiser off."""

    name = "the graph that export verified (ort-cpu, optimiser off)"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.engines = Engines(bundle, "ort-cpu", EngineOptions(threads, optimize=False))

    def run(
        self, graph: str, pixels: NDArray[np.float32], outputs: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        """See :class:`Reference`."""
        return self.engines[graph].run(pixels, outputs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.engines.close()


class Engines:
    """A bundle's graphs on one engine, each opened on first use."""

    def __init__(
        self,
        bundle: Bundle,
        engine: str,
        options: EngineOptions | None = None,
        built: Mapping[str, Path] | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:
            bundle: whose graphs.
            engine: by name.
            options: of the engine.
            built: graph name -> folder of a build that is not in the cache yet.
        """
        self.bundle, self.engine, self.options = bundle, engine, options
        self.built = built or {}
        self._open: dict[str, Engine] = {}
        self._stack = ExitStack()

    def __getitem__(self, graph: str) -> Engine:
        if graph not in self._open:
            built = self.built.get(graph)
            engine = open_graph(self.bundle, graph, self.engine, self.options, built=built)
            self._open[graph] = self._stack.enter_context(engine)
        return self._open[graph]

    def close(self) -> None:
        """Closes every engine that was opened."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def verify(
    bundle: Bundle,
    batches: Iterable[NDArray[np.float32]],
    reference: Reference,
    engine: str = "ort-cpu",
    options: EngineOptions | None = None,
    *,
    compare_probes: bool = False,
    graphs: Sequence[str] = ("model", "baseline"),
    built: Mapping[str, Path] | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_outputs: Callable[[NDArray[np.float32], Mapping[str, NDArray[np.float32]]], None]
    | None = None,
) -> Verification:
    """Compares an engine with a reference on images and measures the effect.

    Args:
        bundle: what to verify.
        batches: preprocessed images, each (B, 3, H, W) float32.
        reference: yields the right outputs.
        engine: what to verify; the effect is always measured on ort-cpu, whose probes it needs.
        options: of the engine.
        compare_probes: also compare the probe graphs with the reference (at export).
        graphs: what to compare, of those the bundle has. Those of ``ort-cuda`` are compared with
            what the graphs they are named after should yield.
        built: graph name -> folder of a build that is not in the cache yet.
        on_batch: called with each batch's size, for progress.
        on_outputs: called with each batch and what the graph ``model`` gave for it.

    Returns:
        The findings; call :meth:`Verification.gate` to make a missed limit an error.
    """
    manifest = bundle.manifest
    # The probes run on ort-cpu, which has no bf16.
    runs = manifest.precision != "bf16"
    has_probes = runs and {"probe", "probe_baseline"} <= set(manifest.graphs)
    compared = [g for g in graphs if g in manifest.graphs]
    # ort-cpu, which runs them, cannot run bf16; export measured the effect in fp32.
    probes = ["probe_baseline", "probe"] if has_probes and manifest.precision != "bf16" else []
    meters: dict[tuple[str, str], Meter] = {}
    effect = EffectMeter(manifest)
    images = 0
    with Engines(bundle, engine, options, built) as candidate, Engines(bundle, "ort-cpu") as cpu:
        for pixels in batches:
            seen: dict[str, Mapping[str, NDArray[np.float32]]] = {}
            right: dict[str, Mapping[str, NDArray[np.float32]]] = {}
            for graph in [*compared, *probes]:
                engines = cpu if graph in probes else candidate
                seen[graph] = engines[graph].run(pixels)
                if graph in compared or compare_probes:
                    _compare(
                        meters, graph, manifest.tokens.class_token, reference, pixels, seen, right
                    )
            if probes:
                effect.update(seen["probe_baseline"], seen["probe"])
            images += len(pixels)
            if on_outputs:
                on_outputs(pixels, seen["model"])
            if on_batch:
                on_batch(len(pixels))
        opened = candidate[compared[0]]
        name, precision = opened.name, opened.precision
    limits = LIMITS[precision]
    parity = tuple(meter.result(limits) for meter in meters.values())
    infinite = {_ORIGINALS.get(c.graph, c.graph) for c in parity if not c.finite}
    redirected = bool(infinite) and infinite <= {"model", "probe"}
    return Verification(
        engine=name,
        precision=precision,
        reference=reference.name,
        images=images,
        parity=parity,
        effect=effect.result() if probes and images else None,
        cure=manifest.redirect.scale_cure(precision) if redirected else "",
    )


def _compare(
    meters: dict[tuple[str, str], Meter],
    graph: str,
    class_token: bool,
    reference: Reference,
    pixels: NDArray[np.float32],
    seen: Mapping[str, Mapping[str, NDArray[np.float32]]],
    right: dict[str, Mapping[str, NDArray[np.float32]]],
) -> None:
    meant = _ORIGINALS.get(graph, graph)
    if meant not in right:  # once for a graph and its form for CUDA
        right[meant] = reference.run(meant, pixels, list(seen[graph]))
    for name, value in seen[graph].items():
        meter = meters.setdefault((graph, name), Meter(graph, name, class_token))
        meter.update(right[meant][name], value)
