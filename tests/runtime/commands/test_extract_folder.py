"""`regraft extract --out FOLDER`: shards, resuming, mixing refused, processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from regraft import Extractor
from regraft.bulk.folder import ShardFolder
from regraft.bulk.job import Job

Regraft = Callable[..., tuple[int, str, str]]
NAMES = ("cls", "patches", "pooled", "hidden.1", "attention.1", "test_time_registers")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "features"


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def links(folder: Path, photos: list[Path], count: int) -> list[Path]:
    """Many image files for the space of a few; every 50th is none."""
    folder.mkdir()
    paths = []
    for i in range(count):
        source = photos[i % len(photos)]
        paths.append(folder / f"{i:05}{source.suffix}")
        if i % 50 == 7:
            paths[-1].write_bytes(b"no image")
        else:
            paths[-1].hardlink_to(source)
    return paths


def assert_every_image_once(out: Path, paths: list[Path], photos: list[Path], bundle: Path) -> None:
    """Every image has one row, in order, with its own features or its error."""
    table = pq.read_table(out)
    assert table["paths"].to_pylist() == [str(path) for path in paths]
    with Extractor.open(bundle) as extractor:
        expected = extractor.extract(photos).arrays()
    assert table.column_names == ["paths", *NAMES, "error"]
    errors = table["error"].to_pylist()
    for name in NAMES:
        shape = json.loads(table.schema.field(name).metadata[b"shape"])
        assert shape == list(expected[name].shape[1:])
        for i, row in enumerate(table[name].to_pylist()):
            if i % 50 == 7:
                assert row is None
                assert errors[i] == f"{paths[i]}: is not an image file that Pillow reads"
            else:
                assert errors[i] is None
                right = expected[name][i % len(photos)].ravel()
                np.testing.assert_allclose(row, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_folder_of_shards_holds_every_image_once(
    regraft: Regraft,
    pristine_bundle: Path,
    photos: list[Path],
    tmp_path: Path,
    out: Path,
    processes: int,
) -> None:
    paths = links(tmp_path / "images", photos, 120)
    words = ["extract", pristine_bundle, tmp_path / "images", "--out", out, "--json"]
    words += ["--shard-size", 16, "--processes", processes]
    code, said, err = regraft(*words)
    assert code == 0, err
    assert sorted(err.splitlines()) == [
        f"regraft: {paths[i]}: is not an image file that Pillow reads" for i in (7, 57, 107)
    ]
    summary = json.loads(said)
    assert summary["images"] == 117
    assert summary["shards"] == {"all": 8, "resumed": 0}
    assert [failure["path"] for failure in summary["failed"]] == [
        str(paths[i]) for i in (7, 57, 107)
    ]
    assert beside(out) == ["features"]
    shards = [f"shard-{i:06}.parquet" for i in range(8)]
    assert sorted(p.name for p in out.iterdir()) == ["_images.jsonl", "_run.json", *shards]
    assert_every_image_once(out, paths, photos, pristine_bundle)
    # Asked again, it has nothing to do and says the same.
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    code, said, noted = regraft(*words)
    again = json.loads(said)
    assert code == 0
    assert noted.splitlines() == sorted(err.splitlines())  # bad images are named again
    said = regraft(*(word for word in words if word != "--json"))[1]
    assert "117 images (3 could not be read), float32" in said
    assert said.endswith("8 shards, 8 of them there before\n")
    assert again["shards"] == {"all": 8, "resumed": 8}
    assert (again["images"], again["failed"]) == (117, summary["failed"])
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_float16_and_chosen_outputs(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], out: Path
) -> None:
    code, said, err = regraft(
        *("extract", pristine_bundle, *photos, "--out", f"{out}/", "--dtype", "float16"),
        *("--outputs", "pooled,cls"),
    )
    assert (code, err) == (0, "")
    assert f"{out}/: 11 images, float16: cls (11, 8), pooled (11, 8)\n4 shards, 0 of them" in said
    table = pq.read_table(out)
    assert table.column_names == ["paths", "cls", "pooled", "error"]
    assert str(table.schema.field("cls").type) == "fixed_size_list<element: halffloat>[8]"


def test_a_shard_without_any_readable_image_has_the_same_schema(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], tmp_path: Path, out: Path
) -> None:
    (tmp_path / "bad").mkdir()
    for i in range(2):
        (tmp_path / "bad" / f"{i}.jpg").write_bytes(b"")
    words = ["extract", pristine_bundle, tmp_path / "bad", *photos[:2], "--out", out]
    assert regraft(*words, "--shard-size", 2)[0] == 0
    first, second = (pq.read_table(out / f"shard-00000{i}.parquet") for i in (0, 1))
    assert first.schema.remove_metadata() == second.schema.remove_metadata()
    assert first["cls"].null_count == 2
    assert second["cls"].null_count == 0
    code, _, err = regraft(*words, "--strict")
    assert code == 1
    assert f"2 of 4 images could not be read (named above); {out} holds their errors" in err


@pytest.mark.parametrize("more", [(), ("--processes", 2), ("--strict",)])
def test_when_no_image_can_be_read_nothing_is_left(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], out: Path, more: tuple[object, ...]
) -> None:
    bad = [out.parent / f"{i}.jpg" for i in range(3)]
    for path in bad:
        path.write_bytes(b"")
    words = ["extract", pristine_bundle, *bad, "--out", out, "--shard-size", 2, *more]
    code, said, err = regraft(*words)
    assert (code, said) == (1, "")
    assert err.splitlines()[-1] == (
        f"regraft: {out}: there are no features to write; none of the 3 images could be read "
        "(named above)"
    )
    assert set(out.parent.iterdir()) == set(bad)
    # Once they can be read, the same command reads them.
    for path in bad:
        shutil.copy(photos[0], path)
    assert regraft(*words)[0] == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    bad[0].write_bytes(b"")
    code, _, _ = regraft("extract", pristine_bundle, bad[0], "--out", out, "--force", *more)
    assert code == 1
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def start(words: list[object]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "regraft", "extract", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_at_random(words: list[object], place: Path, out: Path, seed: int) -> tuple[int, list[int]]:
    """Runs the command until it ends by itself, killing it (not its children) in between.

    For two minutes; on a busy machine, what is left then is left to the caller.

    Returns how often it was killed, and how many shards were there each time.
    """
    rng, shards = random.Random(seed), []
    until = time.monotonic() + 120
    while time.monotonic() < until:
        process = start(words)
        before = len(list(place.glob("shard-*")))
        # From its first new shard on, some random while.
        while process.poll() is None and len(list(place.glob("shard-*"))) <= before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        _, err = process.communicate(timeout=60)
        if process.returncode == 0:
            return len(shards), shards
        assert process.returncode == -signal.SIGKILL, err
        if out.exists():  # killed between publishing and its last word
            return len(shards), shards
        shards.append(len(list(place.glob("shard-*"))))
    return len(shards), shards


@pytest.mark.parametrize(
    ("processes", "count"), [(1, 200), pytest.param(2, 3000, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment_and_run_again_every_image_is_there_once(
    pristine_bundle: Path,
    photos: list[Path],
    tmp_path: Path,
    out: Path,
    processes: int,
    count: int,
) -> None:
    paths = links(tmp_path / "images", photos, count)
    words = [pristine_bundle, tmp_path / "images", "--out", out, "--shard-size", 4]
    words += ["--processes", processes, "--threads", 1]
    kills, shards = kill_at_random(words, Path(f"{out}.partial"), out, seed=count)
    assert kills >= 2, "the machine is too fast for this test: give it more images"
    assert shards == sorted(shards)
    process = start(words)  # whatever the last kill left: shards, publishing, or nothing to do
    assert process.wait(timeout=200) == 0
    assert beside(out) == ["features"]
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    assert_every_image_once(out, paths, photos, pristine_bundle)


@pytest.fixture
def unfinished(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], out: Path
) -> tuple[list[object], Path]:
    """A run that stopped at its third shard: the words of it, and its folder."""
    words: list[object] = ["extract", pristine_bundle, *photos, "--out", out]
    assert regraft(*words, "--shard-size", 3)[0] == 0
    place = out.with_name("features.partial")
    out.rename(place)
    (place / "shard-000002.parquet").unlink()
    (place / ".shard-000002.1a2b3c4d.parquet").write_bytes(b"half")
    return words, place


def test_resuming_computes_what_is_missing_and_gives_the_same_bytes(
    regraft: Regraft, unfinished: tuple[list[object], Path], out: Path
) -> None:
    words, place = unfinished
    kept = {p.name: (p.read_bytes(), p.stat().st_ino) for p in place.glob("shard-*")}
    code, said, err = regraft(*words, "--json", "--batch-size", 2)
    assert (code, err) == (0, "")
    assert json.loads(said)["shards"] == {"all": 4, "resumed": 3}
    for name, (content, inode) in kept.items():
        assert (out / name).read_bytes() == content
        assert (out / name).stat().st_ino == inode
    assert not place.exists()
    assert not list(out.glob(".*"))


def test_another_request_is_never_mixed_in(
    regraft: Regraft,
    unfinished: tuple[list[object], Path],
    photos: list[Path],
    bundle_folder: Path,
    out: Path,
) -> None:
    words, place = unfinished
    before = sorted(p.name for p in place.iterdir())
    (verify := bundle_folder / "verify.json").write_text(verify.read_text() + " ")
    reseal(bundle_folder)
    bundle = words[1]
    for changed, message in [
        ([*words, "--dtype", "float16"], "--dtype was float32 and is float16"),
        ([*words, "--outputs", "cls"], "--outputs was cls,patches,pooled,hidden,attention,"),
        ([*words, "--draft"], "--draft was False and is True"),
        ([*words, "--shard-size", 5], "--shard-size was 3 and is 5"),
        ([*words[:2], photos[0], *words[2:]], "the number of images was 11 and is 12"),
        (["extract", bundle, *reversed(photos), "--out", out], "the list of images differs"),
        (["extract", bundle_folder, *words[2:]], "the bundle (its manifest's sha256) differs"),
    ]:
        code, said, err = regraft(*changed)
        assert (code, said, err.count("\n")) == (1, "", 1)
        assert err.startswith(f"regraft: {place}: holds an unfinished extraction: ")
        assert message in err
        assert err.endswith("; give --force to start anew, or choose another --out\n")
    after = sorted(p.name for p in place.iterdir() if not p.name.startswith(".shard"))
    assert after == [name for name in before if not name.startswith(".shard")]
    assert not out.exists()
    assert regraft(*words, "--dtype", "float16", "--force")[0] == 0
    schema = pq.read_table(out).schema
    assert str(schema.field("cls").type) == "fixed_size_list<element: halffloat>[8]"
    code, _, err = regraft(*words)
    assert code == 1
    assert f"{out}: holds features that were extracted otherwise: --dtype was float16" in err
    assert regraft(*words, "--force")[0] == 0
    assert str(pq.read_schema(out / "shard-000000.parquet").field("cls").type).endswith("float>[8]")
    assert beside(out) == ["features"]


def reseal(bundle: Path) -> None:
    from regraft.bundle import record
    from regraft.manifest_file import digest

    data = json.loads((bundle / "manifest.json").read_text())
    data["files"]["verify.json"] = vars(record(bundle / "verify.json"))
    data["sha256"] = digest(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


def test_the_same_relative_names_from_another_folder_are_other_images(
    regraft: Regraft,
    pristine_bundle: Path,
    photos: list[Path],
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(photos[0], tmp_path / name / "x.jpg")
    monkeypatch.chdir(tmp_path / "a")
    assert regraft("extract", pristine_bundle, "x.jpg", "--out", out)[0] == 0
    monkeypatch.chdir(tmp_path / "b")
    code, _, err = regraft("extract", pristine_bundle, "x.jpg", "--out", out)
    assert code == 1
    assert f"relative paths start from was {tmp_path}/a and is {tmp_path}/b" in err


def cut(place: Path) -> None:
    shard = place / "shard-000001.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])


def swap(place: Path) -> None:
    shutil.copy(place / "shard-000000.parquet", place / "shard-000001.parquet")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "shard-000001.parquet: is damaged ("),
        (swap, "shard-000001.parquet: is not of this extraction; remove it and run again"),
        (
            lambda place: (place / "_run.json").write_text("{}"),
            "_run.json: is not what `regraft extract` writes (KeyError('schema')); remove",
        ),
        (
            lambda place: (place / "_run.json").write_text('{"schema": 2}'),
            "_run.json: schema 2 is newer than 1",
        ),
        (
            lambda place: (place / "_run.json").unlink(),
            "is a folder without _run.json, so --force does not replace it",
        ),
    ],
)
def test_a_damaged_folder_is_one_line(
    regraft: Regraft,
    unfinished: tuple[list[object], Path],
    harm: Callable[[Path], object],
    message: str,
) -> None:
    words, place = unfinished
    harm(place)
    code, said, err = regraft(*words)
    assert (code, said, err.count("\n")) == (1, "", 1)
    assert str(place) in err
    assert message in err


def test_two_runs_do_not_fill_one_folder(
    regraft: Regraft, unfinished: tuple[list[object], Path], photos: list[Path], out: Path
) -> None:
    words, place = unfinished
    job = Job.read(place)
    with ShardFolder.open(out, job, [str(photo) for photo in photos]):
        code, _, err = regraft(*words)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{place}: another `regraft extract` is filling it; wait for it" in err
    assert regraft(*words)[0] == 0


def test_a_folder_of_somebody_else_is_left_alone(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], out: Path
) -> None:
    out.mkdir()
    (out / "diary.txt").write_text("precious")
    code, _, err = regraft("extract", pristine_bundle, photos[0], "--out", out, "--force")
    assert code == 1
    assert f"{out}: is a folder without _run.json, so --force does not replace it" in err
    assert (out / "diary.txt").read_text() == "precious"


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return found


def workers_of(parent: int) -> list[int]:
    """Its worker processes, without multiprocessing's own helper."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(parent)}
    return [pid for pid, line in lines.items() if b"spawn_main" in line]


@pytest.fixture
def long_run(
    pristine_bundle: Path, photos: list[Path], tmp_path: Path, out: Path
) -> subprocess.Popen[str]:
    """Two processes in the middle of 20000 images."""
    links(tmp_path / "images", photos, 2)
    words = [pristine_bundle, *[tmp_path / "images"] * 10000, "--out", out, "--processes", 2]
    process = start([*words, "--shard-size", 8, "--threads", 1])
    place, until = out.with_name("features.partial"), time.monotonic() + 60
    while len(list(place.glob("shard-*"))) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    return process


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "regraft: interrupted\n"),
        pytest.param(signal.SIGTERM, 143, "", marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_ends_every_process_and_keeps_whole_shards(
    long_run: subprocess.Popen[str], out: Path, number: signal.Signals, code: int, said: str
) -> None:
    workers = workers_of(long_run.pid)
    assert len(workers) == 2
    os.killpg(long_run.pid, number) if number == signal.SIGINT else long_run.send_signal(number)
    _, err = long_run.communicate(timeout=60)
    assert (long_run.returncode, err) == (code, said)
    assert all(gone(pid) for pid in workers)
    place = out.with_name("features.partial")
    assert not list(place.glob(".*"))
    assert {pq.read_metadata(p).num_rows for p in place.glob("shard-*")} == {8}


def test_workers_end_when_their_parent_is_killed(long_run: subprocess.Popen[str]) -> None:
    workers = workers_of(long_run.pid)
    long_run.kill()
    long_run.communicate(timeout=60)
    until = time.monotonic() + 30
    while not all(gone(pid) for pid in workers):
        assert time.monotonic() < until, "a worker outlives its parent"
        time.sleep(0.05)


def test_a_worker_that_dies_is_said(long_run: subprocess.Popen[str], out: Path) -> None:
    os.kill(workers_of(long_run.pid)[0], signal.SIGKILL)
    _, err = long_run.communicate(timeout=60)
    assert long_run.returncode == 1
    assert err == (
        "regraft: a worker process died (signal 9); out of memory, perhaps: try fewer --processes; "
        "finished shards are kept, run again to go on\n"
    )
    assert not list(out.with_name("features.partial").glob(".*"))


def test_an_error_of_a_worker_is_one_line(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], out: Path
) -> None:
    """An output that float16 cannot hold arises in the workers alone."""
    import onnx
    from onnx import numpy_helper

    from regraft.bundle import record
    from regraft.manifest_file import digest

    bundle = out.parent / "bundle"
    shutil.copytree(pristine_bundle, bundle)
    model = onnx.load(bundle / "model.onnx")
    (kernel,) = (t for t in model.graph.initializer if t.name == "kernel")
    kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel) * 1e6, "kernel"))
    onnx.save(model, bundle / "model.onnx")
    data = json.loads((bundle / "manifest.json").read_text())
    data["files"]["model.onnx"] = vars(record(bundle / "model.onnx"))
    data["sha256"] = digest(data)
    (bundle / "manifest.json").write_text(json.dumps(data))
    words = ["extract", bundle, *photos, "--out", out, "--dtype", "float16", "--processes", 2]
    code, said, err = regraft(*words)
    assert (code, said, err.count("\n")) == (1, "", 1)
    assert "and float16 ends at 65504; use --dtype float32" in err


@pytest.mark.parametrize("name", ["", ".", "./", "/"])
def test_a_folder_without_a_name_is_not_taken(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], tmp_path: Path, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own = tmp_path / "here" / "own"
    own.parent.mkdir()
    own.write_text("kept")
    monkeypatch.chdir(own.parent)
    code, out, err = regraft("extract", pristine_bundle, *photos, "--out", name)
    assert (code, out) == (1, "")
    assert f"{name}: is a folder without _run.json" in err.splitlines()[-1]
    assert [*own.parent.iterdir()] == [own]


def test_a_name_that_is_too_long_is_one_line(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], tmp_path: Path
) -> None:
    long = tmp_path / "here" / ("x" * 250)  # 255 bytes go, but not with .partial
    long.parent.mkdir()
    code, out, err = regraft("extract", pristine_bundle, *photos, "--out", long)
    assert (code, out) == (1, "")
    assert "File name too long); choose a shorter name" in err.splitlines()[-1]
    assert not [*long.parent.iterdir()]


@pytest.mark.parametrize("command", ["extract", "build", "verify", "bench"])
def test_a_batch_has_an_end(
    regraft: Regraft, pristine_bundle: Path, tmp_path: Path, command: str
) -> None:
    more = {"extract": [tmp_path, "--out", tmp_path / "f"], "bench": []}
    more |= {"build": ["--engine", "ort-cpu", "--images", tmp_path]}
    more |= {"verify": ["--images", tmp_path]}
    option = "--batch-sizes" if command == "bench" else "--batch-size"
    code, _, err = regraft(command, pristine_bundle, *more[command], option, 10**7)
    assert code == 2
    assert "'10000000' is not an integer from 1 to 4096" in err.splitlines()[-1]
