from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from regraft.manifest import Manifest
from regraft.manifest_file import digest

Regraft = Callable[..., tuple[int, str, str]]


def test_in_words(regraft: Regraft, pristine_bundle: Path) -> None:
    code, out, err = regraft("inspect", pristine_bundle)
    assert (code, err) == (0, "")
    for line in [
        "model          python:small.py:small (Small)",
        "               3 blocks, width 8, 2 heads, fp32, opset 17",
        "input          pixel_values (batch, 3, 16, 16) float32",
        "tokens         CLS, 16 patches (4 x 4); 1 test-time register",
        "neurons        2 register neurons: 2 in layer 1",
        "outliers       patch norm above 12.5 at the output of layer 2",
        "redirect       value per-neuron, cls zero, patches zero, scale 1",
        "rewrite        1 token site, 1 redirect site, 1 output site, 1 token count mended",
        "output         attentions.1 (batch, 2, 4, 4)",
        "graphs         model (model.onnx), baseline (baseline.onnx)",
        "file           neurons.json, 158 bytes",
    ]:
        assert line in out.splitlines()


def test_what_is_missing_is_said(
    regraft: Regraft, tmp_path: Path, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(tmp_path / "lean", baseline=False)
    data = json.loads((bundle / "manifest.json").read_text())
    data |= {"verified": False, "precision": "bf16"}
    data["tokens"].update(class_token=False, prefix=4)
    data["outputs"]["last_hidden_state"][1] = 20
    data["sha256"] = digest(data)
    (bundle / "manifest.json").write_text(json.dumps(data))
    _, out, _ = regraft("inspect", bundle)
    assert "graphs         model (model.onnx)\n" in out
    assert (
        "verified       the same rewrite in fp32; the bf16 graph itself is unverified until "
        "`regraft build` verifies it on an engine that runs it\n"
    ) in out
    assert "tokens         4 other prefix tokens, 16 patches" in out


def test_as_json(regraft: Regraft, pristine_bundle: Path) -> None:
    code, out, err = regraft("inspect", pristine_bundle, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert Manifest.from_json(said["manifest"]) == Manifest.load(pristine_bundle / "manifest.json")
    assert said["neurons"] == [
        {"layer": 1, "index": 5, "score": 9.0, "sign": 1, "value": 2.5},
        {"layer": 1, "index": 7, "score": 3.0, "sign": -1, "value": -1.5},
    ]


def test_a_damaged_bundle_is_not_described(regraft: Regraft, bundle_folder: Path) -> None:
    (bundle_folder / "neurons.json").write_text("{}")
    code, out, err = regraft("inspect", bundle_folder)
    assert (code, out) == (1, "")
    assert "neurons.json has 2 bytes, expected 158" in err
