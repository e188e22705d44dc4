"""A small bundle made with onnx helpers, pictures, and the command line in this process.

The graph is linear in the pixels, so that tests can compute what must come out with numpy alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import settings
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tests.support import probed as probed_bundles

from regraft import manifest as manifests
from regraft.bundle import NEURONS, VERIFY, WEIGHTS, record
from regraft.manifest import Manifest
from regraft.neurons import Neurons, RegisterNeuron
from regraft.preprocessing import Preprocessing
from regraft.redirect import RedirectOptions
from regraft.rewrite_counts import Sites
from regraft.tokens import TokenLayout

# Two shared cores: a slow example says nothing about the code.
settings.register_profile("regraft", deadline=None)
settings.load_profile("regraft")

SIZE, PATCH, WIDTH, HEADS = 16, 4, 8, 2
GRID = SIZE // PATCH
SHAPES = {
    "last_hidden_state": ("batch", 1 + GRID * GRID, WIDTH),
    "pooler_output": ("batch", WIDTH),
    "hidden.1": ("batch", 1 + GRID * GRID, WIDTH),
    "attentions.1": ("batch", HEADS, GRID, GRID),
    "test_time_registers": ("batch", 1, WIDTH),
}


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "kernel": rng.normal(size=(WIDTH, 3, PATCH, PATCH)).astype(np.float32) / 7,
        "queries": rng.normal(size=(WIDTH, HEADS)).astype(np.float32),
        "flat": np.array([0, WIDTH, GRID * GRID], np.int64),
        "square": np.array([0, HEADS, GRID, GRID], np.int64),
        "two": np.array(2, np.float32),
    }


def _model(outputs: list[str], dtype: int) -> onnx.ModelProto:
    """Patch embedding; CLS is the mean of the patches, the register their maximum."""
    nodes = [
        helper.make_node("Conv", ["pixel_values", "kernel"], ["grid"], strides=[PATCH, PATCH]),
        helper.make_node("Reshape", ["grid", "flat"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["patches"], perm=[0, 2, 1]),
        helper.make_node("ReduceMean", ["patches"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Concat", ["mean", "patches"], ["last_hidden_state"], axis=1),
        helper.make_node("ReduceMean", ["patches"], ["pooler_output"], axes=[1], keepdims=0),
        helper.make_node("Mul", ["last_hidden_state", "two"], ["hidden.1"]),
        helper.make_node("MatMul", ["patches", "queries"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["shares"], axis=1),
        helper.make_node("Transpose", ["shares"], ["by_head"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["by_head", "square"], ["attentions.1"]),
        helper.make_node("ReduceMax", ["patches"], ["test_time_registers"], axes=[1], keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("pixel_values", dtype, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(n, dtype, SHAPES[n]) for n in outputs],
        [numpy_helper.from_array(array, name) for name, array in _weights().items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def _write_bundle(folder: Path, *, baseline: bool = True, precision: str = "fp32") -> Path:
    folder.mkdir(parents=True)
    kinds = {"model": list(SHAPES)}
    if baseline:
        kinds["baseline"] = [name for name in SHAPES if name != "test_time_registers"]
    for kind, outputs in kinds.items():
        model = _model(outputs, TensorProto.FLOAT)
        # One file serves both graphs: their weights are equal, so it is written twice alike.
        (folder / "weights.data").unlink(missing_ok=True)
        onnx.save(
            model,
            folder / f"{kind}.onnx",
            save_as_external_data=True,
            location="weights.data",
            size_threshold=128,  # shapes stay inside, where shape inference finds them
        )
    neurons = Neurons((RegisterNeuron(1, 5, 9.0, 1, 2.5), RegisterNeuron(1, 7, 3.0, -1, -1.5)))
    (folder / NEURONS).write_text(json.dumps(neurons.to_json()))
    (folder / VERIFY).write_text('{"images": 4}')
    names = [*(f"{kind}.onnx" for kind in kinds), WEIGHTS, NEURONS, VERIFY]
    manifest = Manifest(
        model={"source": "python:small.py:small", "architecture": "Small", "weights_sha256": "0"},
        preprocessing=Preprocessing(
            image_size=(SIZE, SIZE),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            resize="exact",
            resize_size=(SIZE, SIZE),
        ),
        tokens=TokenLayout(True, 1, (GRID, GRID), WIDTH, depth=3, heads=HEADS),
        redirect=RedirectOptions(),
        layers=(1,),
        detection_layer=2,
        threshold=12.5,
        outputs=SHAPES,
        precision=precision,
        opset=17,
        sites=Sites(token=1, redirect=1, output=1, mended=("Reshape_3: 16 -> 17",)),
        graphs={kind: f"{kind}.onnx" for kind in kinds},
        files={name: record(folder / name) for name in names},
        versions={"regraft": "0.1.0"},
    )
    (folder / manifests.NAME).write_text(manifest.text())
    return folder


@pytest.fixture(scope="session")
def pristine_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no test may change."""
    return _write_bundle(tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture
def bundle_folder(pristine_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(pristine_bundle, tmp_path / "bundle"))


@pytest.fixture
def write_bundle() -> Callable[..., Path]:
    """``write_bundle(folder, baseline=True, precision="fp32")``."""
    return _write_bundle


@pytest.fixture(scope="session")
def kernel() -> np.ndarray:
    """The patch embedding of the small bundle: float32 (D, 3, 4, 4)."""
    return _weights()["kernel"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eleven different pictures of different sizes, PNG and JPEG by turns; do not change them."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(7)
    paths = []
    for i in range(11):
        rough = rng.integers(0, 256, (5, 6, 3), np.uint8)
        image = Image.fromarray(rough).resize((40 + 3 * i, 30 + 2 * i), Image.Resampling.BICUBIC)
        paths.append(folder / f"photo{i:02}.{'png' if i % 2 else 'jpg'}")
        image.save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def write_probed() -> Callable[..., Path]:
    """``write_probed(folder, class_token=True, ...)`` writes a bundle with probe graphs."""
    return probed_bundles.write


@pytest.fixture(scope="session")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with probe graphs that no test may change."""
    return probed_bundles.write(tmp_path_factory.mktemp("probed") / "bundle")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of seven pictures with a few loud patches each."""
    return probed_bundles.write_pictures(tmp_path_factory.mktemp("of") / "pictures")
