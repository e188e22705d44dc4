"""The Dockerfile: its CPU image built and run with buildah; the rest looked at."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import bundles, image, pictures
from tests.support.environments import WORKSPACE

from regraft import Extractor

LIMIT = 400_000_000  # bytes
PORT = 18000


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
    for name in ("install-runtime", "install-export", "gpu"):
        lines = stages()[name]
        heavy = next(i for i, line in enumerate(lines) if "constraints.txt './" in line)
        assert heavy < lines.index("COPY runtime runtime")


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
    told: dict[str, Any] = json.loads(image.buildah("inspect", "--type", "image", built).stdout)
    config = told["Docker"]["config"]
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
        ready = f"http://127.0.0.1:{PORT}/v2/health/ready"
        while True:
            try:
                with urllib.request.urlopen(ready, timeout=5) as answer:
                    assert answer.status == 200
                    break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < until
                time.sleep(0.2)
        told = json.loads(image.buildah("inspect", "--type", "image", built).stdout)
        check = told["Docker"]["config"]["Healthcheck"]["Test"][1:]
        check = [word.replace(":8000", f":{PORT}") for word in check]
        image.buildah("run", container, "--", *check)
        with pytest.raises(AssertionError):  # a health check that cannot fail is none
            image.buildah("run", container, "--", *(w.replace(str(PORT), "1") for w in check))
    finally:
        process.terminate()
        process.wait(timeout=30)
