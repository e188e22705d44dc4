from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.tokens import TokenLayout

layouts = st.builds(
    TokenLayout,
    class_token=st.booleans(),
    prefix=st.integers(1, 9),
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    width=st.integers(1, 64),
    depth=st.integers(1, 48),
    heads=st.integers(1, 24),
    test_time_registers=st.integers(0, 8),
)


@given(layouts)
def test_a_layout_survives_json(layout: TokenLayout) -> None:
    assert TokenLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 0, "tokens.width is 0; expected an integer from 1 on"),
        ("depth", True, "tokens.depth is True; expected an integer from 1 on"),
        ("heads", 2.0, "tokens.heads is 2.0; expected an integer from 1 on"),
        ("grid", [4], "tokens.grid is [4]; expected two positive integers"),
        ("grid", "44", "tokens.grid is '44'; expected two positive integers"),
        ("grid", [4, -4], "tokens.grid[1] is -4; expected an integer from 1 on"),
        ("prefix", 0, "tokens.prefix is 0; expected an integer from 1 on"),
        ("class_token", 1, "tokens.class_token is 1; expected true or false"),
        ("test_time_registers", -1, "tokens.test_time_registers is -1; expected an integer from 0"),
    ],
)
def test_a_malformed_field_is_named(field: str, value: object, message: str) -> None:
    data = TokenLayout(True, 1, (4, 4), 8, 3, 2).to_json()
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenLayout.from_json(data | {field: value})


def test_without_a_class_token_there_may_be_no_prefix() -> None:
    layout = TokenLayout(False, 0, (4, 4), 8, 3, 2)
    assert TokenLayout.from_json(layout.to_json()) == layout


@given(layouts)
def test_every_token_is_prefix_or_patch_or_register_and_in_its_place(layout: TokenLayout) -> None:
    rows, cols = layout.grid
    # A sequence in which every token carries what it is.
    prefix = [("prefix", i) for i in range(layout.prefix)]
    patches = [("patch", row * cols + col) for row in range(rows) for col in range(cols)]
    registers = [("register", i) for i in range(layout.test_time_registers)]
    sequence = prefix + patches + registers
    assert layout.patches == len(patches)
    assert layout.count == len(prefix) + len(patches)
    assert sequence[: layout.count] == prefix + patches
    assert sequence[layout.prefix : layout.count] == patches
    assert sequence[layout.count :] == registers
    numbers = np.array([number for _, number in sequence[layout.prefix : layout.count]])
    grid = numbers.reshape(layout.grid)
    assert grid[rows - 1, 0] == (rows - 1) * cols
    assert grid[0, cols - 1] == cols - 1
