"""A session of ONNX Runtime on the card, and what its graph takes and yields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.engines.options import EngineOptions, Shape
from regraft.errors import EngineError
from regraft.manifest import INPUT

PROVIDER = "CUDAExecutionProvider"


def open_session(
    ort: Any, graph: Path, stream: int, options: EngineOptions, library: Path | None
) -> Any:
    """Opens a graph with the CUDA provider and no other.

    Args:
        ort: the module ``onnxruntime``, whose libraries were loaded.
        graph: an ONNX file.
        stream: on which it computes, a ``cudaStream_t``.
        options: ``optimize``: with CUDA graphs.
        library: of regraft's own operators, if the graph has any.

    Returns:
        An ``InferenceSession``; without the provider, if its libraries could not be loaded.
    """
    settings = ort.SessionOptions()
    if library is not None:
        settings.register_custom_ops_library(str(library))
    settings.log_severity_level = 3  # errors; its warnings are about its own optimiser
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    provider = {
        "device_id": "0",
        "user_compute_stream": str(stream),
        "use_tf32": "0",  # it would not pass the gate of fp32
        "enable_cuda_graph": "1" if options.optimize else "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    # The fusion makes one Split of the cuts at the end, which copies tables to the card in every
    # run. enable_fallback: its Python layer would open the session on the CPU and only print so.
    return ort.InferenceSession(
        str(graph),
        settings,
        providers=[(PROVIDER, provider)],
        disabled_optimizers=["GatherSliceToSplitFusion"],
        enable_fallback=0,
    )


def ports(session: Any, graph: Path) -> tuple[tuple[int, int], dict[str, Shape]]:
    """Height and width of the input, and the shape of every output, with a free batch.

    Raises:
        EngineError: the graph takes something else, or an output has another free axis.
    """
    inputs = {port.name: port.shape for port in session.get_inputs()}
    shape = inputs.get(INPUT)
    if len(inputs) != 1 or shape is None or len(shape) != 4:
        raise EngineError(
            f"ort-cuda: {graph.name} takes {', '.join(inputs)}; expected one input {INPUT} "
            "of shape (batch, 3, H, W)"
        )
    outputs: dict[str, Shape] = {port.name: tuple(port.shape) for port in session.get_outputs()}
    free = [n for n, s in outputs.items() if not all(isinstance(length, int) for length in s[1:])]
    if free:
        raise EngineError(
            f"ort-cuda: {', '.join(free)} of {graph.name} has a free axis besides the batch; "
            "export again"
        )
    return (int(shape[2]), int(shape[3])), outputs
