"""Debian's buildah builds and runs the Dockerfile without a Docker engine, as root."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def build(target: str, **arguments: str) -> str:
    """Builds a target of the Dockerfile over a base from Debian's packages; returns its name.

    Args:
        target: the stage.
        arguments: build arguments that are to differ from the Dockerfile's.
    """
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
    given = [f"{name}={value}" for name, value in arguments.items()]
    more = [*more, *(word for argument in given for word in ("--build-arg", argument))]
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


@contextmanager
def unpacked(image: str) -> Iterator[Path]:
    """The root file system of an image, as a folder."""
    container = buildah("from", "--pull-never", image).stdout.strip()
    try:
        yield Path(buildah("mount", container).stdout.strip())
    finally:
        buildah("umount", container)
        buildah("rm", container)


def config(image: str) -> dict[str, Any]:
    """What an image says of how it is to be run: User, Env, Entrypoint, Cmd, Healthcheck, ..."""
    told = json.loads(buildah("inspect", "--type", "image", image).stdout)
    found: dict[str, Any] = told["Docker"]["config"]
    return found


def read_only(image: str, root: Path, mounts: Mapping[str, tuple[Path, bool]]) -> list[str]:
    """The words before a command that runs it as `docker run --read-only --cap-drop all` would.

    bubblewrap mounts; nothing can be written but mounts that may be, /tmp included.

    Args:
        image: says user, environment and working directory.
        root: of :func:`unpacked`; gets the mount points that it lacks, as Docker makes them.
        mounts: place -> folder, and whether it may be written.
    """
    for tool in ("bwrap", "setpriv"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install bubblewrap util-linux")
    told = config(image)
    words = ["bwrap", "--die-with-parent", "--unshare-pid", "--unshare-ipc", "--unshare-uts"]
    words += ["--ro-bind", str(root), "/", "--proc", "/proc", "--dev", "/dev"]
    for place, (folder, writable) in mounts.items():
        (root / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
        words += ["--bind" if writable else "--ro-bind", str(folder), place]
    words += ["--clearenv"]
    for variable in told["Env"]:
        name, _, value = variable.partition("=")
        words += ["--setenv", name, value]
    words += ["--chdir", told["WorkingDir"] or "/", "--cap-drop", "ALL"]
    for needed in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):  # to become the user, then gone
        words += ["--cap-add", needed]
    user, _, group = told["User"].partition(":")
    words += ["setpriv", "--reuid", user, "--regid", group, "--clear-groups"]
    return [*words, "--bounding-set", "-all", "--inh-caps", "-all", "--no-new-privs", "--"]


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
