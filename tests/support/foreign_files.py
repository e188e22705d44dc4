"""ONNX files that must be refused."""

from __future__ import annotations

from pathlib import Path

import onnx


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
