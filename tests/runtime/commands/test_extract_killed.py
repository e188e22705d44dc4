"""`regraft extract --out FOLDER`, killed before each of its changes to the file system in turn."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

Regraft = Callable[..., tuple[int, str, str]]

# Counts what is about to be written, renamed or removed below a folder, and kills itself there.
KILLED = """
import os, signal, sys
at, below, seen = int(sys.argv[1]), sys.argv[2], 0

def hook(event, args):
    global seen
    if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        return
    if not isinstance(args[0], (str, bytes, os.PathLike)):
        return
    if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if os.fsdecode(os.path.realpath(args[0])).startswith(below):
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

sys.addaudithook(hook)
from regraft.cli.main import main
sys.exit(main(sys.argv[3:]))
"""
# Shards are written by pyarrow's own code, of which Python hears nothing.
LEAST = 15


def killed(at: int, base: Path, words: list[object]) -> bool:
    """Runs the command until its change number ``at``; False if it ended before."""
    command = [sys.executable, "-c", KILLED, str(at), str(base), "extract", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.fixture
def images(photos: list[Path], tmp_path: Path) -> Path:
    """Six real images and a bad one."""
    folder = tmp_path / "images"
    folder.mkdir()
    for photo in photos[:6]:
        shutil.copy(photo, folder)
    (folder / "bad.jpg").write_bytes(b"no image")
    return folder


def expect_whole(out: Path, images: Path, dtype: str) -> None:
    table = pq.read_table(out)
    assert table["paths"].to_pylist() == sorted(str(path) for path in images.iterdir())
    errors = dict(zip(table["paths"].to_pylist(), table["error"].to_pylist(), strict=True))
    assert [path for path, error in errors.items() if error] == [str(images / "bad.jpg")]
    assert str(table.schema.field("cls").type).split(": ")[1].startswith(dtype)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["_images.jsonl", "_run.json", *(f"shard-00000{i}.parquet" for i in range(3))]


@pytest.mark.slow
def test_before_every_change(
    regraft: Regraft, pristine_bundle: Path, images: Path, tmp_path: Path
) -> None:
    at, more = 0, True
    while more:
        base = tmp_path / str(at)
        base.mkdir()
        words: list[object] = [pristine_bundle, images, "--out", base / "out", "--shard-size", 3]
        more = killed(at, base, words)
        code, _, err = regraft("extract", *words)
        assert code == 0, (at, err)
        expect_whole(base / "out", images, "float")
        # The file that tries whether the folder can be written to may stay behind, empty.
        rest = [path for path in base.iterdir() if path.name != "out"]
        assert len(rest) <= 1, at
        assert all(path.name.startswith(".out.") and not path.stat().st_size for path in rest), at
        at += 1
    assert at > LEAST


@pytest.mark.slow
def test_before_every_change_while_it_replaces_others(
    regraft: Regraft, pristine_bundle: Path, images: Path, tmp_path: Path
) -> None:
    """With --force over finished features, and over unfinished ones, of another request."""
    at, more = 0, True
    while more:
        base = tmp_path / str(at)
        base.mkdir()
        words: list[object] = [pristine_bundle, images, "--out", base / "out", "--shard-size", 3]
        for _ in range(2):
            assert regraft("extract", *words)[0] == 0
            if not (base / "out.partial").exists():
                (base / "out").rename(base / "out.partial")
                (base / "out.partial" / "shard-000001.parquet").unlink()
        other = [*words, "--dtype", "float16", "--force"]
        more = killed(at, base, other)
        code, _, err = regraft("extract", *other)
        assert code == 0, (at, err)
        expect_whole(base / "out", images, "halffloat")
        at += 1
    assert at > LEAST


def test_before_the_record_is_whole(
    regraft: Regraft, pristine_bundle: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words: list[object] = [pristine_bundle, images, "--out", out, "--shard-size", 3]
    for left in (["_images.jsonl"], ["_images.jsonl", "_run.json.new"]):
        (place := tmp_path / "out.partial").mkdir()
        for name in left:
            (place / name).write_text('"ha')
        code, _, err = regraft("extract", *words)
        assert code == 0, err
        expect_whole(out, images, "float")
        shutil.rmtree(out)
    # What regraft did not leave stays, whatever it is called.
    place.mkdir()
    (place / "_images.jsonl").write_text("")
    (place / "diary.txt").write_text("precious")
    assert regraft("extract", *words)[0] == 1
    assert len(list(place.iterdir())) == 2
