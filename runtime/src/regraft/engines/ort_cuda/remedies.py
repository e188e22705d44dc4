"""Why the engine ``ort-cuda`` cannot run here, or failed, and what to do about it."""

from __future__ import annotations

import importlib

from regraft.engines.cuda_runtime import Cuda
from regraft.engines.ort_cuda.runner import NO_MEMORY
from regraft.engines.ort_cuda.session import PROVIDER
from regraft.errors import EngineError, how_to_install

LIBRARIES = "'onnxruntime-gpu[cuda,cudnn]'"
_INSTALL = (
    f"{how_to_install('regraft-runtime', 'cuda')}; where CUDA or cuDNN are not installed, also "
    f"{LIBRARIES}"
)
# What a message of ONNX Runtime or CUDA says -> what to do. The first that fits counts.
_REMEDIES = (
    (
        ("fallback to CPU EP", "assigned to the default CPU EP"),
        "some nodes have no CUDA kernel and would run on the CPU; use ort-cpu or tensorrt, or "
        "export again with this version, which writes a graph for CUDA",
    ),
    (
        NO_MEMORY,
        "the card has too little free memory; free some, or run smaller batches",
    ),
    (
        ("unspecified launch failure", "illegal memory access", "device is lost", "ECC error"),
        "the card was lost; restart the process",
    ),
)


def what_is_missing(engine: str) -> str | None:
    """What is missing of packages, driver and card, and how to mend it; None if nothing is.

    Args:
        engine: the engine's name.
    """
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        reason = "is not installed" if missing else f"cannot be imported ({error})"
        return f"onnxruntime-gpu {reason}; {_INSTALL}"
    if PROVIDER not in ort.get_available_providers():
        return (
            "the onnxruntime that is installed is the one for CPUs; "
            f"pip uninstall onnxruntime, then {_INSTALL}"
        )
    try:
        importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        reason = "is not installed" if missing else f"cannot be loaded ({error})"
        return f"cuda-bindings {reason}; {_INSTALL}"
    try:
        Cuda(engine=engine).card()
    except EngineError as error:
        return str(error).removeprefix(f"{engine}: ")
    return None


def remedy(text: str) -> str | None:
    """What to do about an error of ONNX Runtime or CUDA; None where nothing is known.

    Args:
        text: of its message.
    """
    for signs, advice in _REMEDIES:
        if any(sign.lower() in text.lower() for sign in signs):
            return advice
    return None
