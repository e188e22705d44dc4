"""Every kind of graph that a bundle can have is parsed and compiled by the real builder.

Nothing here is executed: there is no card. See ``rig.py`` for what stands behind ``tensorrt``.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tests.support import models

from regraft.redirect import RedirectOptions

Compiler = Callable[..., dict[str, Any]]
Graph = Callable[..., Path]

ALL_OUTPUTS = {
    "last_hidden_state",
    "pooler_output",
    "hidden.0",
    "hidden.4",
    "attentions.4",
    "test_time_registers",
}
# Each value of each option at least once.
SOME = [
    RedirectOptions("constant"),
    RedirectOptions("per-layer", "keep", "mean"),
    RedirectOptions("per-neuron", "keep", "only-outliers", 2, (1.0, 0.5)),
    RedirectOptions("constant", "zero", "keep", 2, (1.0, 2.0)),
]
EVERY = [
    RedirectOptions(value, cls, patches, registers, (1.0, 0.5)[:registers])
    for value, cls, patches, registers in itertools.product(
        ("per-neuron", "per-layer", "constant"),
        ("zero", "keep"),
        ("zero", "mean", "only-outliers", "keep"),
        (1, 2),
    )
]
TYPES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}


def named(value: object) -> str:
    if isinstance(value, RedirectOptions):
        return f"{value.value}, {value.cls}, {value.patches}, {value.registers}"
    return str(value)


def compiled(answer: dict[str, Any], graph: Path, precision: str = "fp32") -> dict[str, Any]:
    """The answer, if a plan came out that can hold the graph and computes in its precision."""
    assert "error" not in answer, answer
    assert answer["bytes"] > 50_000
    # The precision is the graph's, in every product: nothing was widened or narrowed.
    products = sum(n.op_type in ("MatMul", "Gemm", "Conv") for n in onnx.load(graph).graph.node)
    types = answer["network"]["types"]
    assert set(types) == {TYPES[precision]}
    assert types[TYPES[precision]] >= products > 10
    return answer


@pytest.mark.parametrize(
    ("family", "precision", "attentions"),
    [("shipped", "fp32", 8), ("shipped", "fp16", 8), ("timm", "bf16", 3)],
)
def test_every_precision_compiles(
    compiler: Compiler, graph: Graph, family: str, precision: str, attentions: int
) -> None:
    file = graph(family, RedirectOptions(), precision)
    answer = compiled(compiler("build", graph=str(file), level=1), file, precision)
    assert answer["network"]["attentions"] == attentions
    phases, done, totals = zip(*answer["steps"], strict=True)
    assert set(phases) == {"compiling"}
    assert set(totals) == {100}
    assert list(done) == sorted(done)
    assert done[0] <= 20
    assert done[-1] == 100


@pytest.mark.parametrize("redirect", SOME, ids=named)
def test_redirect_options_compile(
    compiler: Compiler, graph: Graph, redirect: RedirectOptions
) -> None:
    file = graph("shipped", redirect)
    compiled(compiler("build", graph=str(file), level=0), file)


@pytest.mark.parametrize("family", ["shipped", "timm_trained_registers", "timm_clip"])
def test_families_and_baselines_compile(compiler: Compiler, graph: Graph, family: str) -> None:
    redirects = [None] if family == "shipped" else [None, RedirectOptions()]
    for redirect in redirects:
        file = graph(family, redirect, "fp16")
        compiled(compiler("build", graph=str(file), level=0), file, "fp16")


@pytest.mark.slow
@pytest.mark.parametrize("redirect", EVERY, ids=named)
def test_every_combination_of_options_compiles(
    compiler: Compiler, graph: Graph, redirect: RedirectOptions
) -> None:
    file = graph("timm", redirect)
    compiled(compiler("build", graph=str(file), level=0), file)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_compiles_in_every_precision(
    compiler: Compiler, graph: Graph, family: str, precision: str
) -> None:
    for redirect in (None, RedirectOptions()):
        file = graph(family, redirect, precision)
        compiled(compiler("build", graph=str(file), level=0), file, precision)


def test_configuration(compiler: Compiler, graph: Graph) -> None:
    batches = {"min_batch": 2, "opt_batch": 3, "max_batch": 17}
    file = graph("shipped")
    found = compiler("configure", graph=str(file), **batches, level=4, workspace_mib=256)
    assert found["profiles"] == 1
    assert found["shapes"] == [[batch, 3, 96, 96] for batch in (2, 3, 17)]
    # TensorRT turns TF32 on by default; no other flag is set, above all none of a precision.
    assert found["flags"] == []
    assert found["level"] == 4
    assert found["workspace"] == 256 << 20
    assert found["verbosity"] == "DETAILED"
    assert found["inputs"] == {"pixel_values": ["FLOAT", [-1, 3, 96, 96]]}
    assert set(found["outputs"]) == ALL_OUTPUTS
    assert found["outputs"]["last_hidden_state"] == ["FLOAT", [-1, 65, 128]]
    assert {kind for kind, _ in found["outputs"].values()} == {"FLOAT"}
    assert found["decomposable"] == 0
    unlimited = compiler("configure", graph=str(file))
    assert unlimited["workspace"] > 256 << 20
    assert unlimited["shapes"] == [[batch, 3, 96, 96] for batch in (1, 8, 64)]


def test_batches_out_of_order_are_refused(compiler: Compiler, graph: Graph) -> None:
    file = str(graph("timm_clip", None))
    answer = compiler("build", graph=file, min_batch=4, opt_batch=4, max_batch=2)
    assert answer == {
        "error": "UsageError",
        "message": "tensorrt: the batches are min 4, opt 4, max 2; expected 1 <= min <= opt <= max",
    }
    # TensorRT logs what it refuses and goes on; that must not be overlooked either.
    answer = compiler("refused_profile", graph=file)
    assert answer["error"] == "EngineError"
    assert "Invalid optimization profiles for input tensors pixel_values" in answer["message"]


def test_networks_are_strongly_typed_where_that_is_a_choice(
    compiler: Compiler, graph: Graph
) -> None:
    answer = compiler("network_flags", graph=str(graph("timm_clip", None)))
    assert answer["seen"] == [1 << answer["flag"], 0]


class Attentive(torch.nn.Module):
    """One attention, which opset 23 has as a node."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 64, 16, 16)
        self.mix = torch.nn.Linear(64, 192)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        parts = self.mix(tokens).unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(*parts.unbind(0))
        return tokens + mixed.transpose(1, 2).flatten(2)


class Half(torch.nn.Module):
    """The same in float16, with float32 inputs and outputs as every graph of a bundle."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attentive().half()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(pixels.half()).float()
        return result


def exported(folder: Path, module: torch.nn.Module) -> Path:
    file = folder / "model.onnx"
    torch.manual_seed(0)
    torch.onnx.export(
        module.eval(),
        (torch.randn(2, 3, 64, 64),),
        file,
        input_names=["pixel_values"],
        output_names=["last_hidden_state"],
        dynamic_shapes={"pixels": {0: "batch"}},
        opset_version=23,
        external_data=False,
        verbose=False,
    )
    assert "Attention" in {node.op_type for node in onnx.load(file).graph.node}
    return file


def test_attention_without_a_fused_kernel(compiler: Compiler, tmp_path: Path) -> None:
    attention_node = exported(tmp_path, Attentive())
    assert compiler("configure", graph=str(attention_node))["decomposable"] == 1
    answer = compiler("build", graph=str(attention_node), level=0)
    assert answer["bytes"] > 10_000, answer
    assert answer["network"]["attentions"] == 1
    # TensorRT has no fused kernel for float32, and says so where nothing else is allowed.
    strict = compiler("build", graph=str(attention_node), level=0, fused_attention_only=True)
    assert strict["error"] == "EngineError"
    assert strict["message"].startswith("tensorrt: model.onnx cannot be compiled: ")
    assert "Attention operation was not supported by a dedicated kernel" in strict["message"]


def test_attention_with_a_fused_kernel(compiler: Compiler, tmp_path: Path) -> None:
    file = exported(tmp_path, Half())
    answer = compiler("build", graph=str(file), level=0, fused_attention_only=True)
    assert answer["bytes"] > 10_000, answer
    assert answer["network"]["attentions"] == 1
    assert set(answer["network"]["types"]) == {"FP16"}


def test_a_graph_that_is_no_graph_is_refused(compiler: Compiler, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\xff\xfe\xfd")
    answer = compiler("build", graph=str(file))
    assert answer["error"] == "EngineError"
    assert answer["message"].startswith("tensorrt: model.onnx is refused by the parser: ")
    assert "Failed to parse the ONNX model" in answer["message"]


def test_an_unknown_operator_is_refused_and_its_node_named(
    compiler: Compiler, graph: Graph
) -> None:
    file = graph("timm_clip", None)
    model = onnx.load(file, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type = "Hardmix"
    onnx.save(model, file)
    answer = compiler("build", graph=str(file))
    assert answer["error"] == "EngineError"
    assert f"node {node.name!r} (Hardmix)" in answer["message"]


def test_missing_weights_are_refused(compiler: Compiler, graph: Graph, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(graph("timm_clip"), alone / "model.onnx")
    answer = compiler("build", graph=str(alone / "model.onnx"))
    assert answer["error"] == "EngineError"
    assert "is refused by the parser" in answer["message"]
    assert "Failed to import initializer" in answer["message"]


def test_other_inputs_and_types_are_refused(compiler: Compiler, graph: Graph) -> None:
    file = graph("timm_clip", None)
    good = onnx.load(file, load_external_data=False)

    def refused(change: Callable[[onnx.ModelProto], object]) -> str:
        model = onnx.ModelProto()
        model.CopyFrom(good)
        change(model)
        onnx.save(model, file)
        answer = compiler("build", graph=str(file))
        assert answer["error"] == "EngineError"
        return str(answer["message"])

    def sides(model: onnx.ModelProto) -> list[onnx.TensorShapeProto.Dimension]:
        return list(model.graph.input[0].type.tensor_type.shape.dim)

    def rename(model: onnx.ModelProto) -> None:
        model.graph.input[0].name = "images"
        for node in model.graph.node:
            node.input[:] = ["images" if name == "pixel_values" else name for name in node.input]

    expected = "expected FLOAT with a free batch and no other free axis; export again"
    for change in (
        lambda model: setattr(sides(model)[2], "dim_param", "height"),
        lambda model: setattr(sides(model)[0], "dim_value", 2),
    ):
        message = refused(change)
        assert message.startswith("tensorrt: pixel_values of model.onnx is FLOAT of shape (")
        assert message.endswith(expected)
    assert refused(rename) == ("tensorrt: model.onnx takes images; expected one input pixel_values")


def test_an_interrupt_cancels_the_build(compiler: Compiler, graph: Graph) -> None:
    assert compiler("interrupted", graph=str(graph("timm_clip"))) == {"calls": 3}


def test_the_timing_cache_is_kept_and_taken(compiler: Compiler, graph: Graph) -> None:
    answer = compiler("build", graph=str(graph("timm_clip")), timing=True, level=0)
    assert answer["timing"] > 0


@pytest.mark.parametrize(
    ("severity", "level", "collected"),
    [
        ("INTERNAL_ERROR", "INFO", True),
        ("ERROR", "INFO", True),
        ("WARNING", "INFO", False),
        ("INFO", "DEBUG", False),
        ("VERBOSE", "Level 5", False),
    ],
)
def test_the_log_is_routed(compiler: Compiler, severity: str, level: str, collected: bool) -> None:
    text = f"something of {severity} with 100 %"
    answer = compiler("log", severity=severity, text=text)
    assert answer == {"seen": [f"{level}: {text}"], "errors": [text] if collected else []}


def test_a_plan_cannot_be_opened_without_a_card(compiler: Compiler, graph: Graph) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    answer = compiler("open_plan", graph=str(graph("timm_clip")))
    assert answer["error"] == "EngineError"
    assert answer["message"].startswith("tensorrt: the plan of model.onnx cannot be opened; ")
    reason = compiler("unavailable")["reason"]
    assert reason.startswith(("cudaGetDeviceCount failed", "cuda-bindings is not installed"))


def test_the_rig_stays_out_of_this_process(compiler: Compiler) -> None:
    import sys

    assert compiler("unavailable")["version"].startswith("11.")
    assert not any(".rig" in path for path in sys.path)
    assert "tensorrt_bindings" not in sys.modules
