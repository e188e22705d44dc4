"""NVIDIA's perf_analyzer against `regraft serve`, over both transports.

Its program needs glibc 2.38, so it runs on the libraries of a minimal Debian 13 beside it.
"""

from __future__ import annotations

import base64
import fcntl
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import bundles, image, pictures
from tests.support.environments import ROOT
from tests.support.server import Server, serving

pytestmark = pytest.mark.slow
VERSION, PLATFORM = "2.60.0", "manylinux_2_38_x86_64"
REQUESTS = 50


@pytest.fixture(scope="module")
def command() -> list[str]:
    """The program, with the loader and the libraries that it runs on."""
    libraries = image.debian() / "usr/lib/x86_64-linux-gnu"
    place = ROOT / f"perf-analyzer-{VERSION}"
    program = place / "perf_analyzer/bin/perf_analyzer"
    with (ROOT / "perf-analyzer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            words = [
                *("download", "--quiet", "--no-deps", "--dest", place, "--only-binary", ":all:")
            ]
            words += ["--platform", PLATFORM, f"perf-analyzer=={VERSION}"]
            done = subprocess.run(
                [sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True
            )
            if done.returncode:
                last = (done.stderr.strip() or "no reason given").splitlines()[-1]
                pytest.skip(f"perf-analyzer cannot be had: {last}")
            zipfile.ZipFile(next(place.glob("*.whl"))).extractall(place)
    program.chmod(0o755)
    loader = libraries / "ld-linux-x86-64.so.2"
    return [str(loader), "--library-path", str(libraries), str(program)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundle = bundles.exported(tmp_path_factory)
    with serving(f"vit={bundle}", "--grpc-port", 0) as started:
        yield started


def measure(command: list[str], server: Server, transport: str, *words: object) -> str:
    port = server.port if transport == "http" else server.grpc_port
    fixed = ("-u", f"127.0.0.1:{port}", "-i", transport, "--measurement-mode", "count_windows")
    # The figures are not looked at, so they need not be stable.
    enough = ("--measurement-request-count", REQUESTS, "-s", 999, "--max-trials", 3)
    done = subprocess.run(
        [*command, *map(str, (*fixed, *enough, *words))],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def counts(server: Server, model: str) -> tuple[int, int, int]:
    (row,) = server.ask("GET", f"/v2/models/{model}/stats").document["model_stats"]
    stats = row["inference_stats"]
    return stats["success"]["count"], stats["fail"]["count"], row["inference_count"]


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_tensors(command: list[str], server: Server, transport: str) -> None:
    before = counts(server, "vit")
    # Its random bytes, taken for FP32, hold NaN, which is refused.
    words = ("-m", "vit", "-b", 4, "--concurrency-range", 2, "--input-data", "zero")
    said = measure(command, server, transport, *words)
    assert "Throughput: " in said
    success, fail, images = (
        now - then for now, then in zip(counts(server, "vit"), before, strict=True)
    )
    assert success >= REQUESTS
    assert (fail, images) == (0, 4 * success)


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_images(command: list[str], server: Server, transport: str, tmp_path: Path) -> None:
    (file,) = pictures.write(tmp_path / "images", 1).iterdir()
    content = file.read_bytes()
    element = base64.b64encode(struct.pack("<I", len(content)) + content).decode()
    data = {"data": [{"images": {"content": {"b64": element}, "shape": [1]}}]}
    (tmp_path / "data.json").write_text(json.dumps(data))
    before = counts(server, "vit_images")
    words = ("-m", "vit_images", "--concurrency-range", 4, "--input-data", tmp_path / "data.json")
    assert "Throughput: " in measure(command, server, transport, *words, "--shape", "images:1")
    success, fail, _ = (
        now - then for now, then in zip(counts(server, "vit_images"), before, strict=True)
    )
    assert success >= REQUESTS
    assert fail == 0
