"""regraft's own CUDA operators: the library that graphs with ``.operators.cuda.onnx`` need.

They do in one kernel what ONNX Runtime needs several for, and products with the algorithm that is
fastest on the card (see ``operators.cu``). Their sources ship with the package; ``regraft build
--engine ort-cuda`` compiles them with nvcc, times the products (:func:`timed_products`) and keeps
both beside its verdict in the engine cache, so that what is loaded is what was verified.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from regraft.errors import EngineError

SUFFIX = ".operators.cuda.onnx"
LIBRARY = "libregraft_operators.so"
PRODUCTS = "products.txt"  # beside the library, which reads it
LEAST_CAPABILITY = 80  # of the card
_CUBLAS = ("nvidia-cublas", "nvidia-cublas-cu12")  # packages: of CUDA 13, of CUDA 12
_SOURCES = Path(__file__).parent
# Ampere, and Hopper with its intermediate code, which later cards compile when they load it.
_CARDS = ("arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]")

# (nvcc, sources) -> library, and what nvcc says of itself: a build needs it once for each graph,
# and compiling takes 20 s. In memory, for what was compiled may be thrown away with its folder.
_compiled: dict[tuple[str, str], tuple[bytes, str]] = {}
# (card, library) -> the products that were timed with it: the graphs of a bundle have most sizes in
# common, or nearly so, and compare only if they are computed with the same algorithms.
_timed: dict[tuple[str, bytes], bytes] = {}


def needs_operators(graph: Path) -> bool:
    """Whether a graph holds operators of regraft's own, by its name."""
    return graph.name.endswith(SUFFIX)


def source_sha256() -> str:
    """Of all sources: a library of others is another one."""
    digest = hashlib.sha256()
    for file in sorted(f for f in _SOURCES.iterdir() if f.suffix in (".cu", ".cuh", ".h")):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def cublas_packages() -> str:
    """Those that are installed, with versions, as ``nvidia-cublas 13.1.0.3``; empty if none is.

    Products are chosen with the cuBLASLt of the process, and hold for that version alone. The
    toolkit's own is not seen here: then the library compares versions when it is loaded.
    """
    found = []
    for name in _CUBLAS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def compile_library(folder: Path) -> dict[str, str]:
    """Compiles the operators into a folder; the same once in a process.

    Args:
        folder: gets :data:`LIBRARY`; nvcc puts what it needs meanwhile there, too.

    Returns:
        ``sources`` (their sha256) and ``nvcc`` (its last line on itself).

    Raises:
        EngineError: there is no nvcc, or it fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise EngineError(
            "ort-cuda: the graph has CUDA operators of regraft's own, and there is no nvcc to "
            "compile them with; install the CUDA toolkit (12 or 13), or set NVCC to its nvcc, or "
            "export without --cuda-operators"
        )
    sources = source_sha256()
    if (nvcc, sources) not in _compiled:
        _compiled[nvcc, sources] = _compile(nvcc, folder)
    content, version = _compiled[nvcc, sources]
    file = folder / LIBRARY
    file.unlink(missing_ok=True)  # to write into one that is loaded would crash the process
    file.write_bytes(content)
    return {"sources": sources, "nvcc": version}


def _compile(nvcc: str, folder: Path) -> tuple[bytes, str]:
    library = folder / LIBRARY
    words = [nvcc, "-O3", "-std=c++17", "-shared", "-cudart", "static"]
    words += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    words += [word for card in _CARDS for word in ("-gencode", card)]
    words += _cublas_headers()
    words += [str(_SOURCES / "operators.cu"), "-o", LIBRARY, "-ldl"]
    done = _run(words, folder)
    if done.returncode != 0 or not library.exists():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        # Its last line only counts the errors.
        telling = [line for line in lines if "error" in line or "fatal" in line] or lines[-1:]
        raise EngineError(f"ort-cuda: {nvcc} failed to compile the CUDA operators: {telling[0]}")
    version = _run([nvcc, "--version"], folder).stdout.strip().splitlines()[-1:] or [""]
    return library.read_bytes(), version[0]


def _cublas_headers() -> list[str]:
    """Those of the package nvidia-cublas, where it is installed; the toolkit's own come first."""
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations or ()) if spec is not None else ()
    found = [f.parent for place in places for f in Path(place).glob("*/include/cublasLt.h")]
    return [word for folder in found for word in ("-Xcompiler", f"-idirafter,{folder}")]


@contextmanager
def timed_products(folder: Path, card: str = "") -> Iterator[None]:
    """While it lasts, products of sizes that are new are timed on their first run.

    What was chosen is then written beside the library.

    Args:
        folder: has the library, which sessions of this process will load.
        card: which it is for. What this process timed on it, with the same library in another
            folder, is taken over; empty: nothing is.

    Raises:
        EngineError: the library cannot be loaded, or the file not be written.
    """
    file = folder / PRODUCTS
    key = (card, hashlib.sha256((folder / LIBRARY).read_bytes()).digest())
    if card and key in _timed:
        file.write_bytes(_timed[key])  # before the library is loaded, which reads it then
    try:
        library = ctypes.CDLL(str(folder / LIBRARY))
    except OSError as error:
        raise EngineError(f"ort-cuda: the compiled operators cannot be loaded: {error}") from None
    library.regraft_tune(1)
    try:
        yield
    finally:
        library.regraft_tune(0)
    if library.regraft_save(os.fsencode(file)) < 0:
        raise EngineError(f"ort-cuda: {file} cannot be written; is the disk full?")
    if card:
        _timed[key] = file.read_bytes()


def _run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    # Where the root of a container is read-only, there is no other place to write. By its short
    # name, since nvcc's tools take a comma in a path for its end.
    environment = {**os.environ, "TMPDIR": "."}
    try:
        return subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=environment,
            cwd=folder,
        )
    except OSError as error:
        raise EngineError(f"ort-cuda: {words[0]} cannot be run ({error.strerror})") from None


def find_nvcc() -> str | None:
    """Where nvcc is: ``NVCC``, the search path, or the toolkit of ``CUDA_HOME``; None: nowhere."""
    if own := os.environ.get("NVCC"):
        return str(Path(own).absolute()) if os.sep in own else own  # it is run from another folder
    if found := shutil.which("nvcc"):
        return found
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (nvcc := Path(home) / "bin" / "nvcc").exists():
            return str(nvcc)
    return None
