"""``neurons.json``: what is read back, and every form that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import NeuronsError
from regraft.neurons import Neurons, RegisterNeuron

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


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NeuronsError) as caught:
        Neurons.load(tmp_path / "absent.json")
    assert str(caught.value) == (
        f"{tmp_path / 'absent.json'}: cannot be read (No such file or directory); expected the "
        "file that `regraft find` wrote"
    )
