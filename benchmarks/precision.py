"""What fp16, bf16 and int8 do to the features: baseline, token and kv, against float32.

Run as ``python -m benchmarks.precision``. Each variant is compared with itself in float32, per
token, so that the figures show the precision's error alone and not the patch's effect.

- fp16: the exported fp16 graph on ort-cpu, which computes many operators in float32 and rounds what
  passes between them.
- bf16: ort-cpu has no bf16, so PyTorch with hooks, weights and arithmetic bf16, on the CPU.
- int8: ``onnxruntime.quantization.quantize_static``, QDQ, signed, min-max, one scale per tensor for
  activations and for weights: of MatMul and Conv alone, and of every operator it supports.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.machine import RESULTS, circumstances, write_results
from benchmarks.planted import planted
from regraft.images import decode
from regraft.neurons import Neurons
from regraft.parity import cosine
from regraft.redirect import RedirectOptions
from regraft_export import demo
from regraft_export.calibration import calibrate
from regraft_export.finding.find import find_neurons
from regraft_export.finding.parts import ArrayImages
from regraft_export.finding.pytorch import PyTorchSubject
from regraft_export.graph.patch import LAST, Patch, Wanted, build
from regraft_export.register_constants import RegisterConstants
from regraft_export.sources import load
from regraft_export.trace import trace
from regraft_export.vit.hooks import redirected, register_replaced, silenced
from regraft_export.vit.observe import observe
from regraft_export.vit.structure import VisionTransformer, from_module

Floats = NDArray[np.float32]
VARIANTS = ("baseline", "token", "kv")
INT8 = {"int8, MatMul and Conv": ["MatMul", "Conv"], "int8, every operator": []}


@dataclass(frozen=True)
class Subject:
    """A model, its register neurons, and the constants measured on the calibration images."""

    name: str
    vit: VisionTransformer
    neurons: Neurons
    constants: RegisterConstants

    def patch(self, variant: str) -> Patch | None:
        """What the graph of a variant is built with."""
        if variant == "baseline":
            return None
        constants = self.constants if variant == "kv" else None
        return Patch(self.neurons, RedirectOptions(), constants)


def main() -> None:
    """Measures and writes benchmarks/results/precision.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    logging.disable(logging.WARNING)  # the quantiser advises, at every call, what is done here
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of planted ViTs")
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load("python:regraft_export.demo:shipped_vit")
    files = sorted(Path(demo.__file__).parent.glob("samples/*.png"))
    pixels = np.stack([loaded.preprocessing(decode(file)) for file in files])
    calibration, images = pixels[::2], pixels[1::2]
    rows: list[dict[str, Any]] = []
    for subject in _subjects(loaded, calibration, args.seeds):
        for variant in VARIANTS:
            rows += _measure(subject, variant, calibration, images)
        zeroed = _errors(_torch(subject, "token", images), _torch(subject, "zeroed", images), 1)
        about = {"model": subject.name, "variant": "zeroed", "precision": "fp32 to token"}
        rows.append({**about, **zeroed})
    result = {
        **circumstances("benchmarks.precision"),
        "calibration_images": len(calibration),
        "images": len(images),
        "rows": rows,
    }
    table = _table(result)
    print("\n".join(table))
    write_results(args.out, result, table)


def _subjects(loaded: Any, calibration: Floats, seeds: Sequence[int]) -> Iterator[Subject]:
    """The ViT that ships with regraft, with the neurons that finding selects, and planted ones."""
    shipped = from_module(loaded.module, loaded.preprocessing.image_size)
    fitted = torch.from_numpy(calibration)
    found = find_neurons(PyTorchSubject(shipped), ArrayImages(calibration))
    models = [("shipped", shipped, found.neurons)]
    models += [(f"planted {seed}", *planted(fitted, seed=seed)) for seed in seeds]
    for name, vit, neurons in models:
        measured = calibrate(vit, neurons, RedirectOptions(), [calibration])
        yield Subject(name, vit, neurons, measured.constants)


def _measure(
    subject: Subject, variant: str, calibration: Floats, images: Floats
) -> Iterator[dict[str, Any]]:
    layout = subject.vit.layout
    right = _torch(subject, variant, images)
    if variant != "token":
        effect = _errors(_torch(subject, "token", images), right, layout.prefix)
        yield {"model": subject.name, "variant": variant, "precision": "fp32 to token", **effect}
    with tempfile.TemporaryDirectory() as folder:
        for precision, state in _states(subject, variant, calibration, images, Path(folder)):
            error = _errors(right, state, layout.prefix)
            yield {"model": subject.name, "variant": variant, "precision": precision, **error}


def _states(
    subject: Subject, variant: str, calibration: Floats, images: Floats, folder: Path
) -> Iterator[tuple[str, Floats]]:
    for precision in ("fp32", "fp16"):
        traced = trace(subject.vit, (images.shape[2], images.shape[3]), precision)
        model = build(traced, subject.patch(variant), Wanted()).proto
        path = folder / f"{precision}.onnx"
        onnx.save(model, path)
        yield f"{precision}, ort-cpu", _run(path, images)
    yield "bf16, PyTorch", _torch(subject, variant, images, torch.bfloat16)
    prepared = str(folder / "prepared.onnx")
    # Its symbolic inference fails on the exporter's shape arithmetic; the plain one suffices.
    quant_pre_process(str(folder / "fp32.onnx"), prepared, skip_symbolic_shape=True)
    for name, operators in INT8.items():
        quantize_static(
            prepared,
            str(folder / "int8.onnx"),
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=operators,
        )
        yield name, _run(folder / "int8.onnx", images)


def _torch(
    subject: Subject, variant: str, images: Floats, dtype: torch.dtype = torch.float32
) -> Floats:
    """``last_hidden_state`` by PyTorch with hooks."""
    vit = subject.vit
    if dtype != torch.float32:
        size = (images.shape[2], images.shape[3])
        vit = from_module(copy.deepcopy(vit.module).to(dtype), size)
    hooks: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "baseline": nullcontext,
        "token": lambda: redirected(vit, subject.neurons),
        "kv": lambda: register_replaced(vit, subject.neurons.neurons, subject.constants),
        "zeroed": lambda: silenced(vit, subject.neurons.neurons),
    }
    with torch.no_grad(), hooks[variant]():
        state = observe(vit, torch.from_numpy(images).to(dtype)).last_hidden_state
    return np.asarray(state.float().numpy())


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, pixels: Floats) -> None:
        self.batches = iter(np.split(pixels, range(8, len(pixels), 8)))

    def get_next(self) -> dict[str, Floats] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixel_values": batch}


def _run(path: Path, images: Floats) -> Floats:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([LAST], {"pixel_values": images})[0])


def _errors(right: Floats, state: Floats, prefix: int) -> dict[str, float]:
    """Relative Frobenius error and token cosines, of CLS and of patches."""
    found: dict[str, float] = {}
    for what, part in (("cls", slice(0, 1)), ("patches", slice(prefix, None))):
        a, b = right[:, part].astype(np.float64), state[:, part].astype(np.float64)
        cosines = cosine(a, b).ravel()
        found[f"{what}_relative_error"] = float(np.linalg.norm(b - a) / np.linalg.norm(a))
        found[f"{what}_cosine_median"] = float(np.median(cosines))
        found[f"{what}_cosine_p1"] = float(np.percentile(cosines, 1))
        found[f"{what}_cosine_smallest"] = float(cosines.min())
    return found


def _table(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['images']} pictures, {result['calibration_images']} others to calibrate on. "
        "Error of `last_hidden_state` to the same variant in PyTorch, float32; rows `fp32 to "
        "token`: the variant's own difference to the variant token, in float32 (zeroed: no "
        "constants).",
        "",
        "| model | variant | precision | patches: error | cosine p1 | smallest | CLS: error | "
        "cosine median | smallest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        cells = [row["model"], row["variant"], row["precision"]]
        cells += [f"{row['patches_relative_error']:.1e}", f"{row['patches_cosine_p1']:.5f}"]
        cells += [f"{row['patches_cosine_smallest']:.5f}", f"{row['cls_relative_error']:.1e}"]
        cells += [f"{row['cls_cosine_median']:.5f}", f"{row['cls_cosine_smallest']:.5f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
