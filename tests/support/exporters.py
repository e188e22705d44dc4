"""Foreign ONNX files, as torch.onnx and transformers write them."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from regraft.redirect import RedirectOptions

EVERYTHING = RedirectOptions(
    value="per-layer", cls="keep", patches="only-outliers", registers=2, scale=(1.0, 0.5)
)


def dynamo(module: nn.Module, size: tuple[int, int], path: Path, opset: int, **more: Any) -> None:
    example = torch.zeros(2, 3, *size, dtype=next(module.parameters()).dtype)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            verbose=False,
            **more,
        )
    assert program is not None
    onnx.save(program.model_proto, path)


def torchscript(
    module: nn.Module,
    size: tuple[int, int],
    path: Path,
    opset: int,
    axes: Any = None,
    *,
    batch: int = 1,
    channels: int = 3,
) -> None:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(batch, channels, *size, dtype=next(module.parameters()).dtype),),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=["pixel_values"],
            dynamic_axes=None if axes is None else {"pixel_values": axes},
        )


def of_transformers(
    module: nn.Module, size: tuple[int, int], path: Path, opset: int, **more: Any
) -> None:
    """As transformers' own exporter writes it, external data and all."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    example = torch.zeros(2, 3, *size, dtype=next(module.parameters()).dtype)
    talkative = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = talkative.level
    talkative.setLevel(logging.ERROR)  # it speaks of operators that no vision model has
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            config = OnnxConfig(opset_version=opset, **more)
            done = OnnxExporter().export(module, {"pixel_values": example}, config=config)
            OnnxExporter.save_program(done.program, path)
    finally:
        talkative.setLevel(level)


BATCH = {0: "batch"}
ANY = {0: "batch", 2: "height", 3: "width"}
CASES = [
    ("timm", "dynamo", 18, {}),
    ("timm", "dynamo", 23, {}),
    ("timm_swiglu", "dynamo", 20, {"optimize": False}),
    ("timm_clip", "dynamo", 24, {}),
    ("hf_vit", "dynamo", 23, {"optimize": False}),
    ("hf_dinov2", "dynamo", 20, {}),
    ("timm", "torchscript", 14, {"axes": BATCH}),
    ("timm", "torchscript", 17, {}),
    ("timm_clip", "torchscript", 14, {}),
    ("timm_siglip", "torchscript", 18, {"axes": BATCH}),
    ("timm_swiglu", "torchscript", 17, {"axes": BATCH}),
    ("hf_clip", "torchscript", 17, {"axes": BATCH}),
    ("hf_dinov2", "torchscript", 18, {"axes": ANY}),
    ("hf_clip_projection", "dynamo", 18, {}),
    ("hf_deit", "dynamo", 19, {}),
    ("hf_dinov2_registers", "dynamo", 21, {"optimize": False}),
]
# With `dynamic` it leaves batch and image sizes open where the model does, else the batch is 2.
OF_TRANSFORMERS = [
    ("hf_clip", "transformers", 20, {"dynamic": True}),
    ("hf_vit", "transformers", 20, {}),
    ("hf_vit", "transformers", 18, {"dynamic": True}),
    ("hf_vit", "transformers", 24, {"dynamic": True, "optimize": False}),
    ("hf_deit", "transformers", 23, {"dynamic": True}),
    ("hf_dinov2", "transformers", 20, {}),
    ("hf_dinov2", "transformers", 20, {"dynamic": True}),
    ("hf_dinov2", "transformers", 18, {"dynamic": True, "optimize": False}),
    ("hf_dinov2_registers", "transformers", 24, {"dynamic": True}),
    ("hf_dinov2_swiglu", "transformers", 22, {"dynamic": True}),
]
