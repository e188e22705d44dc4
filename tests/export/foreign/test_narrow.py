"""Files in fp16 and bf16, of every exporter: patched, they are the method, within the limits.

fp16 comes in two ways. The model is narrowed and then exported, as torch.onnx, transformers and
optimum (``--dtype fp16``, which traces a narrowed model by TorchScript, and wants a card) do. Or a
float32 file is converted afterwards, as many files on the hubs are: by ONNX Runtime's own
converter here, Cast nodes at the ends and around what stays float32. bf16 comes in the first way.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from tests.export.foreign.conftest import WRITE
from tests.export.foreign.test_check import assert_equal
from tests.export.foreign.test_find import GEOMETRY, GIVEN, by_pytorch, found_in, planted
from tests.export.foreign.test_optimum import DATA, FILES
from tests.export.foreign.test_optimum import NEURONS as OPTIMUM_NEURONS
from tests.support import models, pictures
from tests.support.checking import checked, found
from tests.support.exporters import BATCH, CASES, EVERYTHING, OF_TRANSFORMERS, torchscript
from tests.support.pictures import pixels

from regraft.parity import LIMITS
from regraft.redirect import RedirectOptions
from regraft_export.foreign.check.checked import Checked
from regraft_export.foreign.opening import open_file

pytestmark = pytest.mark.usefixtures("one_thread")

PAPER = RedirectOptions()
TYPES = {"fp16": torch.half, "bf16": torch.bfloat16}
WIDE, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
File = Callable[..., Path]
Regraft = Callable[..., tuple[int, str, str]]


def named(case: Any) -> str:
    return "-".join(str(part) for part in [*case[:3], *case[3]])


def written(case: Any, precision: str) -> bool:
    """torch 2.15's TorchScript exporter fails on transformers' attention in bf16."""
    family, exporter = case[:2]
    return not (precision == "bf16" and exporter == "torchscript" and family.startswith("hf"))


# The others of transformers' exporter are in test_of_transformers.py.
_ELSEWHERE = [("hf_vit", 18), ("hf_vit", 20), ("hf_dinov2", 20)]
EXPORTED = [*CASES, *(case for case in OF_TRANSFORMERS if case[:3:2] not in _ELSEWHERE)]


@pytest.mark.parametrize(
    ("case", "precision"),
    [(case, name) for case in EXPORTED for name in TYPES if written(case, name)],
    ids=lambda part: part if isinstance(part, str) else named(part),
)
def test_a_narrowed_model_by_every_exporter(case: Any, precision: str, tmp_path: Path) -> None:
    family, exporter, opset, options = case
    vit, size = models.vit(family), models.FAMILIES[family].size
    module = copy.deepcopy(vit.module).to(TYPES[precision])
    write: Callable[..., None] = WRITE[exporter]
    write(module, size, tmp_path / "in.onnx", opset, **options)
    result = checked(tmp_path / "in.onnx", models.neurons(vit), PAPER, pixels(3, size))
    fixed = exporter == "torchscript" and "axes" not in options
    assert_equal(result, 1 if fixed else 2)
    within_the_limits(result, precision)
    assert found(tmp_path / "in.onnx").stack.depth == 3


def within_the_limits(result: Checked, precision: str) -> None:
    """Checked in float32 arithmetic, and as the file is where ONNX Runtime has kernels for it."""
    assert result.precision == precision
    narrow = [c.relative_error for c in result.parity if c.graph == "patched"]
    assert any(c.graph == "patched, as float32" for c in result.parity)
    assert bool(narrow) == (precision == "fp16")
    assert all(1e-6 < error < LIMITS["fp16"].relative_error for error in narrow)


def converted(source: Path, path: Path, *, ends: bool, more: tuple[str, ...] = ()) -> Path:
    """A float32 file in fp16; with ``ends``, inputs and outputs stay float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers below half precision's least become it
        model = convert_float_to_float16(
            onnx.load(source), keep_io_types=ends, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *more]
        )
    images = next(i for i in model.graph.input if len(i.type.tensor_type.shape.dim) == 4)
    assert images.type.tensor_type.elem_type == (WIDE if ends else HALF)
    onnx.save(model, path)
    return path


# The converter looks at operators alone, so three of dynamo's say it for the others.
CONVERTED = [case for case in CASES if case[1] == "torchscript" or case[2] in (18, 24)]


@pytest.mark.parametrize("case", CONVERTED, ids=named)
def test_a_converted_file_of_torch_s_exporters(case: Any, file: File, tmp_path: Path) -> None:
    vit, size = models.vit(case[0]), models.FAMILIES[case[0]].size
    path = converted(file(*case), tmp_path / "in.onnx", ends=True)
    result = checked(path, models.neurons(vit), PAPER, pixels(3, size))
    fixed = case[1] == "torchscript" and "axes" not in case[3]
    assert_equal(result, 1 if fixed else 2)
    within_the_limits(result, "fp16")


@pytest.mark.parametrize("ends", [True, False], ids=["float32 at the ends", "fp16 throughout"])
@pytest.mark.parametrize("options", [PAPER, EVERYTHING], ids=["paper", "everything"])
@pytest.mark.parametrize("name", FILES)
def test_converted_files_of_optimum(
    name: str, options: RedirectOptions, ends: bool, tmp_path: Path
) -> None:
    output, prefix = FILES[name]
    path = converted(DATA / f"{name}-optimum.onnx", tmp_path / "in.onnx", ends=ends)
    result = checked(path, OPTIMUM_NEURONS, options, pixels(3, (32, 32)), prefix=prefix)
    assert_equal(result)
    within_the_limits(result, "fp16")
    assert output in {c.output for c in result.parity}


def test_norms_and_softmax_that_stay_float32(file: File, tmp_path: Path) -> None:
    vit, size = models.vit("timm"), models.FAMILIES["timm"].size
    wide = ("LayerNormalization", "Softmax")
    source = file("timm", "torchscript", 17, {})
    path = converted(source, tmp_path / "in.onnx", ends=True, more=wide)
    casts = sum(n.op_type == "Cast" for n in onnx.load(path).graph.node)
    assert casts >= 2 * (7 + 3)  # around seven norms and three softmaxes
    result = checked(path, models.neurons(vit), PAPER, pixels(3, size))
    assert_equal(result, 1)
    within_the_limits(result, "fp16")


def test_what_is_printed_and_written_of_a_converted_file(tmp_path: Path, regraft: Regraft) -> None:
    path = converted(DATA / "vitcls-optimum.onnx", tmp_path / "in.onnx", ends=True)
    (tmp_path / "n.json").write_text('{"schema": 1, "neurons": [{"layer": 0, "index": 3}]}')
    images = pictures.write(tmp_path / "images", 4)
    words = ("--neurons", tmp_path / "n.json", "--out", tmp_path / "out.onnx", "--check", images)
    colours = ("--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5)
    code, out, err = regraft("patch", path, *words, *colours, *GEOMETRY)
    assert code == 0, err
    assert "check with the method in numpy, 4 images of 32 x 32, batches of 2: passed" in out
    before, after = onnx.load(path), onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(after, full_check=True)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)


@pytest.mark.parametrize("how", ["fp16", "bf16", "converted"])
def test_the_same_neurons_as_in_pytorch(how: str, tmp_path: Path) -> None:
    module, family = planted("timm_vit")
    size, path = (family.size, family.size), tmp_path / "in.onnx"
    if how == "converted":
        torchscript(module, size, tmp_path / "wide.onnx", 17, BATCH)
        converted(tmp_path / "wide.onnx", path, ends=True)
    else:
        torchscript(copy.deepcopy(module).to(TYPES[how]), size, path, 17, BATCH)
    subject = open_file(path, GIVEN).subject
    units = [(n.layer, n.index, n.sign) for n in found_in(subject, family).neurons.neurons]
    right = by_pytorch("timm_vit").neurons.neurons
    assert units == [(n.layer, n.index, n.sign) for n in right]
    assert found(path).precision == ("bf16" if how == "bf16" else "fp16")
