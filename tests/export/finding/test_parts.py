"""The images: split by seed, decoded once where they fit, bad files told once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from regraft.errors import InputError
from regraft.pipeline import Failure
from regraft.preprocessing import Preprocessing
from regraft_export.finding import parts
from regraft_export.finding.parts import ArrayImages, FileImages, gathered, split
from regraft_export.finding.subject import Floats

PREPROCESSING = Preprocessing((8, 8), (0, 0, 0), (1, 1, 1), "none", (8, 8))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Ten pictures; the grey level of each is ten times its number; 3 and 7 are broken."""
    files = []
    for number in range(10):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8), (number * 10,) * 3).save(file)
        if number in (3, 7):
            file.write_bytes(b"broken")
        files.append(file)
    return files


def levels(batches: list[Floats]) -> list[int]:
    return [round(float(v) * 25.5) for batch in batches for v in batch[:, 0, 0, 0]]


@given(count=st.integers(6, 3000), seed=st.integers(0, 2**32))
def test_split_is_a_partition(count: int, seed: int) -> None:
    made = split(count, seed)
    assert sorted(made.score + made.select + made.report) == list(range(count))
    assert len(made.select) == len(made.report) == min(32, count // 4)
    assert len(made.score) >= count / 2
    assert made == split(count, seed)
    for part in (made.score, made.select, made.report):
        assert list(part) == sorted(part)


def test_split_of_the_samples() -> None:
    made = split(64, 0)
    assert (len(made.score), len(made.select), len(made.report)) == (32, 16, 16)
    assert made != split(64, 1)


@pytest.mark.parametrize(("count", "came"), [(0, "0 images"), (1, "1 image"), (5, "5 images")])
def test_too_few_images(count: int, came: str) -> None:
    with pytest.raises(InputError, match=rf"^{came} came; finding needs at least 6"):
        split(count, 0)


def test_arrays_in_batches() -> None:
    pixels = np.broadcast_to(np.arange(7, dtype=np.float32)[:, None, None, None], (7, 3, 2, 2))
    images = ArrayImages(pixels, batch_size=2)
    assert len(images) == 7
    got = [batch[:, 0, 0, 0].tolist() for batch in images.batches([6, 1, 2, 3, 5])]
    assert got == [[6, 1], [2, 3], [5]]


def test_files_that_cannot_be_decoded_are_left_out_and_told_once(paths: list[Path]) -> None:
    failures: list[Failure] = []
    images = FileImages(paths, PREPROCESSING, batch_size=3, on_failure=failures.append)
    assert levels(list(images.batches([9, 3, 1, 7, 2]))) == [9, 1, 2]
    assert levels(list(images.batches([3, 4]))) == [4]
    assert [f.index for f in failures] == [3, 7]
    assert failures[0].path == str(paths[3])
    assert "is not an image file" in failures[0].message


def test_images_that_fit_are_decoded_once(paths: list[Path]) -> None:
    images = FileImages(paths, PREPROCESSING, batch_size=3)
    first = list(images.batches([0, 1, 2, 4]))
    again = list(images.batches([0, 1, 2, 4]))
    assert all(a is b for a, b in zip(first, again, strict=True))
    list(images.batches([5]))
    assert next(iter(images.batches([0, 1, 2, 4]))) is not first[0]


def test_images_that_do_not_fit_are_not_kept(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "CACHE_BYTES", 4 * 3 * 8 * 8 * 4 - 1)
    images = FileImages(paths, PREPROCESSING, batch_size=3)
    first = list(images.batches([0, 1, 2, 4]))
    again = list(images.batches([0, 1, 2, 4]))
    assert all(a is not b for a, b in zip(first, again, strict=True))
    assert levels(first) == levels(again) == [0, 1, 2, 4]


def test_a_pass_that_was_broken_off_is_not_kept(paths: list[Path]) -> None:
    images = FileImages(paths, PREPROCESSING, batch_size=1)
    stream = images.batches([0, 1, 2])
    next(stream)
    del stream
    assert levels(list(images.batches([0, 1, 2]))) == [0, 1, 2]


def test_a_part_of_which_nothing_can_be_read(paths: list[Path]) -> None:
    images = FileImages(paths, PREPROCESSING)
    assert levels([gathered(images, [1, 3, 2], "select")]) == [1, 2]
    with pytest.raises(InputError, match=r"no image of the report part \(2 images\) could"):
        gathered(images, [3, 7], "report")
