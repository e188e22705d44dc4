"""regraft's own CUDA operators: the library that graphs with ``.operators.cuda.onnx`` need.

They do in one kernel what ONNX Runtime needs several for (see ``operators.cu``). Their sources ship
with the package; ``regraft build --engine ort-cuda`` compiles them with nvcc and keeps the library
beside its verdict in the engine cache, so that what is loaded is what was verified.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from regraft.errors import EngineError

SUFFIX = ".operators.cuda.onnx"
LIBRARY = "libregraft_operators.so"
_SOURCES = Path(__file__).parent
# Ampere, and Hopper with its intermediate code, which later cards compile when they load it.
_CARDS = ("arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]")


def needs_operators(graph: Path) -> bool:
    """Whether a graph holds operators of regraft's own, by its name."""
    return graph.name.endswith(SUFFIX)


def compile_library(folder: Path) -> Path:
    """Compiles the operators into a folder; returns the library.

    Args:
        folder: gets :data:`LIBRARY`.

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
    library = folder / LIBRARY
    words = [nvcc, "-O3", "-std=c++17", "-shared", "-cudart", "static"]
    words += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    words += [word for card in _CARDS for word in ("-gencode", card)]
    words += [str(_SOURCES / "operators.cu"), "-o", str(library)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise EngineError(f"ort-cuda: {nvcc} cannot be run ({error.strerror})") from None
    if done.returncode != 0 or not library.exists():
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it says nothing"]
        raise EngineError(f"ort-cuda: {nvcc} failed to compile the CUDA operators: {said[0]}")
    return library


def find_nvcc() -> str | None:
    """Where nvcc is: ``NVCC``, the search path, or the toolkit of ``CUDA_HOME``; None: nowhere."""
    if own := os.environ.get("NVCC"):
        return own
    if found := shutil.which("nvcc"):
        return found
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (nvcc := Path(home) / "bin" / "nvcc").exists():
            return str(nvcc)
    return None
