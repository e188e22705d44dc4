"""`regraft extract --ray` on a cluster of two nodes, in an environment of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.support import bundles, environments, pictures

from regraft.cli.main import main

HERE = Path(__file__).parent
Ray = Callable[..., "subprocess.CompletedProcess[str]"]


def test_without_ray_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    pictures.write(tmp_path, 1)
    words = ["extract", str(tmp_path), str(tmp_path), "--out", str(tmp_path / "out"), "--ray"]
    assert main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith("regraft: --ray needs Ray, which is not installed (")
    assert err.endswith("checkout of regraft pip install './runtime[ray]'\n")


@pytest.fixture(scope="module")
def python() -> Path:
    return environments.environment("ray", [*environments.RUNTIME, "ray[data]==2.60.0"])


@contextmanager
def cluster(python: Path) -> Iterator[str]:
    """The address of two nodes."""
    process = subprocess.Popen(
        [python, HERE / "ray_cluster.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environments.variables(RAY_USAGE_STATS_ENABLED="0"),
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    found = next((line.strip() for line in lines if re.fullmatch(r"[\d.]+:\d+\s*", line)), None)
    assert found, "the cluster did not start"
    yield found
    process.communicate(timeout=120)


@pytest.fixture(scope="module")
def address(python: Path) -> Iterator[str]:
    with cluster(python) as found:
        yield found


def started(python: Path, address: str, *words: object) -> subprocess.Popen[str]:
    """Python in the environment, which knows the cluster."""
    return subprocess.Popen(
        [str(python), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environments.variables(RAY_ADDRESS=address),
    )


@pytest.fixture
def start(python: Path, address: str) -> Callable[..., subprocess.Popen[str]]:
    """``start("-m", "regraft", ...)``, on the cluster that most tests share."""
    return partial(started, python, address)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.exported(tmp_path_factory)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """300 images of which every 50th is none."""
    folder = tmp_path_factory.mktemp("images")
    sources = sorted(pictures.write(folder, 7).iterdir())
    paths = []
    for i in range(300):
        paths.append(folder / f"copy{i:04}.png")
        if i % 50 == 7:
            paths[-1].write_bytes(b"no image")
        else:
            paths[-1].hardlink_to(sources[i % 7])
    return paths


def own_lines(err: str) -> list[str]:
    """stderr without what Ray's core, which is C++, says there of itself."""
    return [line for line in err.splitlines() if not line.startswith("[20")]


def plain(bundle: Path, images: list[Path], out: Path) -> None:
    words = ["extract", bundle, *images, "--out", out, "--shard-size", 4]
    assert main([str(word) for word in words]) == 0


def assert_equal(out: Path, right: Path) -> None:
    """The same rows, the same schema, and the same files but for the last bits of features."""
    got, expected = pq.read_table(out), pq.read_table(right)
    assert got.schema.remove_metadata() == expected.schema.remove_metadata()
    for name in ("paths", "error"):
        assert got[name].to_pylist() == expected[name].to_pylist()
    for name in set(got.column_names) - {"paths", "error"}:
        assert got.schema.field(name).metadata == expected.schema.field(name).metadata
        assert got[name].is_null().to_pylist() == expected[name].is_null().to_pylist()
        mine, theirs = (t[name].drop_null().combine_chunks().flatten() for t in (got, expected))
        np.testing.assert_allclose(mine.to_numpy(), theirs.to_numpy(), rtol=1e-4, atol=1e-4)
    files = [sorted(p.name for p in folder.iterdir()) for folder in (out, right)]
    assert files[0] == files[1]
    assert (out / "_run.json").read_text() == (right / "_run.json").read_text()


@pytest.mark.slow
def test_two_nodes_give_what_one_process_gives(
    start: Callable[..., subprocess.Popen[str]], bundle: Path, images: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "ray"
    process = start(
        *("-m", "regraft", "extract", bundle, *images, "--out", out, "--ray"),
        *("--shard-size", 4, "--threads", 1, "--json"),
    )
    said, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert sorted(own_lines(err)) == [
        f"regraft: {images[i]}: is not an image file that Pillow reads" for i in range(7, 300, 50)
    ]
    summary = json.loads(said)
    assert (summary["images"], summary["shards"]) == (294, {"all": 75, "resumed": 0})
    assert [failure["path"] for failure in summary["failed"]] == [
        str(images[i]) for i in range(7, 300, 50)
    ]
    plain(bundle, images, tmp_path / "plain")
    assert_equal(out, tmp_path / "plain")


@pytest.mark.slow
def test_killed_and_run_again_every_image_is_there_once(
    start: Callable[..., subprocess.Popen[str]], bundle: Path, images: list[Path], tmp_path: Path
) -> None:
    """Killed on the cluster, gone on with there, killed again, finished without it."""
    out, place = tmp_path / "ray", tmp_path / "ray.partial"
    words = ["extract", bundle, *images, "--out", out, "--shard-size", 4]
    reached = 0
    for _ in range(2):
        process = start("-m", "regraft", *words, "--ray", "--threads", 1)
        until = time.monotonic() + 200
        while len(list(place.glob("shard-*"))) <= reached:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.002)
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        reached = len(list(place.glob("shard-*")))
        assert 0 < reached < 75
    time.sleep(3)  # actors of a lost driver may still finish a shard, which harms nothing
    plain(bundle, images, out)
    plain(bundle, images, tmp_path / "plain")
    assert_equal(out, tmp_path / "plain")


@pytest.mark.slow
def test_both_nodes_work_and_decoding_is_a_step_of_its_own(
    python: Path, bundle: Path, images: list[Path], tmp_path: Path
) -> None:
    # On a cluster of its own: killed runs keep their share of one for three minutes.
    with cluster(python) as address:
        script = [HERE / "ray_stats.py", bundle, tmp_path / "out", *images]
        process = started(python, address, *script)
        said, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "actors 2\n" in said
    operators = re.findall(r"Operator \d+ (\S+):", said)
    assert operators == ["FromArrow", "MapBatches(_decode)", "MapBatches(_Actor)"]
    _, _, decoding, engine = re.split(r"Operator \d+ ", said)
    for step in (decoding, engine):
        assert re.findall(r"Tasks per node: .*; (\d+) nodes used", step) == ["2"], said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "tensorrt"], "--ray: tensorrt needs a GPU, and the cluster has none"),
        (["--engine", "openvino"], "openvino: "),
    ],
)
def test_what_cannot_run_is_one_line(
    start: Callable[..., subprocess.Popen[str]],
    bundle: Path,
    images: list[Path],
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    extract = ["-m", "regraft", "extract", bundle, *images[:3], "--out", tmp_path / "out", "--ray"]
    process = start(*extract, *words)
    said, err = process.communicate(timeout=300)
    assert (process.returncode, said) == (1, ""), err
    (line,) = own_lines(err)
    assert line.startswith(f"regraft: {message}")
    assert "Traceback" not in err
