from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft import feature_files, parquet_files
from regraft.errors import InputError, OutputExistsError
from regraft.feature_files import feature_file
from regraft.rows import Rows

SHAPES = {"cls": (6,), "patches": (2, 3, 6), "hidden.4": (7, 6)}


def batch(size: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=(size, *shape)).astype(np.float32) for name, shape in SHAPES.items()
    }


def rows(arrays: dict[str, np.ndarray], paths: list[str]) -> Rows:
    return Rows(tuple(paths), (None,) * len(paths), arrays)


def write(path: Path, sizes: list[int], **options) -> tuple[dict[str, np.ndarray], list[str]]:
    """Writes batches of these sizes; returns what the file must hold."""
    batches = [batch(size, seed) for seed, size in enumerate(sizes)]
    paths = [f"photos/{i}.jpg" for i in range(sum(sizes))]
    with feature_file(path, **options) as writer:
        for i, arrays in enumerate(batches):
            start = sum(sizes[:i])
            writer.append(rows(arrays, paths[start : start + sizes[i]]))
    return {name: np.concatenate([b[name] for b in batches]) for name in SHAPES}, paths


def read(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads a features file the way its user would."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return arrays, arrays.pop("paths").tolist()
    table = pq.read_table(path)
    arrays = {}
    for field in table.schema:
        if field.name not in ("paths", "error"):
            shape = json.loads(field.metadata[b"shape"])
            flat = table[field.name].combine_chunks().flatten().to_numpy()
            arrays[field.name] = flat.reshape(-1, *shape)
    return arrays, table["paths"].to_pylist()


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("sizes", [[3, 3, 1], [1], [2] * 20], ids=["uneven", "single", "many"])
def test_what_is_read_is_what_was_written(
    tmp_path: Path, suffix: str, dtype: str, sizes: list[int]
) -> None:
    target = tmp_path / f"features{suffix}"
    arrays, paths = write(target, sizes, dtype=dtype)
    got, got_paths = read(target)
    assert got_paths == paths
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        assert got[name].dtype == dtype
        np.testing.assert_array_equal(got[name], array.astype(dtype))
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@settings(max_examples=40)
@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1
    )
)
@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_every_file_name_comes_back(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, names: list[str]
) -> None:
    target = tmp_path_factory.mktemp("names") / f"features{suffix}"
    with feature_file(target) as writer:
        writer.append(rows(batch(len(names), 0), names))
    assert read(target)[1] == names


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_file_name_that_is_no_utf8_is_kept_or_escaped(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"features{suffix}"
    with feature_file(target) as writer:
        writer.append(rows(batch(1, 0), ["caf\udce9.jpg"]))
    assert read(target)[1] == ["caf\udce9.jpg" if suffix == ".npz" else r"caf\udce9.jpg"]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_memory_does_not_grow_with_the_images(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_files, "_ROW_GROUP_BYTES", 1 << 20)
    monkeypatch.setattr(feature_files, "_COPY_BYTES", 1 << 18)
    values = np.ones((4, 1 << 16), np.float32)  # 1 MiB
    with feature_file(tmp_path / f"few{suffix}") as writer:  # imports what is imported lazily
        writer.append(rows({"cls": values}, ["a"] * 4))
    tracemalloc.start()
    with feature_file(tmp_path / f"many{suffix}") as writer:
        for _ in range(40):
            writer.append(rows({"cls": values}, ["a"] * 4))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / f"many{suffix}").stat().st_size > 40 << 20
    assert peak < 8 << 20


def test_small_batches_share_a_row_group(tmp_path: Path) -> None:
    write(tmp_path / "f.parquet", [1] * 30)
    assert pq.ParquetFile(tmp_path / "f.parquet").num_row_groups == 1


def test_the_same_features_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", [2, 3])
    write(tmp_path / "b.npz", [2, 3])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_an_interrupt_leaves_the_old_file(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"features{suffix}"
    arrays, _ = write(target, [2])
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(target)
    np.testing.assert_array_equal(read(target)[0]["cls"], arrays["cls"])
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def write_and_stop(target: Path) -> None:
    with feature_file(target, force=True) as writer:
        writer.append(rows(batch(3, 9), ["a", "b", "c"]))
        raise KeyboardInterrupt


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_what_exists_is_not_overwritten(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"features{suffix}"
    write(target, [2])
    with pytest.raises(OutputExistsError, match=f"features{suffix}: exists already"):
        write(target, [3])
    arrays, _ = write(target, [3], force=True)
    np.testing.assert_array_equal(read(target)[0]["cls"], arrays["cls"])


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_no_rows_is_no_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(InputError, match=r"there are no features to write$"):
        write(tmp_path / f"features{suffix}", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_no_image_that_could_be_read_is_no_file(tmp_path: Path, suffix: str) -> None:
    def write_bad() -> None:
        with feature_file(tmp_path / f"features{suffix}") as writer:
            writer.append(Rows(("a", "b"), ("a: is empty", "b: is empty"), {}))
            writer.append(Rows(("c",), ("c: is empty",), {}))

    said = r"to write; none of the 3 images could be read \(named above\)$"
    with pytest.raises(InputError, match=said):
        write_bad()
    assert list(tmp_path.iterdir()) == []


def test_a_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    big = {"cls": np.full((1, 4), 70000, np.float32)}
    with feature_file(tmp_path / "f.npz") as writer:
        writer.append(rows(big, ["a"]))
    with feature_file(tmp_path / "g.npz", "float16") as writer:
        with pytest.raises(InputError) as caught:
            writer.append(rows(big, ["a"]))
        assert str(caught.value) == (
            "cls holds 70000, and float16 ends at 65504; use --dtype float32"
        )
        writer.append(rows(batch(1, 0), ["a"]))


def test_a_batch_of_other_arrays_is_a_bug(tmp_path: Path) -> None:
    with feature_file(tmp_path / "f.npz") as writer:
        writer.append(rows(batch(2, 0), ["a", "b"]))
        with pytest.raises(ValueError, match="a batch of other arrays"):
            writer.append(rows({"cls": np.zeros((2, 6), np.float32)}, ["c", "d"]))
        with pytest.raises(ValueError, match="a batch of other arrays"):
            writer.append(rows(batch(2, 0), ["c"]))


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"f\.csv: ends in '\.csv'; expected \.npz or \.parquet"):
        write(tmp_path / "f.csv", [1])
    write(tmp_path / "F.NPZ", [1])
    with np.load(tmp_path / "F.NPZ") as file:
        assert file["paths"].tolist() == ["photos/0.jpg"]


def test_a_missing_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError) as caught:
        write(tmp_path / "f.parquet", [1])
    assert str(caught.value) == (
        ".parquet needs pyarrow, which is not installed; write .npz, or pip install "
        "'regraft-runtime[parquet]', or in a checkout of regraft pip install './runtime[parquet]'"
    )
    write(tmp_path / "f.npz", [1])
