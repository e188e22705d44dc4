"""Runs in a process of its own that sees the rig: answers requests, one JSON object a line.

The answers leave through a descriptor of their own, because the libraries print on stdout.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import tensorrt as trt

from regraft.engines.tensorrt import builder
from regraft.engines.tensorrt.builder import BuilderOptions
from regraft.engines.tensorrt.engine import TensorrtEngine, _deserialise
from regraft.engines.tensorrt.listeners import logger
from regraft.errors import RegraftError

SEEN: list[str] = []


class Remember(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        SEEN.append(f"{record.levelname}: {record.getMessage()}")


def build(graph: str, timing: bool = False, **options: Any) -> dict[str, Any]:
    """Compiles; with ``timing`` a second time, with the timing cache of the first."""
    steps: list[tuple[str, int, int | None]] = []
    chosen = BuilderOptions(**options)
    plan = builder.build(Path(graph), chosen, lambda *step: steps.append(step))
    if timing:
        builder.build(Path(graph), chosen, lambda *step: None, plan.timing_cache)
    return {
        "bytes": len(plan.data),
        "timing": len(plan.timing_cache),
        "network": plan.network.to_json(),
        "steps": steps,
    }


def configure(graph: str, **options: Any) -> dict[str, Any]:
    """What the builder would be told, read back from TensorRT's own objects."""
    chosen = BuilderOptions(**options)
    parsed = builder.parse(Path(graph))
    config = builder.configure(parsed, chosen)
    shapes = builder.profile_of(parsed, chosen).get_shape("pixel_values")
    flags = [f for f in trt.BuilderFlag.__members__.values() if config.get_flag(f)]
    return {
        "profiles": config.num_optimization_profiles,
        "shapes": [list(shape) for shape in shapes],
        "flags": [flag.name for flag in flags],
        "level": config.builder_optimization_level,
        "workspace": config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
        "verbosity": config.profiling_verbosity.name,
        "inputs": _tensors(parsed.network, "input"),
        "outputs": _tensors(parsed.network, "output"),
        "decomposable": builder.allow_decomposition(parsed.network),
    }


def refused_profile(graph: str) -> dict[str, Any]:
    """Batches that our own check would have refused, handed to TensorRT all the same."""
    chosen = BuilderOptions()
    object.__setattr__(chosen, "max_batch", 2)
    builder.configure(builder.parse(Path(graph)), chosen)
    return {}


def network_flags(graph: str) -> dict[str, Any]:
    """The flags a network is created with, where strong typing is a flag and where it is not."""
    seen: list[int] = []

    class Spy(trt.Builder):
        def create_network(self, flags: int) -> Any:
            seen.append(flags)
            return super().create_network(flags)

    with mock.patch.object(trt, "Builder", Spy):
        builder.parse(Path(graph))
        with mock.patch.object(trt, "NetworkDefinitionCreationFlag", object()):
            builder.parse(Path(graph))
    return {"seen": seen, "flag": int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)}


def _tensors(network: Any, kind: str) -> dict[str, Any]:
    tensors = [getattr(network, f"get_{kind}")(i) for i in range(getattr(network, f"num_{kind}s"))]
    return {t.name: [t.dtype.name, list(t.shape)] for t in tensors}


def interrupted(graph: str) -> dict[str, Any]:
    """A build whose progress callback is interrupted at its third call."""
    calls: list[int] = []

    def progress(phase: str, done: int, total: int | None) -> None:
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt

    try:
        builder.build(Path(graph), BuilderOptions(), progress)
    except KeyboardInterrupt:
        return {"calls": len(calls)}
    return {"calls": -1}


def log(severity: str, text: str) -> dict[str, Any]:
    """What TensorRT's logger does with a message."""
    with logger().collecting() as errors:
        logger().log(trt.ILogger.Severity.__members__[severity], text)  # type: ignore[attr-defined]
    logger().log(trt.ILogger.Severity.ERROR, "afterwards")  # type: ignore[attr-defined]
    return {"seen": [line for line in SEEN if text in line], "errors": errors}


def open_plan(graph: str) -> dict[str, Any]:
    """Opens what was built, which only a card can."""
    plan = builder.build(Path(graph), BuilderOptions(level=0), lambda *step: None)
    _deserialise(plan.data, Path(graph).name)
    return {}


def unavailable() -> dict[str, Any]:
    """Why the engine cannot run here, and what the rig says it is."""
    return {"reason": TensorrtEngine.unavailable("fp32"), "version": trt.__version__}


TASKS = (build, configure, refused_profile, network_flags, interrupted, log, open_plan, unavailable)


def main() -> None:
    logging.getLogger("regraft.tensorrt").setLevel(1)
    logging.getLogger("regraft.tensorrt").addHandler(Remember())
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    tasks = {task.__name__: task for task in TASKS}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = tasks[request.pop("task")](**request)
        except RegraftError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
