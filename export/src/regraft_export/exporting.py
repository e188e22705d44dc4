"""From a model, its register neurons and images to a verified bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regraft.bundle import NEURONS, VERIFY, WEIGHTS, Bundle, record
from regraft.constants import FILE as CONSTANTS
from regraft.files import scratch_folder, whole_folder
from regraft.manifest import CUDA_GRAPHS, NAME, Manifest
from regraft.neurons import Neurons
from regraft.verification import Verification, verify
from regraft_export.bundle_graphs import write_graphs
from regraft_export.calibration import Calibration, calibrate
from regraft_export.export_options import ExportOptions
from regraft_export.graph.patch import Patch
from regraft_export.outlier_level import OutlierLevel
from regraft_export.reference import PyTorchReference
from regraft_export.sources import LoadedModel
from regraft_export.trace import trace
from regraft_export.versions import versions_of
from regraft_export.vit.structure import VisionTransformer

# The packages that shape a bundle.
_SHAPING = ("torch", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Exported:
    """What an export gave: the manifest as written, the verification, nodes added per layer."""

    manifest: Manifest
    verification: Verification
    nodes_added: Mapping[int, int]


def export_bundle(
    loaded: LoadedModel,
    vit: VisionTransformer,
    neurons: Neurons,
    batches: Callable[[], Iterable[NDArray[np.float32]]],
    level: OutlierLevel,
    out: Path,
    options: ExportOptions,
    *,
    calibration: Callable[[], Iterable[NDArray[np.float32]]] | None = None,
    force: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Exported:
    """Traces, rewrites, writes, verifies; the bundle appears only if the verification passes.

    Args:
        loaded: the model and its preprocessing.
        vit: its structure.
        neurons: the register neurons; they must fit the model.
        batches: yields preprocessed images to verify on, anew at each call.
        level: from which norm on, and where, a patch counts as an outlier.
        out: the folder to write.
        options: what it holds.
        calibration: yields preprocessed images, others than ``batches``, that the constants of the
            variant kv are measured on; the variant token needs none.
        force: whether an existing bundle may be replaced.
        on_batch: called with each verified batch's size, for progress.

    Raises:
        RewriteError: the traced graph lacks a form that a rewrite needs.
        GateError: the bundle is not equal to the PyTorch reference.
    """
    options.check_against(vit)
    measured = None
    if options.variant == "kv":
        images = () if calibration is None else calibration()
        advance = on_batch or (lambda images: None)
        measured = calibrate(vit, neurons, options.redirect, images, on_batch=advance)
    constants = None if measured is None else measured.constants
    reference = PyTorchReference(vit, neurons, options.redirect, constants)

    def check(bundle: Bundle, *graphs: str) -> Verification:
        found = verify(
            bundle,
            batches(),
            reference,
            compare_probes="model" in graphs,
            graphs=graphs,
            on_batch=on_batch if "model" in graphs else None,
        )
        found.gate()
        return found

    portable, cuda = tuple(CUDA_GRAPHS), tuple(CUDA_GRAPHS.values())
    with whole_folder(out, marker=NAME, force=force) as folder:
        manifest, added = _write(loaded, vit, neurons, level, folder, options, measured)
        if options.precision == "fp32" and not options.operators:
            verification = check(Bundle(folder, manifest), *portable, *cuda)
        else:
            # No CPU kernel runs bf16, the fused operators in fp16, or regraft's own: the same
            # rewrites are verified in float32, own operators by what they stand for.
            with scratch_folder(folder) as twin:
                exact = replace(options, precision="fp32")
                fp32, _ = _write(loaded, vit, neurons, level, twin, exact, measured, spelled=True)
                if options.precision == "bf16":
                    verification = check(Bundle(twin, fp32), *portable, *cuda)
                    manifest = replace(manifest, verified=False)
                else:
                    verification = check(Bundle(folder, manifest), *portable)
                    if fp32.cuda is not None:
                        check(Bundle(twin, fp32), *cuda)
        (folder / VERIFY).write_text(_json(verification.to_json()), encoding="utf-8")
        files = {**manifest.files, VERIFY: record(folder / VERIFY)}
        manifest = replace(manifest, files=files)
        (folder / NAME).write_text(manifest.text(), encoding="utf-8")
    return Exported(manifest, verification, added)


def _write(
    loaded: LoadedModel,
    vit: VisionTransformer,
    neurons: Neurons,
    level: OutlierLevel,
    folder: Path,
    options: ExportOptions,
    calibration: Calibration | None,
    spelled: bool = False,
) -> tuple[Manifest, Mapping[int, int]]:
    """Writes all files but the manifest, which is returned and lists them.

    ``spelled``: regraft's own operators come with what they stand for, for a CPU.
    """
    traced = trace(vit, loaded.preprocessing.image_size, options.precision)
    constants = None if calibration is None else calibration.constants
    patch = Patch(neurons, options.redirect, constants)
    graphs = write_graphs(folder, traced, patch, vit.layout.depth, options, spelled=spelled)
    assert graphs.model.sites is not None  # it is patched
    (folder / NEURONS).write_text(_json(neurons.to_json()), encoding="utf-8")
    names = [*graphs.files.values(), WEIGHTS, NEURONS]
    if constants is not None:
        constants.save(folder)
        names.append(CONSTANTS)
    manifest = Manifest(
        model={
            "source": loaded.source,
            "architecture": loaded.architecture,
            "weights_sha256": loaded.weights_sha256,
        },
        preprocessing=loaded.preprocessing,
        tokens=replace(vit.layout, test_time_registers=options.redirect.registers)
        if constants is None
        else vit.layout,
        redirect=options.redirect,
        layers=neurons.layers,
        detection_layer=level.layer,
        threshold=level.threshold,
        outputs=graphs.model.outputs,
        precision=options.precision,
        opset=traced.opset,
        sites=graphs.model.sites,
        graphs=graphs.files,
        files={name: record(folder / name) for name in names},
        versions=versions_of(_SHAPING),
        cuda=graphs.fused["model_cuda"].fusions if graphs.fused else None,
        cuda_missing=graphs.missing,
        constants=None if calibration is None else calibration.about,
    )
    return manifest, graphs.model.nodes_added


def _json(data: object) -> str:
    return json.dumps(data, indent=1, allow_nan=False) + "\n"
