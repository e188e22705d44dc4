"""Files of transformers' own exporter: patched, checked, found in; what of them is refused.

Its masks mask nothing, but are written as computed ranges, comparisons and sums of them; its token
counts are constants or computed from the image's size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tests.export.foreign.test_check import assert_equal
from tests.export.foreign.test_find import GIVEN, agree, by_pytorch, found_in, planted
from tests.export.foreign.test_patch import as_float32, images, listed, outputs, patched, right
from tests.support import models
from tests.support.checking import checked
from tests.support.exporters import EVERYTHING, OF_TRANSFORMERS, of_transformers
from tests.support.graphs import open_session
from tests.support.pictures import pixels
from tests.support.traces import error

from regraft.errors import ModelError, RewriteError
from regraft.parity import LIMITS
from regraft.redirect import RedirectOptions
from regraft_export.foreign.opening import open_file
from regraft_export.foreign.patching import patch
from regraft_export.foreign.survey import survey
from regraft_export.onnx_file.read import read_file
from regraft_export.vit.structure import from_module

pytestmark = pytest.mark.usefixtures("one_thread")

PAPER = RedirectOptions()
File = Callable[..., Path]
Regraft = Callable[..., tuple[int, str, str]]


def named(case: Any) -> str:
    return "-".join([case[0], str(case[2]), *case[3]])


@pytest.mark.parametrize("case", OF_TRANSFORMERS, ids=named)
@pytest.mark.parametrize("options", [PAPER, EVERYTHING], ids=["paper", "everything"])
def test_a_patched_file_equals_pytorch_with_hooks(
    case: Any, options: RedirectOptions, file: File, tmp_path: Path
) -> None:
    vit, path = models.vit(case[0]), file(*case)
    neurons = models.neurons(vit)
    found = patched(path, neurons, options, tmp_path / "out.onnx")
    assert found.stack.depth == len(found.attentions) == 3
    assert (found.entry.prefix, found.entry.grid) == (vit.layout.prefix, vit.layout.grid)
    assert found.image.open_batch == ("dynamic" in case[3])
    batch = images((32, 32), 3 if "dynamic" in case[3] else 2)
    plain = outputs(path, batch.numpy())
    got = outputs(tmp_path / "out.onnx", batch.numpy())
    expected = right(vit, batch, neurons, options)
    assert len(got) == len(expected) == 2
    for value, reference, before in zip(got, expected, plain, strict=True):
        assert error(value, reference) < 1e-5
        assert error(before, reference) > 1e-3


@pytest.mark.parametrize("case", OF_TRANSFORMERS, ids=named)
@pytest.mark.parametrize("options", [PAPER, EVERYTHING], ids=["paper", "everything"])
def test_it_is_the_method_written_in_numpy(case: Any, options: RedirectOptions, file: File) -> None:
    neurons = models.neurons(models.vit(case[0]))
    assert_equal(checked(file(*case), neurons, options, pixels(3, (32, 32))))


@pytest.mark.parametrize("case", OF_TRANSFORMERS, ids=named)
def test_every_token_count_is_listed_and_no_mask_is_left(
    case: Any, file: File, tmp_path: Path
) -> None:
    neurons = models.neurons(models.vit(case[0]))
    found = survey(read_file(file(*case)))
    count = found.entry.count
    result = patch(found, neurons, PAPER)
    assert result.sites.mended
    computed = [text.endswith(", computed") for text in result.sites.mended]
    assert all(f": {count} -> {count + 1}" in text for text in result.sites.mended)
    assert all(computed) if case[0].startswith("hf_dinov2") and case[3] else not any(computed)
    kinds = {n.op_type for n in result.proto.graph.node}
    assert kinds.isdisjoint({"Where", "Less", "Range", "GreaterOrEqual", "ReduceSum"})


@pytest.mark.parametrize("family", ["hf_vit", "hf_dinov2"])
def test_narrow_files(family: str, tmp_path: Path) -> None:
    vit, batch = models.vit(family), images((32, 32))
    neurons = models.neurons(vit)
    for dtype, precision in ((torch.half, "fp16"), (torch.bfloat16, "bf16")):
        module = copy.deepcopy(vit.module).to(dtype)
        path, out = tmp_path / f"{precision}.onnx", tmp_path / f"{precision}-out.onnx"
        of_transformers(module, (32, 32), path, 20, dynamic=True)
        assert patched(path, neurons, PAPER, out).precision == precision
        rounded = from_module(module.float(), (32, 32))
        expected = right(rounded, batch, neurons, PAPER)[0]
        if precision == "fp16":
            got, limit = outputs(out, batch.half().numpy())[0], LIMITS["fp16"].relative_error
        else:
            session = open_session(as_float32(out), optimize=False)
            got, limit = session.run(None, {"pixel_values": batch.numpy()})[0], 5e-3
        assert error(got, expected) < limit
        result = checked(path, neurons, PAPER, pixels(3, (32, 32)))
        assert_equal(result)
        assert result.precision == precision


@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov2", "hf_clip", "hf_siglip"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["batch 2", "any batch"])
def test_the_same_neurons_as_in_pytorch(name: str, dynamic: bool, tmp_path: Path) -> None:
    module, family = planted(name)
    size = (family.size, family.size)
    of_transformers(module, size, tmp_path / "in.onnx", 20, dynamic=dynamic)
    found = found_in(open_file(tmp_path / "in.onnx", GIVEN).subject, family)
    agree(found, by_pytorch(name))
    assert {(n.layer, n.index) for n in found.neurons.neurons} == {(1, 5), (1, 60)}


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16], ids=["fp16", "bf16"])
def test_the_same_neurons_in_narrow_files(dtype: torch.dtype, tmp_path: Path) -> None:
    module, family = planted("hf_vit")
    narrow = copy.deepcopy(module).to(dtype)
    of_transformers(narrow, (family.size, family.size), tmp_path / "in.onnx", 20, dynamic=True)
    found = found_in(open_file(tmp_path / "in.onnx", GIVEN).subject, family)
    units = [(n.layer, n.index, n.sign) for n in found.neurons.neurons]
    assert units == [(n.layer, n.index, n.sign) for n in by_pytorch("hf_vit").neurons.neurons]


def test_what_it_fused_for_onnx_runtime_is_refused(tmp_path: Path, regraft: Regraft) -> None:
    module = models.vit("hf_vit").module
    of_transformers(module, (32, 32), tmp_path / "in.onnx", 20, dynamic=True, ort_fusions="cpu")
    neurons = listed(tmp_path / "n.json", [(0, 3)])
    out = tmp_path / "o.onnx"
    code, _, err = regraft("patch", tmp_path / "in.onnx", "--neurons", neurons, "--out", out)
    assert (code, out.exists(), err.count("\n")) == (1, False, 1)
    assert "fused already (SkipLayerNormalization, of ONNX Runtime's optimiser); patch" in err


def causal(model: onnx.ModelProto) -> None:
    """The mask lets a token see those before it."""
    mask = next(t for t in model.graph.initializer if list(t.dims) == [2, 1, 17, 17])
    values = np.triu(np.full((2, 1, 17, 17), -1e4, np.float32), 1)
    mask.CopyFrom(numpy_helper.from_array(values, mask.name))


def one_key(model: onnx.ModelProto) -> None:
    """One number of the mask is not zero."""
    mask = next(t for t in model.graph.initializer if list(t.dims) == [2, 1, 17, 17])
    values = numpy_helper.to_array(mask).copy()
    values[1, 0, 3, 5] = -1.0
    mask.CopyFrom(numpy_helper.from_array(values, mask.name))


def one_row(model: onnx.ModelProto) -> None:
    """One token's attention is replaced by zeros."""
    rows = next(t for t in model.graph.initializer if list(t.dims) == [2, 1, 17, 1])
    values = numpy_helper.to_array(rows).copy()
    values[0, 0, 4, 0] = True
    rows.CopyFrom(numpy_helper.from_array(values, rows.name))


@pytest.mark.parametrize(
    ("change", "node"), [(causal, "node_Add_73"), (one_key, "node_Add_73"), (one_row, "node_where")]
)
def test_a_mask_that_does_something_is_refused(
    change: Callable[[onnx.ModelProto], None], node: str, file: File, tmp_path: Path
) -> None:
    model = onnx.load(file("hf_vit", "transformers", 20, {}))
    change(model)
    onnx.save(model, tmp_path / "in.onnx")
    neurons = models.neurons(models.vit("hf_vit"))
    with pytest.raises(RewriteError, match=f"node '{node}' .* a constant with one entry per token"):
        patch(survey(read_file(tmp_path / "in.onnx")), neurons, PAPER)


def test_a_mask_that_makes_the_scores_larger_is_refused(file: File, tmp_path: Path) -> None:
    model = onnx.load(file("hf_vit", "transformers", 20, {}))
    mask = next(t for t in model.graph.initializer if list(t.dims) == [2, 1, 17, 17])
    values = numpy_helper.to_array(mask)[None]
    mask.CopyFrom(numpy_helper.from_array(values, mask.name))
    onnx.save(model, tmp_path / "in.onnx")
    message = r"node 'node_Add_73' \(Add\) puts a mask that masks nothing on .* \(1, 2, 3, 17, 17\)"
    with pytest.raises(ModelError, match=message):
        survey(read_file(tmp_path / "in.onnx"))


def test_a_dry_run_lists_the_computed_counts(file: File, tmp_path: Path, regraft: Regraft) -> None:
    path = file("hf_dinov2", "transformers", 20, {"dynamic": True})
    neurons = listed(tmp_path / "n.json", [(0, 3)])
    code, out, _ = regraft("patch", path, "--neurons", neurons, "--dry-run", "--json")
    assert code == 0
    assert "node_view_1: 17 -> 18, computed" in json.loads(out)["mended"]
