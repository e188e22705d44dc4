"""Every family at a small size, from finding to features, through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from tests.support import traces
from tests.support.families import Family, cases, dead_neurons
from tests.support.planting import flagged_pictures
from tests.support.small_families import SMALL
from tests.support.whole_path import Regraft, whole_path

from regraft.redirect import RedirectOptions
from regraft_export.graph.patch import Patch, Traced, Wanted, build
from regraft_export.trace import trace

pytestmark = pytest.mark.usefixtures("one_thread")


# In fp16, onnxruntime crashed on the first; the others hold their tables in fp16 and in fp32.
HALF = ("open_clip", "timm_eva02", "timm_dinov3")


@pytest.mark.parametrize("name", cases(SMALL))
def test_from_finding_to_features(
    name: str, regraft: Regraft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Traced] = []

    def kept(*args: Any) -> Traced:
        made.append(trace(*args))
        return made[-1]

    monkeypatch.setattr("regraft_export.exporting.trace", kept)
    family = SMALL[name]
    whole_path(regraft, family, tmp_path, pictures=24, half=name in HALF)
    every_token_keeps_its_position(made[0], family)


def every_token_keeps_its_position(traced: Traced, family: Family) -> None:
    """With registers that no token sees, and nothing to redirect, the graph is the baseline.

    Independent of hooks and rewrite: they agree with each other wherever both are wrong.
    """
    depth, options = traced.layout.depth, RedirectOptions(registers=2, scale=(1.0, 1.0))
    wanted = Wanted(layers=range(depth))
    patched = build(traced, Patch(dead_neurons(), options), wanted)
    unseen = with_registers_masked(patched.proto, depth, traced.layout.count, 2)
    pixels = flagged_pictures(3, 5, family.size, family.patch).numpy()
    baseline = build(traced, None, wanted)
    right = run(baseline.proto, pixels)
    for name, value in run(unseen, pixels).items():
        if name != "test_time_registers":
            assert traces.error(value, right[name]) < 1e-5, name
    # They are seen in the graph as it is, or nothing was shown.
    assert traces.error(run(patched.proto, pixels)["hidden.0"], right["hidden.0"]) > 1e-4


def with_registers_masked(
    proto: onnx.ModelProto, depth: int, tokens: int, registers: int
) -> onnx.ModelProto:
    """The graph with minus infinity added to all scores of the last keys, in every block."""
    graph = gs.import_onnx(proto)
    graph.toposort()
    row = np.zeros(tokens + registers, dtype=np.float32)
    row[tokens:] = -np.inf
    mask = gs.Constant("test.mask", row)
    softmaxes = [node for node in graph.nodes if node.op == "Softmax"]
    for i, node in enumerate(softmaxes[:depth]):  # a pooling head's come behind the blocks'
        masked = gs.Variable(f"test.masked.{i}", dtype=np.float32)
        graph.nodes.append(gs.Node("Add", f"test.{i}", {}, [node.inputs[0], mask], [masked]))
        node.inputs[0] = masked
    graph.toposort()
    return gs.export_onnx(graph)


def run(proto: onnx.ModelProto, pixels: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixel_values": pixels}), strict=True))
