"""A small bundle with probe graphs, made with onnx helpers, and pictures for it.

The baseline's patch tokens are a convolution of the pixels; the patched graph shortens the long
ones, appends a register that is the longest, and turns the output a little. No two layers have the
same norms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from regraft import manifest as manifests
from regraft.bundle import NEURONS, VERIFY, record
from regraft.manifest import Manifest
from regraft.neurons import Neurons, RegisterNeuron
from regraft.preprocessing import Preprocessing
from regraft.redirect import RedirectOptions
from regraft.rewrite_counts import Sites
from regraft.tokens import TokenLayout

SIZE, PATCH, WIDTH, HEADS, DEPTH = 32, 4, 8, 2, 3
GRID = SIZE // PATCH
THRESHOLD = 10.0

FIGURES = {"outlier_tokens": 12, "largest_over_median": 5.125, "median_norm": 4.0}
REPORT = {
    "images": 9,
    "output": "pooled",
    "before": FIGURES,
    "after": FIGURES
    | {"outlier_tokens": 0, "removed": 1.0, "largest_over_median": 1.25, "register_norm": 77.5}
    | {"output_cosine_median": 0.9876, "output_cosine_smallest": 0.9765},
    "controls": {
        "random_neurons": FIGURES | {"removed": 0.0, "output_cosine_median": 0.9991},
        "zero_token": FIGURES | {"removed": 0.0},
        "zeroed_without_register": FIGURES | {"outlier_tokens": 0, "removed": 1.0},
    },
    "layers": [],
}


def _graph(patched: bool, class_token: bool, probe: bool, seed_nan: bool) -> onnx.ModelProto:
    rng = np.random.default_rng(5)
    kernel = rng.normal(size=(WIDTH, 3, PATCH, PATCH)).astype(np.float32) / 2
    constants = {
        "kernel": kernel,
        "queries": rng.normal(size=(WIDTH, HEADS)).astype(np.float32) / 8,
        "flat": np.array([0, WIDTH, GRID * GRID], np.int64),
        "eps": np.array(1e-6, np.float32),
        "cap": np.array(0.6 * THRESHOLD, np.float32),
        "turn": rng.normal(size=WIDTH).astype(np.float32) / 20,
        "one": np.array([1], np.int64),
        "axis2": np.array([2], np.int64),
        "nan": np.array(np.nan if seed_nan else 0.0, np.float32),
    }
    make = helper.make_node
    nodes = [
        make("Conv", ["pixel_values", "kernel"], ["grid"], strides=[PATCH, PATCH]),
        make("Reshape", ["grid", "flat"], ["columns"]),
        make("Transpose", ["columns"], ["long"], perm=[0, 2, 1]),
    ]
    if patched:
        nodes += [
            make("ReduceL2", ["long", "axis2"], ["lengths"], keepdims=1),
            make("Min", ["lengths", "cap"], ["capped"]),
            make("Add", ["lengths", "eps"], ["safe"]),
            make("Div", ["capped", "safe"], ["factor"]),
            make("Mul", ["long", "factor"], ["patches"]),
        ]
    else:
        nodes += [make("Identity", ["long"], ["patches"])]
    nodes += [make("ReduceMean", ["patches", "one"], ["mean"], keepdims=1)]
    state = ["mean", "patches"] if class_token else ["patches"]
    nodes += [make("Concat", state, ["last_hidden_state"], axis=1)]
    nodes += [make("ReduceMean", ["patches", "one"], ["pool"], keepdims=0)]
    nodes += [
        make("Add" if patched else "Sub", ["pool", "turn" if patched else "nan"], ["pooler_output"])
    ]
    outputs = {"last_hidden_state": 3, "pooler_output": 2}
    if patched and not probe:
        nodes += [make("ReduceMax", ["long", "one"], ["test_time_registers"], keepdims=1)]
        outputs["test_time_registers"] = 3
    if probe:
        tokens = ["last_hidden_state"]
        if patched:
            nodes += [make("ReduceMax", ["long", "one"], ["register"], keepdims=1)]
            tokens.append("register")
        nodes += [make("Concat", tokens, ["tokens"], axis=1)]
        nodes += [make("ReduceL2", ["tokens", "axis2"], ["norm"], keepdims=0)]
        nodes += [make("MatMul", ["tokens", "queries"], ["logits"])]
        for i in range(DEPTH):
            constants[f"gain.{i}"] = np.array(1 + 0.1 * (i - DEPTH + 1), np.float32)
            nodes += [
                make("Mul", ["norm", f"gain.{i}"], [f"gained.{i}"]),
                make("Add", [f"gained.{i}", "nan"], [f"norms.{i}"]),
                make("Mul", ["logits", f"gain.{i}"], [f"logits.{i}"]),
                make("Softmax", [f"logits.{i}"], [f"shares.{i}"], axis=1),
                make("Transpose", [f"shares.{i}"], [f"attentions.{i}"], perm=[0, 2, 1]),
            ]
            outputs |= {f"norms.{i}": 2, f"attentions.{i}": 3}
    shapes = {name: ["batch", *["?"] * (rank - 1)] for name, rank in outputs.items()}
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info(
                "pixel_values", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE]
            )
        ],
        [
            helper.make_tensor_value_info(
                name, TensorProto.FLOAT, [f"{name}.{i}" if d == "?" else d for i, d in enumerate(s)]
            )
            for name, s in shapes.items()
        ],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def write(
    folder: Path,
    *,
    class_token: bool = True,
    baseline: bool = True,
    report: Any = REPORT,
    verification: bool = True,
    nan: bool = False,
    model: str = "python:small.py:small",
    threshold: float = THRESHOLD,
    precision: str = "fp32",
) -> Path:
    """A bundle of it."""
    folder.mkdir(parents=True)
    names = manifests.GRAPHS if baseline else ("model",)
    graphs = {name: f"{name.replace('_', '-')}.onnx" for name in names}
    for name, file in graphs.items():
        patched, probe = name in ("model", "probe"), name.startswith("probe")
        onnx.save(_graph(patched, class_token, probe, nan and not patched), folder / file)
    about = {} if report is None else {"report": report}
    neurons = Neurons((RegisterNeuron(1, 5), RegisterNeuron(1, 7), RegisterNeuron(0, 2)), about)
    (folder / NEURONS).write_text(json.dumps(neurons.to_json()))
    files = [*graphs.values(), NEURONS]
    if verification:
        (folder / VERIFY).write_text(json.dumps(_verification()))
        files.append(VERIFY)
    prefix = int(class_token)
    manifest = Manifest(
        model={"source": model, "architecture": "Small", "weights_sha256": "0" * 64},
        preprocessing=Preprocessing(
            (SIZE, SIZE), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "shortest-edge", (SIZE, SIZE)
        ),
        tokens=TokenLayout(class_token, prefix, (GRID, GRID), WIDTH, DEPTH, HEADS),
        redirect=RedirectOptions(),
        layers=(0, 1),
        detection_layer=2,
        threshold=threshold,
        outputs={
            "last_hidden_state": ("batch", prefix + GRID * GRID, WIDTH),
            "pooler_output": ("batch", WIDTH),
            "test_time_registers": ("batch", 1, WIDTH),
        },
        precision=precision,
        opset=18,
        sites=Sites(token=1, redirect=2, output=1),
        graphs=graphs,
        files={name: record(folder / name) for name in files},
        versions={"regraft": "0.1.0"},
    )
    (folder / manifests.NAME).write_text(manifest.text())
    return folder


def _verification() -> dict[str, Any]:
    def row(graph: str, output: str, error: float, **other: Any) -> dict[str, Any]:
        fields = {"token_cosine": None, "image_cosine": None, "passed": True, "failures": []}
        return {"graph": graph, "output": output, "relative_error": error, **fields, **other}

    return {
        "schema": 1,
        "engine": "ort-cpu",
        "precision": "fp32",
        "reference": "PyTorch with hooks, float32",
        "images": 12,
        "passed": True,
        "limits": {"relative_error": 1e-4, "token_cosine": 0.9999, "image_cosine": 0.999},
        "parity": [
            row("model", "last_hidden_state", 5.9e-7, token_cosine=0.999998, image_cosine=0.999997),
            row("baseline", "pooler_output", 6.9e-7, image_cosine=0.999996),
            row("probe", "norms.0", 1.5e-7),
            row("probe_baseline", "norms.0", 3.5e-7),
        ],
        "effect": None,
    }


def write_pictures(folder: Path) -> Path:
    """A folder of seven pictures with a few loud patches each."""
    folder.mkdir()
    rng = np.random.default_rng(11)
    for i in range(7):
        pixels = rng.integers(100, 150, (SIZE, SIZE, 3), np.uint8)
        for place in rng.choice(GRID * GRID, 3, replace=False):
            row, col = divmod(int(place), GRID)
            at = (slice(row * PATCH, (row + 1) * PATCH), slice(col * PATCH, (col + 1) * PATCH))
            pixels[at] = rng.choice(np.array([0, 255], np.uint8), (PATCH, PATCH, 3))
        Image.fromarray(pixels).save(folder / f"picture {i}.png")
    return folder
