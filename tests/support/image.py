"""Debian's buildah builds and runs the Dockerfile without a Docker engine, as root."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.environments import ROOT, WORKSPACE

BASE, SUITE = "docker.io/library/debian:13.1-slim", "trixie"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
STORE = ["--root", str(ROOT / "images"), "--runroot", str(ROOT / "images-run")]


def buildah(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs buildah with storage of its own, without overlay file systems or namespaces."""
    done = subprocess.run(
        ["buildah", *STORE, *map(str, words)],
        env={**os.environ, "STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"},
        capture_output=True,
        text=True,
        check=False,
        cwd=WORKSPACE,
    )
    assert done.returncode == 0 or not check, done.stderr[-4000:]
    return done


def build(target: str) -> str:
    """Builds a target of the Dockerfile over a base from Debian's packages; returns its name."""
    for tool in ("buildah", "debootstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install {tool}")
    if os.geteuid() != 0:
        pytest.skip("debootstrap and chroot isolation need root")
    ROOT.mkdir(exist_ok=True)
    _base()
    more: Sequence[object] = ()
    if CERTIFICATES.is_file():
        more = ["--volume", f"{CERTIFICATES}:/run/ca.crt:ro", "--build-arg", "PIP_CERT=/run/ca.crt"]
    name = f"localhost/regraft:{target}"
    options = ["--format", "docker", "--pull-never", "--layers", "--target", target, "--tag", name]
    buildah("bud", *options, *more, ".")
    return name


def debian() -> Path:
    """A minimal Debian in a folder, from Debian's packages; made once and kept."""
    if shutil.which("debootstrap") is None:
        pytest.skip("debootstrap is not installed: apt-get install debootstrap")
    if os.geteuid() != 0:
        pytest.skip("debootstrap needs root")
    folder = ROOT / "debian"
    ROOT.mkdir(exist_ok=True)
    with (ROOT / "debian.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "etc/debian_version").is_file() or (folder / "debootstrap").exists():
            shutil.rmtree(folder, ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", SUITE, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                shutil.rmtree(folder, ignore_errors=True)
                pytest.skip(f"debootstrap cannot make a base: {done.stdout.splitlines()[-1:]}")
    return folder


def _base() -> None:
    """Puts a minimal Debian where the base image would be, under its name."""
    if buildah("inspect", "--type", "image", BASE, check=False).returncode == 0:
        return
    folder = debian()
    container = buildah("from", "scratch").stdout.strip()
    place = buildah("mount", container).stdout.strip()
    subprocess.run(["cp", "-a", f"{folder}/.", place], check=True)
    for used in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(Path(place, used))
    buildah("umount", container)
    buildah("commit", "--quiet", container, BASE)
    buildah("rm", container)
