"""Outputs that are parts of one tensor: what metadata may say, and what is cut."""

from __future__ import annotations

import numpy as np
import pytest

from regraft.engines.parts import METADATA, Part, cut, needed, parts_of, shapes_of
from regraft.errors import EngineError

OUTPUTS = {"whole": ("batch", 5, 8), "pooled": ("batch", 3)}
TEXT = '{"tokens": ["whole", 0, 4], "registers": ["whole", 4, 5]}'


def test_parts_take_the_place_of_their_whole() -> None:
    parts = parts_of({METADATA: TEXT}, OUTPUTS)
    assert parts == {"tokens": Part("whole", 0, 4), "registers": Part("whole", 4, 5)}
    assert shapes_of(OUTPUTS, parts) == {
        "tokens": ("batch", 4, 8),
        "registers": ("batch", 1, 8),
        "pooled": ("batch", 3),
    }
    assert needed(["registers", "pooled", "tokens"], parts) == ["whole", "pooled"]
    whole = np.arange(80, dtype=np.float32).reshape(2, 5, 8)
    values = {"whole": whole, "pooled": np.zeros((2, 3), np.float32)}
    np.testing.assert_array_equal(cut("tokens", values, parts), whole[:, :4])
    np.testing.assert_array_equal(cut("registers", values, parts), whole[:, 4:])
    assert cut("pooled", values, parts) is values["pooled"]


def test_a_graph_without_parts_is_as_it_is() -> None:
    assert parts_of({}, OUTPUTS) == {}
    assert shapes_of(OUTPUTS, {}) == OUTPUTS


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        '{"tokens": ["absent", 0, 4]}',
        '{"tokens": ["whole", 0]}',
        '{"tokens": ["whole", 0, 6]}',
        '{"tokens": ["whole", 3, 3]}',
        '{"tokens": ["whole", "a", 4]}',
    ],
)
def test_metadata_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match=rf"{METADATA} does not fit .*export again"):
        parts_of({METADATA: text}, OUTPUTS)
