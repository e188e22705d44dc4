"""``neurons.json``: what is read back, and every form that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import NeuronsError
from regraft.neurons import Neurons, RegisterNeuron
from regraft.preprocessing import Preprocessing

numbers = st.floats(allow_nan=False, allow_infinity=False)
rows = st.builds(
    RegisterNeuron,
    layer=st.integers(0, 50),
    index=st.integers(0, 10_000),
    score=numbers,
    sign=st.sampled_from((1, -1)),
    value=st.none() | numbers,
)


@given(st.lists(rows, min_size=1, unique_by=lambda n: (n.layer, n.index)))
def test_json_round_trip(listed: list[RegisterNeuron]) -> None:
    neurons = Neurons(tuple(listed), {"model": "timm:vit", "seed": 3})
    assert Neurons.from_json(json.loads(json.dumps(neurons.to_json()))) == neurons


ONE = '{"layer": 1, "index": 2}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON (Expecting property name"),
        ("[" * 100_000, "is not JSON ("),
        ("[]", 'expected a JSON object with "schema": 1 and a list "neurons"'),
        ('{"schema": 1}', 'expected a JSON object with "schema": 1 and a list "neurons"'),
        ('{"schema": true, "neurons": []}', '"schema" is True; expected 1'),
        ('{"schema": 2, "neurons": []}', "schema 2 is newer than 1, the newest this version reads"),
        ('{"schema": 1, "neurons": []}', "the list of register neurons is empty"),
        (f'{{"schema": 1, "neurons": [{ONE}, {ONE}]}}', "(layer 1, index 2) is listed twice"),
        ('{"schema": 1, "neurons": [3]}', 'neurons[0] is 3; expected an object with "layer"'),
        (
            '{"schema": 1, "neurons": [{"layer": 1.0, "index": 2}]}',
            "neurons[0]: layer is 1.0; expected an integer from 0",
        ),
        (
            '{"schema": 1, "neurons": [{"layer": 1, "index": 2, "sign": 0}]}',
            "neurons[0]: sign is 0; expected 1 or -1",
        ),
        (
            '{"schema": 1, "neurons": [{"layer": 1, "index": 2, "value": NaN}]}',
            "neurons[0]: value is nan; expected a finite number",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "neurons.json"
    file.write_text(text)
    with pytest.raises(NeuronsError) as caught:
        Neurons.load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


PRINT = {
    "shape": [8, 4],
    "norm": 2.5,
    "projections": [0.5] * 16,
    "bias": {"norm": 0.0, "projections": [0.0] * 8},
}
STEPS = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, "exact", (8, 8)).to_json()
ABOUT = {
    "model": "timm:vit",
    "weights_sha256": "0" * 64,
    "image_size": [8, 8],
    "preprocessing": STEPS,
    "detection_layer": 3,
    "threshold": 40.0,
    "fingerprints": {"1": PRINT, "2": {**PRINT, "bias": None}},
    "of later versions": {},
}


def written(file: Path, **changes: object) -> Path:
    about = {k: v for k, v in {**ABOUT, **changes}.items() if v != "left out"}
    row = {"layer": 1, "index": 2}
    file.write_text(json.dumps({"schema": 1, "neurons": [row], **about}))
    return file


def test_what_is_said_beside_the_neurons_is_kept(tmp_path: Path) -> None:
    assert Neurons.load(written(tmp_path / "n.json")).about == ABOUT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": "high"}, "threshold is 'high'; expected a finite number above 0, as"),
        ({"threshold": 0}, "threshold is 0; expected a finite number above 0"),
        (
            {"threshold": 10**400},
            "threshold is 1000000000000000000000000000000000000000000000000000",
        ),
        ({"threshold": float("inf")}, "threshold is inf; expected a finite number above 0"),
        ({"detection_layer": -1}, "detection_layer is -1; expected an integer from 0"),
        ({"detection_layer": True}, "detection_layer is True; expected an integer from 0"),
        ({"image_size": [8]}, "image_size is [8]; expected [height, width]"),
        ({"image_size": 8}, "image_size is 8; expected [height, width]"),
        ({"weights_sha256": 5}, "weights_sha256 is 5; expected a text"),
        ({"fingerprints": "none"}, "fingerprints is 'none'; expected an object with one entry"),
        ({"fingerprints": {"1": 5}}, "fingerprints['1'] is 5; expected an object"),
        (
            {"fingerprints": {"1": {**PRINT, "shape": [8, 0]}}},
            "fingerprints['1'].shape is [8, 0]; expected two integers from 1",
        ),
        (
            {"fingerprints": {"1": {**PRINT, "norm": "x" * 99}}},
            f"fingerprints['1'].norm is '{'x' * 56}...; expected a finite number from 0",
        ),
        (
            {"fingerprints": {"1": {**PRINT, "projections": [1]}}},
            "fingerprints['1'].projections is [1]; expected 16 finite numbers",
        ),
        (
            {"fingerprints": {"1": {**PRINT, "bias": {"norm": 1.0}}}},
            "fingerprints['1'].bias.projections is None; expected 8 finite numbers",
        ),
        ({"preprocessing": 3}, "preprocessing is malformed: preprocessing is 3; expected an ob"),
        ({"preprocessing": {}}, "preprocessing lacks 'resize'; expected what `regraft find` wro"),
        ({"preprocessing": {**STEPS, "std": [0, 0, 0]}}, "preprocessing is malformed: std is (0"),
    ],
)
def test_what_is_malformed_beside_the_neurons_is_named(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    file = written(tmp_path / "n.json", **changes)
    with pytest.raises(NeuronsError) as caught:
        Neurons.load(file)
    assert str(caught.value).startswith(f"{file}: {message}")


@pytest.mark.parametrize("key", sorted(set(ABOUT) - {"of later versions"}))
def test_null_and_half_of_a_level_are_as_if_left_out(tmp_path: Path, key: str) -> None:
    assert Neurons.load(written(tmp_path / "n.json", **{key: None})).about[key] is None
    assert key not in Neurons.load(written(tmp_path / "n.json", **{key: "left out"})).about


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NeuronsError) as caught:
        Neurons.load(tmp_path / "absent.json")
    assert str(caught.value) == (
        f"{tmp_path / 'absent.json'}: cannot be read (No such file or directory); expected the "
        "file that `regraft find` wrote"
    )
