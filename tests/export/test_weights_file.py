from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from regraft_export.weights_file import ALIGNMENT, INLINE_BYTES, WeightsFile

LARGE = np.arange(300, dtype=np.float32)


def graph(**weights: np.ndarray) -> onnx.ModelProto:
    """``out = x + the sum of the weights``, each weight broadcastable to x."""
    names = list(weights)
    nodes = [
        onnx.helper.make_node("Add", [last, name], [out])
        for last, name, out in zip(
            ["x", *(f"y{i}" for i in range(len(names)))],
            names,
            [*(f"y{i}" for i in range(len(names) - 1)), "out"],
            strict=False,
        )
    ]
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}
    kind = kinds[next(iter(weights.values())).dtype]
    info = [onnx.helper.make_tensor_value_info(n, kind, ["n"]) for n in ("x", "out")]
    inits = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    body = onnx.helper.make_graph(nodes, "g", info[:1], info[1:], inits)
    opset = [onnx.helper.make_opsetid("", 20)]
    return onnx.helper.make_model(body, opset_imports=opset, ir_version=10)


def result(path: Path, size: int, dtype: type = np.float32) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.zeros(size, dtype)})[0]


def test_graphs_share_equal_tensors_and_run(tmp_path: Path) -> None:
    with WeightsFile(tmp_path) as weights:
        weights.save(graph(a=LARGE, b=LARGE + 1), "one.onnx")
        weights.save(graph(other=LARGE + 1, a=LARGE.copy()), "two.onnx")
    size = (tmp_path / "weights.data").stat().st_size
    assert size == ALIGNMENT + LARGE.nbytes  # two tensors, not four
    for name in ("one.onnx", "two.onnx"):
        np.testing.assert_array_equal(result(tmp_path / name, 300), 2 * LARGE + 1)
        assert (tmp_path / name).stat().st_size < INLINE_BYTES


def test_tensors_lie_on_pages_and_name_the_file_without_a_folder(tmp_path: Path) -> None:
    with WeightsFile(tmp_path, "shared.bin") as weights:
        weights.save(graph(a=LARGE, b=LARGE * 2, c=LARGE * 3), "one.onnx")
    model = onnx.load(tmp_path / "one.onnx", load_external_data=False)
    data = (tmp_path / "shared.bin").read_bytes()
    for i, tensor in enumerate(model.graph.initializer):
        entries = {e.key: e.value for e in tensor.external_data}
        assert entries["location"] == "shared.bin"
        start, length = int(entries["offset"]), int(entries["length"])
        assert (start % ALIGNMENT, length) == (0, LARGE.nbytes)
        np.testing.assert_array_equal(
            np.frombuffer(data[start : start + length], np.float32), LARGE * (i + 1)
        )


def test_small_tensors_stay_inside(tmp_path: Path) -> None:
    small = np.arange(INLINE_BYTES // 4 - 1, dtype=np.float32)
    exact = np.arange(INLINE_BYTES // 4, dtype=np.float32)
    with WeightsFile(tmp_path) as weights:
        weights.save(graph(a=small), "small.onnx")
        weights.save(graph(a=exact), "exact.onnx")
    assert (tmp_path / "weights.data").stat().st_size == INLINE_BYTES
    np.testing.assert_array_equal(result(tmp_path / "small.onnx", len(small)), small)
    np.testing.assert_array_equal(result(tmp_path / "exact.onnx", len(exact)), exact)


def test_equal_bytes_of_another_type_are_read_as_that_type(tmp_path: Path) -> None:
    halves = np.linspace(0, 1, 1200).astype(np.float16)
    floats = halves.view(np.float32)
    with WeightsFile(tmp_path) as weights:
        weights.save(graph(a=halves), "halves.onnx")
        weights.save(graph(a=floats), "floats.onnx")
    assert (tmp_path / "weights.data").stat().st_size == halves.nbytes
    np.testing.assert_array_equal(result(tmp_path / "halves.onnx", 1200, np.float16), halves)
    np.testing.assert_array_equal(result(tmp_path / "floats.onnx", 600), floats)


def test_an_invalid_graph_is_not_written(tmp_path: Path) -> None:
    model = graph(a=LARGE)
    model.graph.node[0].input[1] = "nowhere"
    with WeightsFile(tmp_path) as weights, pytest.raises(onnx.checker.ValidationError):
        weights.save(model, "broken.onnx")
    assert not (tmp_path / "broken.onnx").exists()


def test_a_written_graph_passes_the_full_check(tmp_path: Path) -> None:
    with WeightsFile(tmp_path) as weights:
        weights.save(graph(a=LARGE, b=LARGE[:1]), "one.onnx")
    onnx.checker.check_model(str(tmp_path / "one.onnx"), full_check=True)
