"""`regraft` must import, whole, where nothing but numpy and Pillow is installed."""

from __future__ import annotations

import json
import subprocess
import sys

BLOCKED = (
    *("torch", "onnx", "onnx_graphsurgeon", "tensorrt", "timm", "transformers", "onnxscript"),
    *("open_clip", "safetensors", "onnxruntime", "openvino", "pyarrow", "regraft_export"),
)

SCRIPT = f"""
import importlib, json, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked in this test")

sys.meta_path.insert(0, Block())
import regraft
names = [m.name for m in pkgutil.walk_packages(regraft.__path__, "regraft.")]
for name in names:
    importlib.import_module(name)
for name in regraft.__all__:
    getattr(regraft, name)
print(json.dumps({{"names": names, "leaked": sorted(set(sys.modules) & set({BLOCKED!r}))}}))
"""


def test_every_module_imports_without_the_export_side_and_engines() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["leaked"] == []
    expected = {"regraft.extractor", "regraft.engines.openvino", "regraft.commands.build"}
    assert expected <= set(found["names"])
    assert len(found["names"]) > 20


def test_the_block_blocks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("import regraft\n", "import onnxruntime.capi\n")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "onnxruntime is blocked in this test" in done.stderr
