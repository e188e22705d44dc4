"""The CUDA operators on a card, of any size, against numpy and PyTorch."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from numpy.typing import NDArray

from regraft.engines.ort_cuda.operators import (
    LIBRARY,
    PRODUCTS,
    compile_library,
    timed_products,
)

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def session_of(proto: onnx.ModelProto, folder: Path, *, optimize: bool = True) -> Any:
    """On the card, with the operators that were compiled into a folder."""
    ort = importlib.import_module("onnxruntime")
    ort.preload_dlls()
    settings = ort.SessionOptions()
    settings.register_custom_ops_library(str(folder / LIBRARY))
    if not optimize:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(
        proto.SerializeToString(), settings, providers=["CUDAExecutionProvider"]
    )


def assert_near(got: NDArray[np.float32], right: NDArray[np.float32], limit: float) -> None:
    """Relative to each number, or to the largest."""
    np.testing.assert_allclose(got, right, rtol=limit, atol=limit * float(np.abs(right).max()))


@pytest.mark.parametrize("kind", ["float", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("batch", "tokens", "hidden", "neurons", "width"),
    [
        *((1, 197, 3072, 4, 768), (3, 1371, 4096, 1, 1536), (65, 5, 64, 33, 40)),
        *((2, 50, 384, 17, 1104), (8, 577, 256, 17, 72)),  # the last: 9 blocks an image
    ],
)
def test_operators_of_any_size(
    kind: str, batch: int, tokens: int, hidden: int, neurons: int, width: int, tmp_path: Path
) -> None:
    """Against numpy, in place and not (the residual is an output, too)."""
    suffix = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16"}[kind]
    rng = np.random.default_rng(tokens)
    number = {"float": 1, "float16": 10, "bfloat16": 16}[kind]
    nodes = f"""a = Cast<to = {number}>(h) b = Cast<to = {number}>(r) s = Cast<to = {number}>(signs)
    d = Cast<to = {number}>(down) c = Cast<to = {number}>(bias) twice = Add(b, b)
    one = regraft.AddRedirected_{suffix}(a, twice, n, s, d) two = regraft.AddRow_{suffix}(one, c)
    other = regraft.AddRow_{suffix}(b, c) back = Add(b, other)
    x = Concat<axis = 2>(b, b) cc = Concat<axis = 0>(c, c) z = regraft.BiasedSwiGlu_{suffix}(x, cc)
    y = Cast<to = 1>(two) u = Cast<to = 1>(back) w = Cast<to = 1>(z)"""
    shape = f"float[b, {tokens}, {width}]"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20, "regraft" : 1]>
        g (float[b, {tokens}, {hidden}] h, {shape} r) => ({shape} y, {shape} u, {shape} w)
        {{ {nodes} }}"""
    )
    h, r, signs, down, bias = (
        rng.integers(-8, 9, size).astype(np.float32) / 8  # exact in all types
        for size in (
            (batch, tokens, hidden),
            (batch, tokens, width),
            neurons,
            (neurons, width),
            width,
        )
    )
    signs = np.where(signs < 0, -1, 1).astype(np.float32)
    chosen = rng.integers(hidden, size=neurons)
    for name, value in (("n", chosen), ("signs", signs), ("down", down), ("bias", bias)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    compile_library(tmp_path)
    session = session_of(proto, tmp_path, optimize=False)
    y, u, w = session.run(["y", "u", "w"], {"h": h, "r": r})
    right, plus = 2 * r, 2 * r
    right[:, -1] += (h[:, :, chosen] * signs).max(axis=1) @ down + bias
    plus[:, -1] += bias
    opened = r + bias
    limit = {"float": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[kind]
    np.testing.assert_allclose(y, right, rtol=limit, atol=limit)
    np.testing.assert_allclose(u, plus, rtol=limit, atol=limit)
    np.testing.assert_allclose(
        w, opened / (1 + np.exp(-opened)) * opened, rtol=2 * limit, atol=2 * limit
    )


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("batch", "tokens", "inner", "columns"),
    [(1, 197, 768, 3072), (3, 1371, 1536, 384), (65, 5, 64, 40), (2, 258, 8, 1104)],
)
def test_products_and_gelus_of_any_size(
    kind: str, batch: int, tokens: int, inner: int, columns: int, tmp_path: Path
) -> None:
    """Against numpy: as they come, timed, and as another library reads what was chosen."""
    number = {"fp32": 1, "fp16": 10, "bf16": 16}[kind]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20, "regraft" : 1]>
        g (float[b, {tokens}, {inner}] h) => (float[b, {tokens}, {columns}] y,
           float[b, {tokens}, {columns}] z, float[b, {tokens}, {columns}] g,
           float[b, {tokens}, {columns}] p, float[b, {tokens}, {columns}] q,
           float[b, {tokens}, {columns}] r) {{
          x = Cast<to = {number}>(h) w = Cast<to = {number}>(weight) c = Cast<to = {number}>(bias)
          one = regraft.Product_{kind}(x, w) two = regraft.BiasedProduct_{kind}(x, w, c)
          three = regraft.BiasedGelu_{kind}(one, c)
          m = Neg(weight) n = Neg(bias) v = Cast<to = {number}>(m) d = Cast<to = {number}>(n)
          i, j, k = regraft.ThreeProducts2Biased_{kind}(x, w, v, w, c, d)
          y = Cast<to = 1>(one) z = Cast<to = 1>(two) g = Cast<to = 1>(three)
          p = Cast<to = 1>(i) q = Cast<to = 1>(j) r = Cast<to = 1>(k) }}"""
    )
    rng = np.random.default_rng(tokens)
    h, weight, bias = wide(rng, batch, tokens, inner), wide(rng, inner, columns), wide(rng, columns)
    for name, value in (("weight", weight), ("bias", bias)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    y = h @ weight
    z = torch.nn.functional.gelu(torch.from_numpy(y + bias)).numpy()
    limit = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}[kind]

    def run(folder: Path) -> list[NDArray[np.float32]]:
        found = session_of(proto, folder).run(["y", "z", "g", "p", "q", "r"], {"h": h})
        rights = (y, y + bias, z, y + bias, -(y + bias), y)
        for got, right in zip(found, rights, strict=True):
            assert_near(got, right, limit)
        return list(found)

    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        compile_library(folder)
    run(first)
    with timed_products(first):
        timed = run(first)
    lines = (first / PRODUCTS).read_text().splitlines()
    assert lines[1] == "3 sizes"  # with a bias and without, and three at once
    assert len(lines) == 5
    shutil.copy(first / PRODUCTS, second)
    for got, expected in zip(run(second), timed, strict=True):
        np.testing.assert_array_equal(got, expected)
    (second / PRODUCTS).write_text("cublasLt 1\n")
    third = tmp_path / "third"
    shutil.copytree(second, third)
    with pytest.raises(Exception, match=r"with cuBLASLt 1, and this is .*build --force again"):
        run(third)
    (second / PRODUCTS).write_text("\n".join(lines[:-1]))
    fourth = tmp_path / "fourth"
    shutil.copytree(second, fourth)
    with pytest.raises(Exception, match="is cut off or damaged"):
        run(fourth)


def product(kind: str, weight: NDArray[np.float32]) -> onnx.ModelProto:
    """One product of whatever tokens, with nothing else."""
    number = {"fp32": 1, "fp16": 10}[kind]
    inner, columns = weight.shape
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20, "regraft" : 1]>
        g (float[b, t, {inner}] h) => (float[b, t, {columns}] y) {{
          x = Cast<to = {number}>(h) w = Cast<to = {number}>(weight)
          one = regraft.Product_{kind}(x, w) y = Cast<to = 1>(one) }}"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    return proto


def wide(rng: np.random.Generator, *size: int) -> NDArray[np.float32]:
    """Exact in all types, but sums depend on the order, and so on the algorithm."""
    drawn = rng.integers(-128, 128, size) * np.exp2(rng.integers(-15, -6, size))
    return drawn.astype(np.float32)


def test_a_token_more_is_computed_with_the_same_algorithm(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = wide(rng, 2048, 512)
    proto = product("fp16", weight)
    pixels = {tokens: wide(rng, 8, tokens, 2048) for tokens in (257, 258)}
    folders = [tmp_path / name for name in ("both", "read", "one")]
    for folder in folders:
        folder.mkdir()
        compile_library(folder)
    both, read, one = folders
    with timed_products(both):
        session = session_of(proto, both)
        timed = {tokens: session.run(["y"], {"h": h})[0] for tokens, h in pixels.items()}
    for tokens, h in pixels.items():
        assert_near(timed[tokens], h @ weight, 2e-3)
    head, count, *sizes = (both / PRODUCTS).read_text().splitlines()
    assert count == "2 sizes"
    rows, algorithms = zip(*((s.split()[3], s.split()[8:]) for s in sizes), strict=True)
    assert rows == ("2056", "2064")
    assert algorithms[0] == algorithms[1]
    shutil.copy(both / PRODUCTS, read)
    (one / PRODUCTS).write_text("\n".join([head, "1 sizes", sizes[0], ""]))
    for folder in (read, one):
        session = session_of(proto, folder)
        for tokens, h in pixels.items():
            np.testing.assert_array_equal(session.run(["y"], {"h": h})[0], timed[tokens])


def test_a_choice_that_does_not_fit_is_an_error_and_one_nearby_is_passed_over(
    tmp_path: Path,
) -> None:
    """float32's products get the algorithm that was chosen for fp16's, which cannot do them."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(256, 512)).astype(np.float32)
    pixels = {tokens: rng.normal(size=(8, tokens, 256)).astype(np.float32) for tokens in (257, 258)}
    folders = {name: tmp_path / name for name in ("timed", "refused", "passed")}
    for folder in folders.values():
        folder.mkdir()
        compile_library(folder)
    with timed_products(folders["timed"]):
        session_of(product("fp16", weight), folders["timed"]).run(["y"], {"h": pixels[257]})
    head, count, line = (folders["timed"] / PRODUCTS).read_text().splitlines()
    kind, *rest = line.split()
    assert kind == "2"  # CUDA_R_16F
    for name in ("refused", "passed"):
        (folders[name] / PRODUCTS).write_text("\n".join([head, count, " ".join(["0", *rest]), ""]))
    with pytest.raises(Exception, match=r"cannot be computed as it was chosen; .*build --force"):
        session_of(product("fp32", weight), folders["refused"]).run(["y"], {"h": pixels[257]})
    session = session_of(product("fp32", weight), folders["passed"])
    assert_near(session.run(["y"], {"h": pixels[258]})[0], pixels[258] @ weight, 1e-5)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("batch", "tokens", "hidden", "neurons", "width"),
    [
        *((1, 197, 3072, 4, 768), (24, 258, 4096, 1, 1536), (65, 5, 64, 33, 40)),
        *((2, 1371, 384, 17, 1104), (33, 130, 256, 40, 3200), (3, 1, 1032, 2, 384)),
        (3, 1371, 384, 128, 384),  # an odd number of rows, and the most neurons
        *((1, 578, 512, 5, 1024), (32, 513, 256, 9, 768)),  # 5 and 3 blocks an image
        (1, 64, 256, 128, 64),  # 128 blocks
    ],
)
def test_activations_write_rows_of_any_size(
    kind: str, batch: int, tokens: int, hidden: int, neurons: int, width: int, tmp_path: Path
) -> None:
    """Against numpy, in place and not (the residual is an output, too)."""
    number = {"fp32": 1, "fp16": 10, "bf16": 16}[kind]
    weights = ("bias", "long", "down", "row", "signs")
    lines = [f"{name}0 = Cast<to = {number}>({name})" for name in (*weights, "h", "r")]
    lines += ["hh = Concat<axis = 2>(h0, h0)", f"p = regraft.BiasedQuickGelu_{kind}(h0, bias0)"]
    units, sums = {"p": hidden}, {"b": width}
    for one, op in (
        ("g", "Gelu(h0, bias0"),
        ("q", "QuickGelu(h0, bias0"),
        ("s", "SwiGlu(hh, long0"),
    ):
        name, inputs = op.split("(")
        for how, what in (("kept", "Redirected"), ("twice", "Redirected"), ("row", "Row")):
            y, residual = f"{one}{how}", "r0"  # which is an output, too: it has to stay
            if how != "kept":
                residual = f"{y}r"
                lines += [f"{residual} = Add(r0, r0)"]
            more = "row0" if what == "Row" else "n, signs0, down0"
            lines += [
                f"{y}, {y}t = regraft.Biased{name}{what}_{kind}({inputs}, {residual}, {more})"
            ]
            units[y], sums[f"{y}t"] = hidden, width
    lines += ["b = Identity(r0)"]
    outputs = {**units, **sums}
    lines += [f"{name}1 = Cast<to = 1>({name})" for name in outputs]
    ports = [f"float[b, {tokens}, {length}] {name}1" for name, length in outputs.items()]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20, "regraft" : 1]>
        g (float[b, {tokens}, {hidden}] h, float[b, {tokens}, {width}] r)
        => ({", ".join(ports)}) {{ {" ".join(lines)} }}"""
    )
    rng = np.random.default_rng(tokens)
    shapes = {"h": (batch, tokens, hidden), "r": (batch, tokens, width), "bias": (hidden,)}
    shapes |= {"long": (2 * hidden,), "down": (neurons, width), "row": (width,)}
    v = {n: rng.integers(-16, 17, s).astype(np.float32) / 8 for n, s in shapes.items()}
    v["signs"] = np.where(rng.integers(2, size=neurons) > 0, 1, -1).astype(np.float32)
    chosen = rng.choice(hidden, size=neurons, replace=False)
    for name in weights:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(v[name], name))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(chosen, "n"))
    compile_library(tmp_path)
    session = session_of(proto, tmp_path)
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {n: v[n] for n in "hr"}), strict=True))
    limit = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 2.4e-2}[kind]
    for few in (1, batch):  # blocks meet anew in every run, and other numbers of them
        some = session.run(names, {n: v[n][:few] for n in "hr"})
        for name, again in zip(names, some, strict=True):
            assert_near(again, found[name][:few], limit)

    def expect(name: str, right: NDArray[np.float32]) -> None:
        assert_near(found[f"{name}1"], right, limit)

    x, gate = v["h"] + v["bias"], v["h"] + v["long"][:hidden]
    right = {
        "g": torch.nn.functional.gelu(torch.from_numpy(x)).numpy(),
        "q": x / (1 + np.exp(-1.702 * x)),
        "s": gate / (1 + np.exp(-gate)) * (v["h"] + v["long"][hidden:]),
    }
    expect("p", right["q"])
    for name, activated in right.items():
        # Of what was written, so that a redirected value is a value of the graph.
        most = (found[f"{name}kept1"][:, :, chosen] * v["signs"]).max(axis=1)
        rows = {"kept": most @ v["down"], "twice": most @ v["down"], "row": v["row"]}
        for how, row in rows.items():
            expect(f"{name}{how}", activated)
            total = v["r"] * (1 if how == "kept" else 2)
            total[:, -1] += row
            expect(f"{name}{how}t", total)
    np.testing.assert_array_equal(found["b1"], v["r"])
