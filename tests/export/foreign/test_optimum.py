"""Files of optimum-onnx: see ``data/make_optimum.py``.

Their PyTorch models are of a transformers that is not installed here. So a patched file is held to
the method written out in the file itself: Algorithm 2 as plain nodes on the whole activation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from tests.support.graphs import open_session
from tests.support.traces import error

from regraft.neurons import Neurons, RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft_export.foreign.patching import patch
from regraft_export.foreign.survey import survey
from regraft_export.onnx_file.read import read_file
from regraft_export.onnx_file.write import write_file

DATA = Path(__file__).parent / "data"
NEURONS = Neurons((RegisterNeuron(0, 3), RegisterNeuron(2, 5)))
FILES = {"vitcls": ("logits", None), "clip": ("image_embeds", "vision_model")}


def inputs(path: Path) -> dict[str, NDArray[np.generic]]:
    draw = np.random.default_rng(0)
    given: dict[str, NDArray[np.generic]] = {
        "pixel_values": draw.normal(size=(2, 3, 32, 32)).astype(np.float32)
    }
    if path.name.startswith("clip"):
        given["input_ids"] = np.array([[98, 5, 99], [98, 7, 99]])
        given["attention_mask"] = np.ones((2, 3), np.int64)
    return given


def literal(path: Path, prefix: str | None) -> bytes:
    """The method by hand, on the file's own tensors: what the redirect means, node by node.

    The tokens get their zero row by a Concat, h is rewritten whole, and the last block's output
    loses the row again. The files compute every shape, so nothing else is to be mended.
    """
    found = survey(read_file(path), prefix=prefix)
    model = onnx.load(path)
    body = model.graph

    def insert(after: str, nodes: list[onnx.NodeProto], result: str) -> None:
        place = next(i for i, n in enumerate(body.node) if after in n.output)
        for node in list(body.node)[place + 1 :]:
            for k, name in enumerate(node.input):
                if name == after:
                    node.input[k] = result
        for k, node in enumerate(nodes):
            body.node.insert(place + 1 + k, node)

    def constant(name: str, values: NDArray[np.generic]) -> str:
        body.initializer.append(numpy_helper.from_array(values, name))
        return name

    insert(
        found.last.name,
        [
            helper.make_node(
                "Slice",
                [
                    found.last.name,
                    constant("from", np.array([0])),
                    constant("to", np.array([17])),
                    constant("at", np.array([1])),
                ],
                ["without"],
            )
        ],
        "without",
    )
    for layer in (0, 2):
        mlp = found.stack.mlps[layer]
        chosen = np.zeros(mlp.hidden, np.float32)
        chosen[[n.index for n in NEURONS.of(layer)]] = 1
        register = np.zeros((1, 18, 1), np.float32)
        register[0, 17] = 1
        stem, h = f"l{layer}.", mlp.activation.name
        insert(
            h,
            [
                helper.make_node("Mul", [h, constant(stem + "rest", 1 - chosen)], [stem + "kept"]),
                helper.make_node(
                    "ReduceMax", [h, constant(stem + "one", np.array([1]))], [stem + "max"]
                ),
                helper.make_node(
                    "Mul", [stem + "max", constant(stem + "chosen", chosen)], [stem + "v"]
                ),
                helper.make_node(
                    "Mul", [stem + "v", constant(stem + "register", register)], [stem + "placed"]
                ),
                helper.make_node("Add", [stem + "kept", stem + "placed"], [stem + "new"]),
            ],
            stem + "new",
        )
    tokens = found.entry.tokens.name
    pads = constant("zero.row", np.array([0, 0, 0, 0, 1, 0]))
    insert(tokens, [helper.make_node("Pad", [tokens, pads], ["padded"])], "padded")
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("name", FILES)
def test_the_redirect_in_optimum_s_files(name: str, tmp_path: Path) -> None:
    path, (output, prefix) = DATA / f"{name}-optimum.onnx", FILES[name]
    found = survey(read_file(path), prefix=prefix)
    assert (found.stack.depth, found.entry.prefix, found.entry.grid) == (3, 1, (4, 4))
    result = patch(found, NEURONS, RedirectOptions())
    write_file(result.proto, result.stored, tmp_path / "out.onnx", external=False)
    given = inputs(path)
    got = open_session((tmp_path / "out.onnx").read_bytes(), optimize=False).run([output], given)
    expected = open_session(literal(path, prefix), optimize=False).run([output], given)
    plain = open_session(path.read_bytes(), optimize=False).run([output], given)
    assert error(got[0], expected[0]) < 1e-5
    assert error(plain[0], expected[0]) > 1e-4


def test_two_towers_are_told_apart_by_prefix_or_input(
    tmp_path: Path, regraft: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "n.json").write_text('{"schema": 1, "neurons": [{"layer": 0, "index": 3}]}')
    words = ("patch", DATA / "clip-optimum.onnx", "--neurons", tmp_path / "n.json", "--dry-run")
    code, _, err = regraft(*words)
    assert code == 1
    assert "2 stacks of transformer blocks" in err
    assert "--prefix" in err
    for prefix in "vision_model", "/vision_model/", "pixel_values":
        assert regraft(*words, "--prefix", prefix)[0] == 0
    code, _, err = regraft(*words, "--prefix", "audio")
    assert (code, "begin with 'audio'" in err) == (1, True)
    code, _, err = regraft(*words, "--prefix", "text_model")
    assert (code, "is no vision tower: it reads input_ids" in err) == (1, True)
