"""Patched files of real exporters against PyTorch with hooks, and what is kept and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from tests.support import handmade_vit, models
from tests.support.exporters import ANY, BATCH, CASES, EVERYTHING, dynamo, torchscript
from tests.support.foreign_files import REFUSALS, bad
from tests.support.graphs import open_session
from tests.support.traces import error
from torch import Tensor

from regraft.neurons import Neurons, RegisterNeuron
from regraft.parity import LIMITS
from regraft.redirect import RedirectOptions
from regraft_export.finding.fingerprint import fingerprint
from regraft_export.foreign.patching import patch
from regraft_export.foreign.survey import Survey, survey
from regraft_export.onnx_file.read import read_file
from regraft_export.onnx_file.write import write_file
from regraft_export.vit.hooks import redirected
from regraft_export.vit.structure import VisionTransformer, from_module


def patched(
    path: Path, neurons: Neurons, options: RedirectOptions, out: Path, **more: Any
) -> Survey:
    found = survey(read_file(path), **more)
    result = patch(found, neurons, options)
    write_file(result.proto, result.stored, out, external=found.file.external)
    return found


def outputs(path: Path, pixels: NDArray[Any]) -> list[NDArray[Any]]:
    session = open_session(onnx.load(path), optimize=False)
    result: list[NDArray[Any]] = session.run(None, {session.get_inputs()[0].name: pixels})
    return result


def right(
    vit: VisionTransformer, pixels: Tensor, neurons: Neurons, options: RedirectOptions
) -> list[NDArray[Any]]:
    with torch.no_grad(), redirected(vit, neurons, options):
        output = vit.module(pixels)
    return [t.numpy() for t in ([output] if isinstance(output, Tensor) else output.to_tuple())]


def images(size: tuple[int, int], count: int = 3) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
@pytest.mark.parametrize("options", [RedirectOptions(), EVERYTHING], ids=["paper", "everything"])
def test_a_patched_file_equals_pytorch_with_hooks(
    case: Any, options: RedirectOptions, file: Callable[..., Path], tmp_path: Path
) -> None:
    family, path = case[0], file(*case)
    vit, size = models.vit(family), models.FAMILIES[family].size
    neurons = models.neurons(vit)
    fixed = case[1] == "torchscript" and "axes" not in case[3]
    found = patched(path, neurons, options, tmp_path / "out.onnx")
    assert (found.stack.depth, found.hidden) == (
        3,
        dict.fromkeys(range(3), vit.blocks[0].down.in_features),
    )
    assert (found.entry.prefix, found.entry.grid) == (vit.layout.prefix, vit.layout.grid)
    pixels = images(size, 1 if fixed else 3)
    got = outputs(tmp_path / "out.onnx", pixels.numpy())
    plain = outputs(path, pixels.numpy())
    expected = right(vit, pixels, neurons, options)
    assert len(got) == len(expected)
    for value, reference, before in zip(got, expected, plain, strict=True):
        assert error(value, reference) < 1e-5
        assert error(before, reference) > 1e-3  # the redirect does something here


@pytest.mark.parametrize("value", ["per-neuron", "constant"])
def test_a_gemm_over_rows_of_tokens(value: Any, tmp_path: Path) -> None:
    module, _ = handmade_vit.planted()
    vit = from_module(module.eval().requires_grad_(False), (32, 32))
    neurons = models.neurons(vit, layers=(1, 2))
    options = RedirectOptions(value=value)
    pixels = images((32, 32))
    expected = right(vit, pixels, neurons, options)[0]
    for block in module.layers:  # type: ignore[union-attr]  # nn.Module gives no types
        block.__class__ = handmade_vit.FlatBlock
    torchscript(module, (32, 32), tmp_path / "in.onnx", 17, BATCH)
    assert "Gemm" in {n.op_type for n in onnx.load(tmp_path / "in.onnx").graph.node}
    patched(tmp_path / "in.onnx", neurons, options, tmp_path / "out.onnx")
    assert error(outputs(tmp_path / "out.onnx", pixels.numpy())[0], expected) < 1e-5


@pytest.mark.parametrize(
    "options",
    [RedirectOptions(), EVERYTHING, RedirectOptions(value="constant")],
    ids=["paper", "everything", "constant"],
)
def test_a_file_for_any_image_size_stays_one(options: RedirectOptions, tmp_path: Path) -> None:
    module = handmade_vit.AnySize()
    module.load_state_dict(handmade_vit.planted()[0].state_dict())
    module.eval().requires_grad_(False)
    torchscript(module, (32, 32), tmp_path / "in.onnx", 17, ANY)
    neurons = models.neurons(from_module(module, (32, 32)), layers=(1, 2))
    found = patched(tmp_path / "in.onnx", neurons, options, tmp_path / "out.onnx")
    assert found.image.open_size
    for size in (32, 32), (48, 24), (64, 40):
        pixels = images(size)
        expected = right(from_module(module, size), pixels, neurons, options)[0]
        got = outputs(tmp_path / "out.onnx", pixels.numpy())[0]
        assert error(got, expected) < 1e-5


def test_fp16(tmp_path: Path) -> None:
    vit = models.vit("timm")
    size, neurons = models.FAMILIES["timm"].size, models.neurons(vit)
    import copy

    dynamo(copy.deepcopy(vit.module).half(), size, tmp_path / "in.onnx", 20)
    found = patched(tmp_path / "in.onnx", neurons, RedirectOptions(), tmp_path / "out.onnx")
    assert found.precision == "fp16"
    pixels = images(size)
    got = outputs(tmp_path / "out.onnx", pixels.half().numpy())[0]
    expected = right(vit, pixels, neurons, RedirectOptions())[0]
    assert error(got, expected) < LIMITS["fp16"].relative_error


def as_float32(path: Path) -> onnx.ModelProto:
    """A bfloat16 file with every number widened: ONNX Runtime cannot run the file itself."""
    model = onnx.load(path)
    wide, narrow = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    for t in model.graph.initializer:
        if t.data_type == narrow:
            values = onnx.numpy_helper.to_array(t).astype(np.float32)
            t.CopyFrom(onnx.numpy_helper.from_array(values, t.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == narrow:
                attribute.i = wide
    return model


def test_bf16_by_its_float32_twin(tmp_path: Path) -> None:
    import copy

    vit = models.vit("timm")
    size, neurons = models.FAMILIES["timm"].size, models.neurons(vit)
    module = copy.deepcopy(vit.module).bfloat16()
    dynamo(module, size, tmp_path / "in.onnx", 22)
    found = patched(tmp_path / "in.onnx", neurons, RedirectOptions(), tmp_path / "out.onnx")
    assert found.precision == "bf16"
    pixels = images(size)
    session = open_session(as_float32(tmp_path / "out.onnx"), optimize=False)
    got = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]
    rounded = from_module(module.float(), size)
    assert error(got, right(rounded, pixels, neurons, RedirectOptions())[0]) < 5e-3


def test_everything_else_of_the_file_is_kept(file: Callable[..., Path], tmp_path: Path) -> None:
    model = onnx.load(file("timm", "dynamo", 18, {}))
    for i, node in enumerate(model.graph.node):
        node.doc_string = f"doc {i}"
        entry = node.metadata_props.add()
        entry.key, entry.value = "author", str(i)
    model.doc_string, model.producer_name, model.domain = "about", "somebody", "here"
    model.graph.doc_string = "the graph"
    entry = model.metadata_props.add()
    entry.key, entry.value = "licence", "theirs"
    model.opset_import.add(domain="somewhere", version=3)
    body = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    model.functions.append(
        onnx.helper.make_function(
            "somewhere", "Twice", ["x"], ["y"], [body], [onnx.helper.make_opsetid("", 18)]
        )
    )
    onnx.save(model, tmp_path / "in.onnx")
    neurons = models.neurons(models.vit("timm"), layers=(0,))
    patched(tmp_path / "in.onnx", neurons, RedirectOptions(), tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx")
    for name in ("doc_string", "producer_name", "producer_version", "domain", "ir_version"):
        assert getattr(after, name) == getattr(model, name)
    assert list(after.opset_import) == list(model.opset_import)
    assert list(after.functions) == list(model.functions)
    assert after.graph.doc_string == "the graph"
    assert [e.key for e in after.metadata_props][:-1] == [e.key for e in model.metadata_props]
    assert (list(after.graph.input), list(after.graph.output)) == (
        list(model.graph.input),
        list(model.graph.output),
    )
    before = {n.output[0]: n for n in model.graph.node}
    theirs = [n for n in after.graph.node if not n.name.startswith("regraft.")]
    assert len(theirs) == len(model.graph.node)
    assert [n.doc_string for n in theirs] == [f"doc {i}" for i in range(len(theirs))]
    same = [n for n in theirs if n.output[0] in before and n == before[n.output[0]]]
    assert len(same) > 0.8 * len(theirs)
    assert all(n.metadata_props[-1].value == str(i) for i, n in enumerate(theirs))
    onnx.checker.check_model(after, full_check=True)


def test_external_data_goes_beside_the_result(file: Callable[..., Path], tmp_path: Path) -> None:
    model = onnx.load(file("timm", "dynamo", 18, {}))
    onnx.save(
        model,
        tmp_path / "in.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=256,
    )
    vit = models.vit("timm")
    patched(tmp_path / "in.onnx", models.neurons(vit), RedirectOptions(), tmp_path / "out.onnx")
    (tmp_path / "w.bin").unlink()  # the result stands alone
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    assert {p.name for p in tmp_path.iterdir()} == {"in.onnx", "out.onnx", "out.onnx.data"}
    import onnxruntime as ort

    pixels = images((48, 32))
    session = ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]
    assert error(got, right(vit, pixels, models.neurons(vit), RedirectOptions())[0]) < 1e-5


def peak_of_patching(folder: Path, rows: list[tuple[int, int]]) -> int:
    """Bytes that a process takes which patches in.onnx there to out.onnx."""
    # Not ru_maxrss, which a process takes over from the one that starts it.
    script = """
import sys
from pathlib import Path
from regraft.cli.main import main
code = main(sys.argv[1:])
lines = Path("/proc/self/status").read_text().splitlines()
print(next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
sys.exit(code)
"""
    words = ["patch", folder / "in.onnx", "--neurons", listed(folder / "n.json", rows)]
    words += ["--out", folder / "out.onnx"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_a_vit_l_takes_less_memory_than_the_file_is_long(tmp_path: Path) -> None:
    import timm

    module = models.livened(timm.create_model("vit_large_patch16_224", num_classes=0))
    torchscript(module, (224, 224), tmp_path / "in.onnx", 17, BATCH)
    length = (tmp_path / "in.onnx").stat().st_size
    assert length > 1.2e9
    rows = [(layer, index) for layer in (10, 11, 12) for index in (3, 50, 700)]
    assert peak_of_patching(tmp_path, rows) < length
    assert survey(read_file(tmp_path / "in.onnx")).stack.depth == 24


@pytest.mark.slow
def test_external_data_over_2_gb_is_not_loaded(file: Callable[..., Path], tmp_path: Path) -> None:
    model = onnx.load(file("timm", "dynamo", 18, {}))
    rows, columns = 2600, 1 << 18  # float32: 2.5 GiB
    table = onnx.TensorProto(name="table", data_type=onnx.TensorProto.FLOAT, dims=[rows, columns])
    onnx.save(
        model,
        tmp_path / "in.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=256,
    )
    model = onnx.load(tmp_path / "in.onnx", load_external_data=False)
    # The table comes first in the file, so what the patch reads lies behind 2 GiB.
    size = rows * columns * 4
    rest = (tmp_path / "w.bin").read_bytes()
    with (tmp_path / "w.bin").open("wb") as data:
        data.seek(size - 4)
        data.write(np.float32(7).tobytes())
        data.write(rest)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(int(entry.value) + size)
    table.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(size))):
        table.external_data.add(key=key, value=value)
    model.graph.initializer.append(table)
    last = onnx.numpy_helper.from_array(np.array([rows - 1]), "last")
    model.graph.initializer.append(last)
    model.graph.node.append(onnx.helper.make_node("Gather", ["table", "last"], ["row"]))
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("row", onnx.TensorProto.FLOAT, [1, columns])
    )
    onnx.save(model, tmp_path / "in.onnx")
    vit = models.vit("timm")
    neurons = models.neurons(vit)
    rows_of = [(n.layer, n.index) for n in neurons.neurons]
    assert peak_of_patching(tmp_path, rows_of) < 1 << 30
    (tmp_path / "w.bin").unlink()
    import onnxruntime as ort

    session = ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    pixels = images((48, 32))
    tokens, row = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    assert (row.shape, row[0, -1], row[0, :-1].any()) == ((1, columns), 7, False)
    plain = Neurons(tuple(RegisterNeuron(*place) for place in rows_of))
    assert error(tokens, right(vit, pixels, plain, RedirectOptions())[0]) < 1e-5


# The command line.


def listed(path: Path, rows: list[tuple[int, int]], **about: Any) -> Path:
    found = Neurons(tuple(RegisterNeuron(layer, index) for layer, index in rows), about)
    path.write_text(json.dumps(found.to_json()))
    return path


def test_the_command_without_torch(file: Callable[..., Path], tmp_path: Path) -> None:
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "timm", "transformers", "onnxscript"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
from regraft.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    neurons = listed(tmp_path / "n.json", [(0, 3), (2, 5)])
    words = [
        "patch",
        file("timm", "dynamo", 18, {}),
        "--neurons",
        neurons,
        "--out",
        tmp_path / "o.onnx",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "redirect site: layer 2" in done.stdout
    assert "made by hand" in done.stderr


def test_a_patched_file_is_named_as_one(
    file: Callable[..., Path], tmp_path: Path, regraft: Callable[..., tuple[int, str, str]]
) -> None:
    words = ("patch", file("timm", "dynamo", 18, {}), "--neurons", tmp_path / "n.json")
    code, _, err = regraft(*words, "--out", tmp_path / "o.txt")
    assert (code, "ends in '.txt'; expected .onnx" in err) == (2, True)
    code, _, err = regraft(*words)
    assert (code, err.startswith("regraft: --out is missing; ")) == (2, True)


def test_a_dry_run_names_every_site_and_writes_nothing(
    file: Callable[..., Path], tmp_path: Path, regraft: Callable[..., tuple[int, str, str]]
) -> None:
    neurons = listed(tmp_path / "n.json", [(0, 3), (2, 5)])
    path = file("hf_clip", "torchscript", 17, {"axes": BATCH})
    code, out, _ = regraft("patch", path, "--neurons", neurons, "--dry-run", "--json")
    facts = json.loads(out)
    assert (code, facts["blocks"], len(facts["attentions"])) == (0, 3, 3)
    assert facts["token"]
    assert list(facts["redirects"]) == ["0", "2"]
    assert len(facts["outputs"]) == 1
    code, out, _ = regraft(
        "patch", file("timm", "torchscript", 17, {}), "--neurons", neurons, "--dry-run"
    )
    for part in ("mended: ", "25 -> 26", "nothing was written"):
        assert part in out
    assert [p.name for p in tmp_path.iterdir()] == ["n.json"]


def test_mended_counts_are_summed_up_by_kind_or_listed(
    file: Callable[..., Path], tmp_path: Path, regraft: Callable[..., tuple[int, str, str]]
) -> None:
    neurons = listed(tmp_path / "n.json", [(0, 3)])
    words = ("patch", file("timm", "torchscript", 17, {}), "--neurons", neurons)
    _, dry, _ = regraft(*words, "--dry-run")
    every = [line for line in dry.splitlines() if line.startswith("mended: ")]
    code, out, _ = regraft(*words, "--out", tmp_path / "o.onnx")
    short = [line for line in out.splitlines() if line.startswith("mended: ")]
    assert (code, len(every) > 5) == (0, True)
    assert short == [f"mended: 25 -> 26, in {len(every)} places (--verbose lists them)"]
    _, out, _ = regraft(*words, "--out", tmp_path / "o.onnx", "--force", "--verbose")
    assert [line for line in out.splitlines() if line.startswith("mended: ")] == every


def test_another_fine_tune_is_refused_unless_forced(
    file: Callable[..., Path], tmp_path: Path, regraft: Callable[..., tuple[int, str, str]]
) -> None:
    weight = models.vit("timm").blocks[0].down.weight.numpy()
    tuned = weight + 0.02 * np.random.default_rng(0).normal(size=weight.shape) * weight.std()
    path, out = file("timm", "dynamo", 18, {}), tmp_path / "o.onnx"
    for name, values in (("same", weight), ("other", tuned)):
        listed(tmp_path / f"{name}.json", [(0, 3)], fingerprints={"0": fingerprint(values, None)})
    code, _, err = regraft("patch", path, "--neurons", tmp_path / "other.json", "--out", out)
    assert (code, out.exists()) == (1, False)
    assert "layer 0: the down-projection differs from the fingerprint" in err
    code, _, err = regraft("patch", path, "--neurons", tmp_path / "same.json", "--out", out)
    assert (code, err) == (0, "")
    code, _, err = regraft(
        "patch", path, "--neurons", tmp_path / "other.json", "--out", out, "--force"
    )
    assert code == 0
    assert "(forced)" in err


@pytest.mark.parametrize("kind", REFUSALS)
def test_bad_files_get_one_message_and_nothing_is_written(
    kind: str,
    file: Callable[..., Path],
    tmp_path: Path,
    regraft: Callable[..., tuple[int, str, str]],
) -> None:
    path = bad(kind, tmp_path, file("timm", "dynamo", 18, {}))
    neurons = listed(tmp_path / "n.json", [(0, 3)])
    before = {p.name for p in tmp_path.iterdir()}
    code, out, err = regraft("patch", path, "--neurons", neurons, "--out", tmp_path / "o.onnx")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert REFUSALS[kind] in err
    assert {p.name for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("level", ["ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("family", ["timm", "timm_clip", "hf_clip"])
def test_what_onnx_runtime_fused_is_refused(
    family: str,
    level: str,
    file: Callable[..., Path],
    tmp_path: Path,
    regraft: Callable[..., tuple[int, str, str]],
) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "in.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(
        file(family, "dynamo", 18, {}), options, providers=["CPUExecutionProvider"]
    )
    neurons = listed(tmp_path / "n.json", [(0, 3)])
    words = ("--neurons", neurons, "--out", tmp_path / "o.onnx")
    code, _, err = regraft("patch", tmp_path / "in.onnx", *words)
    assert (code, (tmp_path / "o.onnx").exists(), err.count("\n")) == (1, False, 1)
    assert "of ONNX Runtime's optimiser); patch the file as it was before fusing" in err


def test_neurons_that_do_not_fit_a_patched_file_and_what_exists(
    file: Callable[..., Path], tmp_path: Path, regraft: Callable[..., tuple[int, str, str]]
) -> None:
    path, out = file("timm", "dynamo", 18, {}), tmp_path / "o.onnx"
    far = listed(tmp_path / "far.json", [(3, 0)])
    code, _, err = regraft("patch", path, "--neurons", far, "--out", out)
    assert (code, out.exists()) == (1, False)
    assert "the model has 3 blocks" in err
    near = listed(tmp_path / "near.json", [(0, 191)])
    assert regraft("patch", path, "--neurons", near, "--out", out)[0] == 0
    code, _, err = regraft("patch", path, "--neurons", near, "--out", out)
    assert "exists already" in err
    code, _, err = regraft("patch", out, "--neurons", near, "--out", tmp_path / "two.onnx")
    assert (code, (tmp_path / "two.onnx").exists()) == (1, False)
    assert "is patched already" in err


def test_not_even_force_writes_over_what_is_read(
    file: Callable[..., Path], tmp_path: Path, regraft: Callable[..., tuple[int, str, str]]
) -> None:
    # A neurons file may have any name; OUT.onnx may not.
    path, near = file("timm", "dynamo", 18, {}), listed(tmp_path / "near.onnx", [(0, 191)])
    outside = tmp_path / "outside.onnx"
    model = onnx.load(path)
    onnx.save(model, outside, save_as_external_data=True, location="o.onnx.data", size_threshold=0)
    for source, out in ((path, path), (path, near), (outside, tmp_path / "o.onnx")):
        before = {f: f.read_bytes() for f in (path, near, outside, tmp_path / "o.onnx.data")}
        code, _, err = regraft("patch", source, "--neurons", near, "--out", out, "--force")
        assert (code, err.count("\n")) == (1, 1)
        assert "would be written over, and is read; give another --out" in err
        assert {f: f.read_bytes() for f in before} == before
    assert not (tmp_path / "o.onnx").exists()


def test_causal_attention_and_relative_bias_are_refused(
    file: Callable[..., Path], tmp_path: Path
) -> None:
    from regraft.errors import RewriteError

    model = onnx.load(file("timm", "dynamo", 23, {}))
    node = next(n for n in model.graph.node if n.op_type == "Attention")
    bias = np.random.default_rng(0).normal(size=(1, 3, 25, 25)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(bias, "relative"))
    node.input.append("relative")
    onnx.save(model, tmp_path / "bias.onnx")
    neurons = models.neurons(models.vit("timm"))
    with pytest.raises(RewriteError, match="mask with one entry per token"):
        patch(survey(read_file(tmp_path / "bias.onnx")), neurons, RedirectOptions())
    del node.input[3:]
    kept = [a for a in node.attribute if a.name != "is_causal"]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("is_causal", 1)])
    onnx.save(model, tmp_path / "causal.onnx")
    with pytest.raises(RewriteError, match="causal attention"):
        patch(survey(read_file(tmp_path / "causal.onnx")), neurons, RedirectOptions())


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_rotary_and_relative_positions_are_refused(name: str, tmp_path: Path) -> None:
    import timm

    from regraft.errors import RewriteError

    size = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 0, "img_size": 56}
    if name.startswith("beit"):
        size["img_size"] = 32
    module = models.livened(timm.create_model(name, **size))
    dynamo(module, (size["img_size"], size["img_size"]), tmp_path / "in.onnx", 18)
    neurons = Neurons((RegisterNeuron(0, 3),))
    with pytest.raises(RewriteError, match="a constant with one entry per token"):
        patch(survey(read_file(tmp_path / "in.onnx")), neurons, RedirectOptions())
