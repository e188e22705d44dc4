"""The graphs of a bundle: which there are, and how they are written beside their weights."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from regraft.engines.ort_cuda.operators import SUFFIX
from regraft.errors import InputError
from regraft.manifest import CUDA_GRAPHS
from regraft_export.export_options import ExportOptions
from regraft_export.graph.cuda.choices import Choices
from regraft_export.graph.cuda.fuse import Fused, fuse, prepare, why_not_fused
from regraft_export.graph.cuda.own_functions import spell_out
from regraft_export.graph.patch import Built, Patch, Traced, Wanted, build
from regraft_export.weights_file import WeightsFile

FILES = {
    "model": "model.onnx",
    "baseline": "baseline.onnx",
    "probe": "probe.onnx",
    "probe_baseline": "probe-baseline.onnx",
    "model_cuda": "model.cuda.onnx",
    "baseline_cuda": "baseline.cuda.onnx",
}


@dataclass(frozen=True)
class BundleGraphs:
    """What was written.

    Attributes:
        model: the patched graph.
        files: name of a graph -> its file.
        fused: name -> a graph for ``ort-cuda``; none if any attention is not fused.
        missing: why there is none; empty if there is.
    """

    model: Built
    files: Mapping[str, str]
    fused: Mapping[str, Fused]
    missing: str


def write_graphs(
    folder: Path,
    traced: Traced,
    patch: Patch,
    depth: int,
    options: ExportOptions,
    *,
    spelled: bool = False,
) -> BundleGraphs:
    """Writes all graphs of a bundle, and their weights.

    Args:
        folder: which exists.
        traced: the model.
        patch: what is done to it.
        depth: its blocks.
        options: what the bundle holds.
        spelled: whether regraft's own operators come with what they stand for, for a CPU.

    Raises:
        RewriteError: the traced graph lacks a form that a rewrite needs.
        InputError: own operators are asked for, and none of them fits.
    """
    outputs = Wanted(layers=options.layers, attentions=options.attentions)
    probe = Wanted(probe=True)
    plan: dict[str, tuple[Patch | None, Wanted]] = {"model": (patch, outputs)}
    if options.baseline:
        plan |= {"baseline": (None, outputs), "probe": (patch, probe)}
        plan |= {"probe_baseline": (None, probe)}
    model: Built | None = None
    fused: dict[str, Fused] = {}
    with WeightsFile(folder) as weights:
        for name, (what, wanted) in plan.items():
            built = build(traced, what, wanted)
            weights.save(built.proto, FILES[name])
            model = model or built
            gc.collect()  # graphs are cycles, and each holds all weights
        prepared, choices = prepare(traced), Choices(operators=options.operators)
        for name, cuda in CUDA_GRAPHS.items():
            if name in plan:
                fused[cuda] = fuse(prepared, *plan[name], choices)
                gc.collect()
        missing = why_not_fused(fused["model_cuda"], depth)
        if missing:
            fused.clear()  # no silent half-fusion
        if options.operators:
            _expect_operators(fused, missing)
        for name, graph in fused.items():
            if spelled:
                spell_out(graph.proto)
            weights.save(graph.proto, _file_of(name, fused))
    assert model is not None  # it comes first
    files = {name: _file_of(name, fused) for name in (*plan, *fused)}
    return BundleGraphs(model, files, fused, missing)


def _expect_operators(fused: Mapping[str, Fused], missing: str) -> None:
    """Refuses a graph that was to have regraft's own operators and has none."""
    if missing:
        raise InputError(f"--cuda-operators: there is no graph for ort-cuda: {missing}")
    if not fused["model_cuda"].fusions.operators:
        raise InputError(
            "--cuda-operators: none of them fits: they want widths that are multiples of 8, and "
            "for the redirect one register; export without"
        )


def _file_of(name: str, fused: Mapping[str, Fused]) -> str:
    """A graph's file; of one that needs the library of operators, the name says so."""
    own = name in fused and fused[name].fusions.operators > 0
    return FILES[name].replace(".cuda.onnx", SUFFIX) if own else FILES[name]
