"""No engine reports to its maker, or leaves traces of that in the home folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Where the libraries find them they stay silent of themselves, and the test would prove nothing.
_SILENCING = ("CI", "TF_BUILD", "JENKINS_URL", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY")

SCRIPT = """
import sys
from regraft.engines import engine_class

kind = engine_class(sys.argv[1])
assert kind.unavailable("fp32") is None
if kind.is_built:
    kind.environment()
print(sys.argv[1].replace("ort-cpu", "onnxruntime") in sys.modules)
"""


@pytest.mark.parametrize("engine", ["ort-cpu", "openvino"])
def test_importing_the_library_leaves_nothing_in_the_home_folder(
    engine: str, tmp_path: Path
) -> None:
    environment = {name: v for name, v in os.environ.items() if name not in _SILENCING}
    environment = {k: v for k, v in environment.items() if not k.startswith("XDG_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, engine],
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    assert list(tmp_path.rglob("*")) == []
