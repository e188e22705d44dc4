"""The variant kv in the graph: parity with PyTorch, and every form that is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import parser
from tests.support import constants as support
from tests.support import graphs, models, pictures, traces

from regraft.errors import RewriteError
from regraft.redirect import RedirectOptions
from regraft.tokens import TokenLayout
from regraft_export.graph.add_constants import add_constants
from regraft_export.graph.attention_sites import attention_site
from regraft_export.graph.document import read, write
from regraft_export.graph.patch import Patch, Traced, Wanted, build
from regraft_export.reference import PyTorchReference

HEADS, TOKENS, SIZE = 2, 5, 4
LAYOUT = TokenLayout(True, 1, (2, 2), HEADS * SIZE, 1, HEADS, 0)


@pytest.mark.parametrize("name", models.FAMILIES)
@pytest.mark.parametrize("wanted", [Wanted(), Wanted(probe=True)], ids=["model", "probe"])
def test_every_family_equals_pytorch(
    traced: Callable[..., Traced], name: str, wanted: Wanted
) -> None:
    vit, neurons = models.vit(name), models.neurons(models.vit(name))
    chosen = support.drawn(vit, first=1, registers=1)
    patch = Patch(neurons, RedirectOptions(), chosen)
    built = build(traced(name), patch, wanted)
    onnx.checker.check_model(built.proto, full_check=True)
    sites = built.sites
    assert sites is not None
    later = vit.layout.depth - 1
    assert (sites.token, sites.redirect, sites.output, sites.attention) == (0, 2, 0, later)
    assert built.nodes_added == dict.fromkeys(range(1, later + 1), 4)
    assert "test_time_registers" not in built.outputs
    pixels = pictures.pixels(3, models.FAMILIES[name].size)
    found = graphs.run(built.proto, {"pixel_values": pixels})
    assert set(found) == set(built.outputs)
    reference = PyTorchReference(vit, neurons, RedirectOptions(), chosen)
    right = reference.run("probe" if wanted.probe else "model", pixels, list(found))
    for output, value in found.items():
        assert value.shape[1:] == built.outputs[output][1:]
        assert traces.error(value, right[output]) < 1e-5, output
    for i in range(3):  # each image by itself
        single = graphs.run(built.proto, {"pixel_values": pixels[i : i + 1]})
        for output, value in single.items():
            assert traces.error(value, found[output][i : i + 1]) < 1e-5, output


@pytest.mark.parametrize("registers", [2, 3])
def test_several_constants_per_head(traced: Callable[..., Traced], registers: int) -> None:
    vit, neurons = models.vit("timm"), models.neurons(models.vit("timm"))
    chosen = support.drawn(vit, first=0, registers=registers)
    built = build(traced("timm"), Patch(neurons, RedirectOptions(), chosen), Wanted())
    pixels = pictures.pixels(2, (48, 32))
    found = graphs.run(built.proto, {"pixel_values": pixels})
    right = PyTorchReference(vit, neurons, RedirectOptions(), chosen)
    for output, value in right.run("model", pixels, list(found)).items():
        assert traces.error(found[output], value) < 1e-5


def test_without_constants_the_neurons_are_silent_and_no_node_is_added(
    traced: Callable[..., Traced],
) -> None:
    vit, neurons = models.vit("timm"), models.neurons(models.vit("timm"))
    patch = Patch(neurons, RedirectOptions(), support.drawn(vit, first=3))
    built, baseline = build(traced("timm"), patch, Wanted()), build(traced("timm"), None, Wanted())
    assert len(built.proto.graph.node) == len(baseline.proto.graph.node)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_a_valid_graph(traced: Callable[..., Traced], precision: str) -> None:
    vit = models.vit("timm")
    patch = Patch(models.neurons(vit), RedirectOptions(), support.drawn(vit))
    built = build(traced("timm", precision), patch, Wanted())
    onnx.checker.check_model(built.proto, full_check=True)
    kinds = {t.data_type for t in built.proto.graph.initializer if "regraft.constant." in t.name}
    assert kinds == {10 if precision == "fp16" else 16}


# A block's attention by itself: q, k, v come as inputs, (B, heads, T, size).
_HEAD = (
    '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n'
    "block (float[B,2,5,4] q, float[B,2,5,4] k, float[B,2,5,4] v{more}) => (float[B,2,5,4] y)\n"
    "<float one = {{0.5}}, float[1,1,1,5] mask = {{0, 0, 0, 0, 0}}, int64[3] flat = {{-1, 4, 5}},\n"
    " int64[4] back = {{-1, 2, 5, 5}}, int64[4] apart = {{-1, 2, 4, 5}}> {{\n{body}\n}}"
)
_KT = "kt = Transpose<perm=[0,1,3,2]>(k)\n"
ACCEPTED = {
    "plain": _KT + "s = MatMul(q, kt)\np = Softmax<axis=-1>(s)\ny = MatMul(p, v)",
    "scaled keys": _KT + "ks = Mul(kt, one)\ns = MatMul(q, ks)\np = Softmax<axis=-1>(s)\n"
    "y = MatMul(p, v)",
    "scaled scores": _KT + "s = MatMul(q, kt)\nt = Div(s, one)\np = Softmax<axis=-1>(t)\n"
    "y = MatMul(p, v)",
    "wide softmax": _KT + "s = MatMul(q, kt)\nt = Cast<to=11>(s)\nw = Softmax<axis=-1>(t)\n"
    "p = Cast<to=1>(w)\ny = MatMul(p, v)",
    "baked count": _KT + "s = MatMul(q, kt)\nt = Reshape(s, back)\np = Softmax<axis=-1>(t)\n"
    "y = MatMul(p, v)",
    "baked keys": "f = Transpose<perm=[0,1,3,2]>(k)\ng = Reshape(f, flat)\n"
    "kt = Reshape(g, apart)\ns = MatMul(q, kt)\np = Softmax<axis=-1>(s)\ny = MatMul(p, v)",
    "node": "y = Attention<scale=1.0>(q, k, v)",
}
SCALES = {"scaled keys": 0.5, "scaled scores": 2.0}
REFUSED = {
    "no attention": ("y = Add(q, k)", "0 Softmax or Attention nodes in the block"),
    "two": (
        _KT + "s = MatMul(q, kt)\np = Softmax<axis=-1>(s)\nr = Softmax<axis=-1>(p)\n"
        "y = MatMul(r, v)",
        "2 Softmax or Attention nodes in the block",
    ),
    "mask per token": (
        _KT + "s = MatMul(q, kt)\nt = Add(s, mask)\np = Softmax<axis=-1>(t)\ny = MatMul(p, v)",
        "a constant with one entry per token",
    ),
    "computed mask": (
        _KT + "s = MatMul(q, kt)\nm = Exp(s)\nt = Add(s, m)\np = Softmax<axis=-1>(t)\n"
        "y = MatMul(p, v)",
        "makes the scores of the attention from more than the tokens (a mask?)",
    ),
    "read twice": (
        _KT + "s = MatMul(q, kt)\np = Softmax<axis=-1>(s)\nz = MatMul(p, v)\nr = MatMul(p, q)\n"
        "y = Add(z, r)",
        "expected its product with the values alone",
    ),
    "no scores": ("p = Softmax<axis=-1>(q)\nz = Transpose<perm=[0,1,3,2]>(v)\n"
                  "s = MatMul(p, z)\ny = MatMul(s, v)", "does not stand between two products"),
    "one tensor": (
        _KT + "s = MatMul(q, kt)\np = Softmax<axis=-1>(s)\ny = MatMul(p, k)",
        "keys and values are one tensor, 'k'",
    ),
    "masked node": (
        "m = MatMul(q, kt)\ny = Attention(q, k, v, m)",
        "with more inputs than query, key and value (m)",
    ),
    "causal": ("y = Attention<is_causal=1>(q, k, v)", "that is causal"),
    "fused": (
        "y = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v)",
        "of the domain 'com.microsoft', fused already: rewrite before fusing",
    ),
}  # fmt: skip


def block(body: str) -> onnx.ModelProto:
    more = ", float[B,2,4,5] kt" if "kt" in body and "kt =" not in body else ""
    return parser.parse_model(_HEAD.format(more=more, body=body))


def rewritten(body: str, registers: int = 1) -> tuple[onnx.ModelProto, list[str], object]:
    graph = read(block(body))
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, HEADS, registers, SIZE)).astype(np.float32)
    site = attention_site(list(graph.nodes), LAYOUT, 0)
    mended = add_constants(graph, site, (key, value), LAYOUT)
    return write(graph, shapes_changed=True), mended, (key, value)


@pytest.mark.parametrize("form", ACCEPTED)
@pytest.mark.parametrize("registers", [1, 3])
def test_accepted_forms_equal_the_loops(form: str, registers: int) -> None:
    model, mended, constants = rewritten(ACCEPTED[form], registers)
    onnx.checker.check_model(model, full_check=True)
    assert len(mended) == {"baked count": 1, "baked keys": 2}.get(form, 0)
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 2, HEADS, TOKENS, SIZE)).astype(np.float32)
    found = graphs.run(model, {"q": q, "k": k, "v": v})["y"]
    scale = SCALES.get(form, 1.0) * np.sqrt(SIZE)  # the loops divide by the root themselves
    right = support.attention(scale * q, k, v, *constants)
    np.testing.assert_allclose(found, right, atol=1e-5)


@pytest.mark.parametrize("form", REFUSED)
def test_other_forms_are_refused(form: str) -> None:
    body, message = REFUSED[form]
    with pytest.raises(RewriteError) as caught:
        rewritten(body)
    assert message in str(caught.value)


def test_constants_of_another_size_are_refused() -> None:
    graph = read(block(ACCEPTED["plain"]))
    wrong = np.zeros((HEADS, 1, SIZE + 1), np.float32)
    with pytest.raises(RewriteError, match="2 heads of size 5 do not fit 'k'"):
        add_constants(graph, attention_site(list(graph.nodes), LAYOUT, 0), (wrong, wrong), LAYOUT)
