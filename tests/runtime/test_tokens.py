from __future__ import annotations

import json

import numpy as np
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
