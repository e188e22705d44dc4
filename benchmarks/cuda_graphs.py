"""The graphs that are timed on a card, and what they must yield."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.literal import literal_graph
from regraft.engines import Engine, EngineOptions, open_engine
from regraft.engines.cuda_runtime import Cuda
from regraft.engines.ort_cuda.engine import OrtCudaEngine
from regraft.engines.ort_cuda.operators import SUFFIX, source_sha256
from regraft.neurons import Neurons
from regraft.parity import LIMITS
from regraft.redirect import RedirectOptions
from regraft_export.graph.cuda.choices import Choices
from regraft_export.graph.cuda.fuse import fuse, fuse_built, prepare
from regraft_export.graph.patch import Patch, Traced, Wanted, build
from regraft_export.register_constants import RegisterConstants
from regraft_export.weights_file import WeightsFile

Array = NDArray[np.float32]
OUTPUT = "last_hidden_state"
BASELINE = "baseline"
PER_NEURON, CONSTANT = RedirectOptions(), RedirectOptions("constant")


@dataclass(frozen=True)
class Form:
    """One graph for ``ort-cuda``.

    Attributes:
        redirect: None for an unpatched graph.
        choices: of the rewrites.
        kv: the variant kv.
    """

    redirect: RedirectOptions | None
    choices: Choices = field(default_factory=Choices)
    kv: bool = False


def write_forms(
    folder: Path,
    traced: Traced,
    neurons: Neurons,
    forms: Mapping[str, Form],
    *,
    constants: RegisterConstants | None = None,
    literal: bool = False,
) -> None:
    """Writes ``NAME.cuda.onnx`` for every form, and on demand for the literal translation.

    Args:
        folder: which exists.
        traced: the model.
        neurons: to patch in.
        forms: by name.
        constants: for forms of the variant kv.
        literal: whether to.
    """
    kinds = {form.choices.layer_scale: form.choices for form in forms.values()}
    prepared = {folded: prepare(traced, choices) for folded, choices in kinds.items()}
    with WeightsFile(folder) as weights:
        for name, form in forms.items():
            patch = None
            if form.redirect is not None:
                patch = Patch(neurons, form.redirect, constants if form.kv else None)
            ready = prepared[form.choices.layer_scale]
            fused = fuse(ready, patch, Wanted(), form.choices)
            suffix = SUFFIX if fused.fusions.operators else ".cuda.onnx"
            weights.save(fused.proto, f"{name}{suffix}")
        if literal:
            proto = literal_graph(prepared[True].traced, neurons)
            weights.save(fuse_built(prepared[True], proto, 1).proto, "literal.cuda.onnx")


def write_portable(folder: Path, exact: Traced, neurons: Neurons) -> None:
    """Writes ``None.onnx``, ``per-neuron.onnx`` and ``constant.onnx``: what forms must yield."""
    with WeightsFile(folder, "portable.data") as weights:
        for redirect in (PER_NEURON, CONSTANT):
            built = build(exact, Patch(neurons, redirect), Wanted())
            weights.save(built.proto, f"{redirect.value}.onnx")
        weights.save(build(exact, None, Wanted()).proto, "None.onnx")


def open_cuda(folder: Path, name: str, precision: str) -> Engine:
    """Opens a form's file without asking for a build: benchmarks check outputs themselves.

    Products that two forms have in common, or nearly so, are timed once in a process.
    """
    with_operators = folder / f"{name}{SUFFIX}"
    if not with_operators.exists():
        return OrtCudaEngine(folder / f"{name}.cuda.onnx", precision, EngineOptions())
    # Where the products of this graph were timed, on this card with these sources.
    card = Cuda(engine=OrtCudaEngine.name).card()
    built = folder / f"{name} {precision} {source_sha256()[:16]} {card.name}"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            half = Path(temporary) / "half"  # a build that fails leaves nothing
            half.mkdir()
            OrtCudaEngine.build(with_operators, precision, {}, half, lambda *_: None)
            try:
                half.rename(built)
            except OSError:
                if not built.exists():  # else another process was faster
                    raise
    return OrtCudaEngine(with_operators, precision, EngineOptions(), built)


def expect_equal(
    folder: Path, engines: Mapping[str, Engine], forms: Mapping[str, Form], pixels: Array
) -> None:
    """Every form equals the portable graph in float32, or nothing is timed."""
    for name, form in forms.items():
        portable = folder / f"{None if form.redirect is None else form.redirect.value}.onnx"
        with open_engine(portable, "ort-cpu") as engine:
            right = engine.run(pixels[:2], [OUTPUT])[OUTPUT]
        got = engines[name].run(pixels[:2], [OUTPUT])[OUTPUT]
        check_error(name, got, right, engines[name].precision)


def check_error(name: str, got: Array, right: Array, precision: str) -> float:
    """The relative Frobenius error; exits if it is beyond the precision's limit."""
    error = float(np.linalg.norm(got - right) / np.linalg.norm(right))
    if not error <= LIMITS[precision].relative_error:
        raise SystemExit(f"{name} differs from what it must yield by {error:.1e}")
    return error


def enough_runs(engine: Engine, batch: int, seconds: float = 0.01) -> int:
    """How many runs in a row take about so long on the device."""
    engine.device_seconds(batch, 2)
    return max(1, round(seconds / engine.device_seconds(batch, 2)))
