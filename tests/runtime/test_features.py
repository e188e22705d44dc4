from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import InputError
from regraft.features import SOURCES, Features, available_fields, choose_outputs
from regraft.tokens import TokenLayout


@st.composite
def layouts(draw: st.DrawFn) -> TokenLayout:
    class_token = draw(st.booleans())
    return TokenLayout(
        class_token=class_token,
        prefix=int(class_token) + draw(st.integers(0, 4)),
        grid=(draw(st.integers(1, 5)), draw(st.integers(1, 5))),
        width=draw(st.integers(1, 6)),
        depth=4,
        heads=2,
        test_time_registers=draw(st.integers(1, 3)),
    )


def raw_outputs(layout: TokenLayout, batch: int) -> dict[str, np.ndarray]:
    """Outputs of which every element differs from every other."""
    shapes = {
        "last_hidden_state": (batch, layout.count, layout.width),
        "pooler_output": (batch, 7),
        "hidden.3": (batch, layout.count, layout.width),
        "hidden.10": (batch, layout.count, layout.width),
        "attentions.2": (batch, layout.heads, *layout.grid),
        "test_time_registers": (batch, layout.test_time_registers, layout.width),
    }
    outputs, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        outputs[name] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
        start += size
    return outputs


@given(layouts(), st.integers(1, 4))
def test_every_token_lands_in_exactly_one_field(layout: TokenLayout, batch: int) -> None:
    outputs = raw_outputs(layout, batch)
    features = Features.from_outputs(outputs, layout, range(batch))
    tokens = []
    assert (features.cls is not None) == layout.class_token
    if features.cls is not None:
        tokens.append(features.cls[:, None])
    if features.prefix is not None:
        tokens.append(features.prefix)
    assert features.patches is not None
    assert features.patches.shape == (batch, *layout.grid, layout.width)
    tokens.append(features.patches.reshape(batch, -1, layout.width))
    np.testing.assert_array_equal(np.concatenate(tokens, axis=1), outputs["last_hidden_state"])


@given(layouts(), st.integers(1, 3))
def test_patches_lie_in_row_order(layout: TokenLayout, batch: int) -> None:
    outputs = raw_outputs(layout, batch)
    patches = Features.from_outputs(outputs, layout, range(batch)).patches
    assert patches is not None
    for row in range(layout.grid[0]):
        for col in range(layout.grid[1]):
            token = layout.prefix + row * layout.grid[1] + col
            expected = outputs["last_hidden_state"][:, token]
            np.testing.assert_array_equal(patches[:, row, col], expected)


@given(layouts(), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_batches_join_to_what_one_batch_gives(layout: TokenLayout, sizes: list[int]) -> None:
    total = sum(sizes)
    outputs = raw_outputs(layout, total)
    whole = Features.from_outputs(outputs, layout, range(total))
    parts, start = [], 0
    for size in sizes:
        rows = {name: array[start : start + size] for name, array in outputs.items()}
        parts.append(Features.from_outputs(rows, layout, range(start, start + size)))
        start += size
    joined = Features.concatenate(parts)
    assert len(joined) == total
    assert joined.indices.tolist() == list(range(total))
    assert joined.arrays().keys() == whole.arrays().keys()
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(joined.arrays()[name], array)


def test_layers_keep_their_numbers() -> None:
    layout = TokenLayout(True, 1, (2, 3), 4, 12, 2)
    outputs = raw_outputs(layout, 2)
    features = Features.from_outputs(outputs, layout, [4, 9])
    assert list(features.hidden) == [3, 10]
    np.testing.assert_array_equal(features.hidden[10], outputs["hidden.10"])
    assert list(features.attention) == [2]
    assert list(features.arrays()) == [
        *("cls", "patches", "pooled", "hidden.3", "hidden.10", "attention.2"),
        "test_time_registers",
    ]
    assert features.indices.tolist() == [4, 9]


@given(layouts(), st.sets(st.sampled_from(sorted(SOURCES)), min_size=1))
def test_only_wanted_fields_are_filled(layout: TokenLayout, wanted: set[str]) -> None:
    outputs = raw_outputs(layout, 1)
    wanted &= set(available_fields(outputs, layout))
    chosen = choose_outputs(wanted, outputs, layout)
    some = {name: outputs[name] for name in chosen}
    features = Features.from_outputs(some, layout, [0], wanted)
    assert {name.split(".")[0] for name in features.arrays()} == wanted


def test_an_output_that_is_not_there() -> None:
    bare = TokenLayout(False, 0, (2, 2), 4, 12, 2)
    names = ["last_hidden_state", "pooler_output"]
    assert available_fields(names, bare) == ("patches", "pooled")
    with pytest.raises(InputError, match="output 'cls' is not in this bundle, which gives patches"):
        choose_outputs(["cls"], names, bare)
    with pytest.raises(InputError, match="export with --layers to have it"):
        choose_outputs(["hidden"], names, bare)
    with pytest.raises(InputError, match="there is no output 'clas'; expected cls, prefix,"):
        choose_outputs(["clas"], names, bare)
