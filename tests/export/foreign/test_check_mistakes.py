"""The check catches wrong patches, and refuses what it does not understand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from tests.support import handmade_vit, models
from tests.support.checking import checked, found
from tests.support.exporters import BATCH, dynamo, torchscript
from tests.support.pictures import pixels
from torch import Tensor, nn

from regraft.errors import GateError, ModelError, RewriteError
from regraft.neurons import Neurons, RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft_export.foreign.check.compare import check
from regraft_export.onnx_file.read import read_file

PAPER = RedirectOptions()
FILES = [
    ("timm", "dynamo", 18, {}),
    ("timm", "torchscript", 14, {"axes": BATCH}),
    ("timm_swiglu", "dynamo", 20, {"optimize": False}),
    ("hf_clip_projection", "dynamo", 18, {}),
]


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def put(model: onnx.ModelProto, name: str, values: NDArray[Any]) -> None:
    tensor(model, name).CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))


def get(model: onnx.ModelProto, name: str) -> NDArray[Any]:
    return np.array(numpy_helper.to_array(tensor(model, name)))


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def one_hots(model: onnx.ModelProto) -> set[str]:
    places = [n for n in model.graph.node if n.name.endswith(".place")]
    return {i for n in places for i in n.input if i.startswith("regraft.per_token")}


def a_neuron_beside(model: onnx.ModelProto) -> None:
    indices = get(model, "regraft.redirect.0.indices")
    indices[0] = (indices[0] + 1) % 96
    put(model, "regraft.redirect.0.indices", indices)


def a_row_not_zeroed(model: onnx.ModelProto) -> None:
    rows, weight = (get(model, f"regraft.redirect.0.{what}") for what in ("rows", "weight"))
    weight[get(model, "regraft.redirect.0.indices")[0]] = rows[0]
    put(model, "regraft.redirect.0.weight", weight)


def the_register_before_its_place(model: onnx.ModelProto) -> None:
    for name in one_hots(model):
        put(model, name, np.roll(get(model, name), -1, axis=1))


def the_maximum_over_the_batch(model: onnx.ModelProto) -> None:
    maximum = node(model, "regraft.redirect.0.max")
    if len(maximum.input) > 1:
        put(model, maximum.input[1], np.array([0, 1]))
    else:
        next(a for a in maximum.attribute if a.name == "axes").ints[:] = [0, 1]


def one_patch_keeps_its_activation(model: onnx.ModelProto) -> None:
    """Behind the down-projection, the fifth token's share of the neurons comes back."""
    columns, write = (node(model, f"regraft.redirect.0.{w}") for w in ("columns", "write"))
    add = node(model, "regraft.redirect.0.add")
    count = get(model, sorted(one_hots(model))[0]).shape[1]
    mask = np.zeros((1, count, 1), np.float32)
    mask[0, 5] = 1
    model.graph.initializer.append(numpy_helper.from_array(mask, "fifth"))
    alone = add.input[0]
    add.input[0] = "kept.sum"
    place = next(i for i, n in enumerate(model.graph.node) if n.name == add.name)
    for made in (
        helper.make_node("Add", [alone, "kept.product"], ["kept.sum"]),
        helper.make_node("MatMul", ["kept", "kept.rows"], ["kept.product"]),
        helper.make_node("Mul", [columns.output[0], "fifth"], ["kept"]),
    ):
        model.graph.node.insert(place, made)
    # The rows carry the signs of the branch; the activation does not.
    rows = get(model, write.input[1])
    signs = [n for n in model.graph.node if n.name == "regraft.redirect.0.sign"]
    if signs:
        rows = rows * get(model, signs[0].input[1]).reshape(-1, 1)
    model.graph.initializer.append(numpy_helper.from_array(rows, "kept.rows"))


def a_register_that_is_not_zero(model: onnx.ModelProto) -> None:
    """The last patch again. (A constant would not do: a norm in front makes it zero.)"""
    mode = node(model, "regraft.append_register").attribute[0]
    assert mode.name == "mode"
    mode.s = b"edge"


def the_register_stays_and_the_first_token_goes(model: onnx.ModelProto) -> None:
    for name in ("regraft.cut.start", "regraft.cut.end"):
        put(model, name, get(model, name) + 1)


def nothing_written_to_the_register(model: onnx.ModelProto) -> None:
    add = node(model, "regraft.redirect.0.add")
    for reader in model.graph.node:
        reader.input[:] = [add.input[0] if i == add.output[0] else i for i in reader.input]


def a_number_that_is_none(model: onnx.ModelProto) -> None:
    rows = get(model, "regraft.redirect.0.rows")
    rows[0, 0] = np.nan
    put(model, "regraft.redirect.0.rows", rows)


MISTAKES = [
    a_neuron_beside,
    a_row_not_zeroed,
    the_register_before_its_place,
    the_maximum_over_the_batch,
    one_patch_keeps_its_activation,
    a_register_that_is_not_zero,
    the_register_stays_and_the_first_token_goes,
    nothing_written_to_the_register,
    a_number_that_is_none,
]


@pytest.mark.parametrize("case", FILES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.__name__)
def test_a_mistake_in_the_graph_fails(
    mistake: Callable[[onnx.ModelProto], None], case: Any, file: Callable[..., Path]
) -> None:
    vit, size = models.vit(case[0]), models.FAMILIES[case[0]].size
    result = checked(file(*case), models.neurons(vit), PAPER, pixels(3, size), mistake=mistake)
    assert not result.passed
    with pytest.raises(GateError, match="the patched graph is not equal to the method: patched"):
        result.gate(PAPER)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_mistake_below_the_noise_of_fp16_fails_as_float32(precision: str, tmp_path: Path) -> None:
    import copy

    vit, size = models.vit("timm"), models.FAMILIES["timm"].size
    kind = {"fp16": torch.half, "bf16": torch.bfloat16}[precision]
    dynamo(copy.deepcopy(vit.module).to(kind), size, tmp_path / "in.onnx", 22)
    slightly = replace(PAPER, scale=(1.05,))
    neurons = models.neurons(vit)
    result = checked(
        tmp_path / "in.onnx", neurons, PAPER, pixels(3, size), patch_with=(neurons, slightly)
    )
    failed = {c.graph for c in result.parity if not c.passed}
    assert failed == {"patched, as float32"}


OTHER_OPTIONS = [
    RedirectOptions(value="per-layer"),
    RedirectOptions(cls="keep"),
    RedirectOptions(patches="keep"),
    RedirectOptions(patches="mean"),
    RedirectOptions(scale=(0.99,)),
]


@pytest.mark.parametrize("options", OTHER_OPTIONS, ids=repr)
def test_a_patch_with_other_options_fails(
    options: RedirectOptions, file: Callable[..., Path]
) -> None:
    vit, size = models.vit("timm"), models.FAMILIES["timm"].size
    neurons, path = models.neurons(vit), file("timm", "dynamo", 18, {})
    assert not checked(path, neurons, PAPER, pixels(3, size), patch_with=(neurons, options)).passed
    assert not checked(path, neurons, options, pixels(3, size), patch_with=(neurons, PAPER)).passed


def test_a_patch_of_other_neurons_or_none_fails(file: Callable[..., Path]) -> None:
    path, size = file("timm", "dynamo", 18, {}), models.FAMILIES["timm"].size
    neurons = models.neurons(models.vit("timm"))
    first, *rest = neurons.neurons
    others = {
        "fewer": Neurons(tuple(rest)),
        "sign": Neurons((replace(first, sign=-first.sign), *rest)),
        "beside": Neurons((replace(first, index=first.index - 1), *rest)),
    }
    for other in others.values():
        result = checked(path, neurons, PAPER, pixels(3, size), patch_with=(other, PAPER))
        assert not result.passed
    unpatched = check(found(path), read_file(path), neurons, PAPER, pixels(3, size))
    assert any("shape" in line for line in unpatched.failures)


def test_a_patch_that_does_nothing_cannot_be_told(tmp_path: Path) -> None:
    """With a down-projection of zeros, and registers nobody attends to, all files are equal."""
    module, _ = handmade_vit.planted()
    vit = module.eval().requires_grad_(False)
    with torch.no_grad():
        for name, weight in vit.named_parameters():
            if "narrow" in name or "attention" in name:
                weight.zero_()
    torchscript(vit, (32, 32), tmp_path / "in.onnx", 17, BATCH)
    neurons = Neurons((RegisterNeuron(0, 3),))
    result = checked(tmp_path / "in.onnx", neurons, PAPER, pixels(2, (32, 32)))
    assert result.failures == [
        "on these images the patch changes nothing by more than "
        f"{max(result.changes.values()):.1e}, so the unpatched file would pass too; give images "
        "with outlier tokens"
    ]


# What the check does not understand. The patch is never made; any file stands in for it.


def refusal(path: Path, size: tuple[int, int]) -> str:
    neurons = Neurons((RegisterNeuron(0, 3),))
    with pytest.raises(RewriteError) as caught:
        check(found(path), read_file(path), neurons, PAPER, pixels(2, size))
    return str(caught.value)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
@pytest.mark.parametrize("opset", [18, 23])
def test_positions_inside_attention(name: str, opset: int, tmp_path: Path) -> None:
    import timm

    size = 56 if name.startswith("eva") else 32
    module = timm.create_model(
        name, depth=2, embed_dim=48, num_heads=3, num_classes=0, img_size=size
    )
    dynamo(models.livened(module), (size, size), tmp_path / "in.onnx", opset)
    message = refusal(tmp_path / "in.onnx", (size, size))
    assert "node_" in message
    assert any(
        part in message
        for part in ("so positions matter there", "does not understand", "of another block")
    )


def test_masks_and_causal_attention(file: Callable[..., Path], tmp_path: Path) -> None:
    model = onnx.load(file("timm", "dynamo", 23, {}))
    attention = next(n for n in model.graph.node if n.op_type == "Attention")
    bias = np.random.default_rng(0).normal(size=(1, 3, 25, 25)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(bias, "relative"))
    attention.input.append("relative")
    onnx.save(model, tmp_path / "bias.onnx")
    message = refusal(tmp_path / "bias.onnx", (48, 32))
    assert f"node {attention.name!r} (Attention), which has relative" in message
    del attention.input[3:]
    kept = [a for a in attention.attribute if a.name != "is_causal"]
    del attention.attribute[:]
    attention.attribute.extend([*kept, helper.make_attribute("is_causal", 1)])
    onnx.save(model, tmp_path / "causal.onnx")
    assert "which has is_causal" in refusal(tmp_path / "causal.onnx", (48, 32))


def put_behind(model: onnx.ModelProto, made: onnx.NodeProto, value: str) -> None:
    """Lets ``made``, which reads ``value``, be read instead of it."""
    places = [i for i, n in enumerate(model.graph.node) if value in n.output]
    place = places[0] if places else -1  # an input of the graph
    for reader in model.graph.node:
        reader.input[:] = [made.output[0] if i == value else i for i in reader.input]
    model.graph.node.insert(place + 1, made)


@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        ("Mul", (3, 1, 1), "scales its scores by 'more' of shape (3, 1, 1)"),
        ("Div", (25,), "scales its scores by 'more' of shape (25,)"),
        ("Add", (25,), "adds 'more' to its scores, which is not zero: a mask or a bias"),
        ("Sub", (), "(Sub), which makes the scores of an attention"),
        ("Tanh", None, "(Tanh), which makes the scores of an attention"),
    ],
)
def test_what_is_done_to_scores(
    op: str, shape: tuple[int, ...] | None, message: str, file: Callable[..., Path], tmp_path: Path
) -> None:
    model = onnx.load(file("timm", "dynamo", 18, {}))
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    inputs = [softmax.input[0]]
    if shape is not None:
        values = 1 + np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, "more"))
        inputs.append("more")
    put_behind(model, helper.make_node(op, inputs, ["changed"], name="change"), inputs[0])
    onnx.save(model, tmp_path / "in.onnx")
    assert message in refusal(tmp_path / "in.onnx", (48, 32))


def test_what_is_done_to_attention(file: Callable[..., Path], tmp_path: Path) -> None:
    model = onnx.load(file("timm", "dynamo", 18, {}))
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    made = helper.make_node("Sqrt", [softmax.output[0]], ["changed"], name="root")
    put_behind(model, made, softmax.output[0])
    onnx.save(model, tmp_path / "in.onnx")
    message = refusal(tmp_path / "in.onnx", (48, 32))
    assert f"node {softmax.name!r} (Softmax), which is read by 'root' (Sqrt)" in message


def test_a_scale_of_one_number_is_understood(file: Callable[..., Path], tmp_path: Path) -> None:
    model = onnx.load(file("timm", "dynamo", 18, {}))
    for i, softmax in enumerate([n for n in model.graph.node if n.op_type == "Softmax"]):
        name = f"more.{i}"
        model.graph.initializer.append(
            numpy_helper.from_array(np.full((1, 1), 3, np.float32), name)
        )
        made = helper.make_node("Mul", [softmax.input[0], name], [f"changed.{i}"], name=name)
        put_behind(model, made, softmax.input[0])
    onnx.save(model, tmp_path / "in.onnx")
    neurons = models.neurons(models.vit("timm"))
    assert checked(tmp_path / "in.onnx", neurons, PAPER, pixels(2, (48, 32))).passed


class WithPositions(handmade_vit.Block):
    """Positions come in again in each block."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x + self.again))
        return x + self.narrow(nn.functional.gelu(self.widen(self.before_mlp(x))))


def test_positions_inside_a_block(tmp_path: Path) -> None:
    module, _ = handmade_vit.planted()
    module.eval().requires_grad_(False)
    for block in module.layers:  # type: ignore[union-attr]  # nn.Module gives no types
        block.__class__ = WithPositions
        block.register_buffer("again", torch.randn(17, handmade_vit.WIDTH))
    torchscript(module, (32, 32), tmp_path / "in.onnx", 17, BATCH)
    message = refusal(tmp_path / "in.onnx", (32, 32))
    assert "cannot send a register through the nodes from" in message
    assert "so positions matter there" in message


def test_an_input_that_prepares_pictures_itself(file: Callable[..., Path], tmp_path: Path) -> None:
    model, path = onnx.load(file("timm", "dynamo", 18, {})), tmp_path / "in.onnx"
    image = model.graph.input[0].name
    put_behind(model, helper.make_node("Cast", [image], ["widened"], to=1, name="widen"), image)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    onnx.save(model, path)
    neurons = Neurons((RegisterNeuron(0, 3),))
    with pytest.raises(ModelError, match=f"its input {image!r} is uint8"):
        check(found(path), read_file(path), neurons, PAPER, pixels(1, (48, 32)))
