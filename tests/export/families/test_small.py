"""Every family at a small size, from finding to features, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests.support import traces
from tests.support.families import SMALL, Family, dead_neurons, planted_module, units_of
from tests.support.planting import flagged_pictures, grey_levels

from regraft.bundle import Bundle
from regraft.neurons import Neurons
from regraft.redirect import RedirectOptions
from regraft_export.graph.patch import Patch, Traced, Wanted, build
from regraft_export.trace import trace

pytestmark = pytest.mark.usefixtures("one_thread")

Regraft = Callable[..., tuple[int, str, str]]


def write_pictures(folder: Path, family: Family, count: int) -> Path:
    """Pictures whose pixels reach the model as they are."""
    folder.mkdir()
    levels = grey_levels(flagged_pictures(count, 2, family.size, family.patch))
    for number, level in enumerate(levels):
        Image.fromarray(level).save(folder / f"{number:02}.png")
    return folder


def preprocessing(family: Family) -> list[str]:
    words = (
        f"--image-size {family.size} --mean 0.5 0.5 0.5 --std 0.2 0.2 0.2 "
        "--interpolation bicubic --crop-pct 1.0 --crop-mode squash"
    )
    return words.split()


def whole_path(regraft: Regraft, family: Family, place: Path, pictures: int) -> Path:
    """find, export, verify and extract; returns the bundle after checking each step."""
    (place / "model").mkdir()
    images = write_pictures(place / "images", family, pictures)
    model, *more = family.save(planted_module(family), place / "model")
    given = [model, *more, "--images", images]
    bundle, neurons = place / "bundle", place / "neurons.json"

    code, _, err = regraft("find", *given, *preprocessing(family), "--out", neurons)
    assert code == 0, err
    found = {(n.layer, n.index) for n in Neurons.load(neurons).neurons}
    assert found == set(units_of(family))

    last = family.layers[-1]
    wanted = ["--layers", last, "--out", bundle]
    code, _, err = regraft("export", *given, *preprocessing(family), "--neurons", neurons, *wanted)
    assert code == 0, err
    code, out, err = regraft("verify", bundle, "--images", images, "--model", *given[:-2], "--json")
    assert code == 0, err
    verified = json.loads(out)
    assert verified["passed"]

    code, _, err = regraft("extract", bundle, images, "--out", place / "features.npz")
    assert code == 0, err
    features = np.load(place / "features.npz")
    side = family.size // family.patch
    layout = Bundle.open(bundle).manifest.tokens
    assert (layout.prefix, layout.grid) == (family.prefix, (side, side))
    assert features["patches"].shape[:3] == (pictures, side, side)
    return bundle


@pytest.mark.parametrize("name", SMALL)
def test_from_finding_to_features(
    name: str, regraft: Regraft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Traced] = []

    def kept(*args: Any) -> Traced:
        made.append(trace(*args))
        return made[-1]

    monkeypatch.setattr("regraft_export.exporting.trace", kept)
    family = SMALL[name]
    whole_path(regraft, family, tmp_path, pictures=24)
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
