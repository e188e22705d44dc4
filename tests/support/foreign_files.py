"""ONNX files as other people's exporters write them, and files that must be refused."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

BATCH = {0: "batch"}
ANY = {0: "batch", 2: "height", 3: "width"}


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
            (torch.zeros(batch, channels, *size),),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=["pixel_values"],
            dynamic_axes=None if axes is None else {"pixel_values": axes},
        )


def bad(kind: str, folder: Path, good: Path) -> Path:
    """A file that must be refused, made of a good one by torch.onnx (dynamo)."""
    path = folder / "in.onnx"
    model = onnx.load(good)
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("no model at all")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no data":
        onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=256)
        (folder / "w.bin").unlink()
    elif kind == "short data":
        onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=256)
        (folder / "w.bin").write_bytes((folder / "w.bin").read_bytes()[:-4096])
    elif kind == "outside":
        onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=256)
        path.write_bytes(path.read_bytes().replace(b"w.bin", b"/etc/"))
    elif kind == "old":
        model.opset_import[0].version = 12
        onnx.save(model, path)
    elif kind == "fused":
        node = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
        node.op_type, node.domain = "SkipLayerNormalization", "com.microsoft"
        onnx.save(model, path)
    elif kind == "no transformer":
        x = onnx.helper.make_tensor_value_info("x", 1, [2, 3])
        y = onnx.helper.make_tensor_value_info("y", 1, [2, 3])
        graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
        onnx.save(onnx.helper.make_model(graph), path)
    return path


REFUSALS = {
    "truncated": "is truncated or no ONNX file",
    "text": "is truncated or no ONNX file",
    "empty": "is truncated or no ONNX file (it is empty)",
    "no data": "external data file 'w.bin', which cannot be read (No such file or directory)",
    "short data": "it is truncated or belongs to another model",
    "outside": "expected a file in the folder of the model, or below it",
    "old": "is of opset 12; expected 13 or later",
    "fused": "fused already (SkipLayerNormalization, of ONNX Runtime's optimiser); patch the file",
    "no transformer": "no stack of transformer blocks was found",
}
