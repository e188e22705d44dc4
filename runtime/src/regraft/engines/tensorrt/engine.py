"""The engine ``tensorrt``: builds plans, and runs those of the engine cache.

A plan is machine code: :meth:`TensorrtEngine._open` takes the folder that
:mod:`regraft.engine_cache` has checked, or that a build wrote a moment ago, and nothing else.

Building is tested by compiling. Running was never tried on a card where this was written: the tests
put a fake CUDA runtime and a fake engine in its place. `make test-gpu` runs it where there is one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from regraft import engine_cache
from regraft.engine_key import CacheKey
from regraft.engines.base import Engine
from regraft.engines.cores import usable_cores
from regraft.engines.cuda_runtime import Cuda
from regraft.engines.options import (
    BuildOption,
    BuildOptions,
    BuildProgress,
    EngineOptions,
    Shape,
)
from regraft.engines.tensorrt.builder import BuilderOptions, build
from regraft.engines.tensorrt.inspect import look_at_engine
from regraft.engines.tensorrt.listeners import failure, logger
from regraft.engines.tensorrt.runner import Runner
from regraft.errors import EngineError, how_to_install
from regraft.manifest import INPUT

PLAN, TIMING = "model.plan", "timing.cache"
_PACKAGES = {"tensorrt": "tensorrt", "cuda.bindings.runtime": "cuda-bindings"}
_INSTALL = how_to_install("regraft-runtime", "tensorrt")
_ATTENTION = ("any", "fused")
Result = TypeVar("Result")


class TensorrtEngine(Engine):
    """Runs a plan with ``tensorrt`` and ``cuda-bindings``, without PyTorch."""

    name = "tensorrt"
    is_built = True
    has_clock = True
    build_options = (
        BuildOption("min-batch", BuilderOptions.min_batch, "smallest batch", least=1),
        BuildOption("opt-batch", BuilderOptions.opt_batch, "the batch it is tuned for", least=1),
        BuildOption("max-batch", BuilderOptions.max_batch, "largest batch; sizes memory", least=1),
        BuildOption("level", BuilderOptions.level, "0 builds fast, 5 gives the fastest engine"),
        BuildOption("workspace-mib", 0, "limit on scratch memory; 0 for none"),
        BuildOption(
            "attention",
            "any",
            "fused fails where an Attention node has no fused kernel",
            choices=_ATTENTION,
        ),
    )
    _runner: Runner | None = None
    _engine: Any = None

    @classmethod
    def unavailable(cls, precision: str) -> str | None:
        """Why it cannot run here: a package, the driver or the card is missing."""
        for module, package in _PACKAGES.items():
            if reason := _missing(module):
                return f"{package} {reason}; {_INSTALL}"
        try:
            Cuda().card()
        except EngineError as error:
            return str(error).removeprefix(f"{cls.name}: ")
        return None

    @classmethod
    def environment(cls) -> tuple[str, str]:
        """Version of TensorRT; name, compute capability and driver of the card."""
        import tensorrt as trt

        return str(trt.__version__), str(Cuda().card())

    @classmethod
    def check_build(cls, precision: str, options: BuildOptions) -> None:
        """Refuses batches out of order and a level that TensorRT does not have."""
        _options(options)

    @classmethod
    def build(
        cls,
        graph: Path,
        precision: str,
        options: BuildOptions,
        folder: Path,
        progress: BuildProgress,
    ) -> dict[str, Any]:
        """Compiles a graph; see :meth:`regraft.engines.Engine.build`.

        Returns:
            ``network``: what the parser made of the graph; ``engine``: what the inspector says of
            the plan.
        """
        key = _timing_key(cls.environment())
        known = engine_cache.latest(key, graph)
        timing = b"" if known is None else (known.folder / TIMING).read_bytes()
        with cls._failures(f"cannot build {graph.name}"):
            plan = build(graph, _options(options), progress, timing)
            (folder / PLAN).write_bytes(plan.data)
            if plan.timing_cache:
                with engine_cache.new_entry(key, graph) as draft:
                    (draft.folder / TIMING).write_bytes(plan.timing_cache)
            kernels = look_at_engine(_deserialise(plan.data, graph.name))
        return {"network": plan.network.to_json(), "engine": kernels.to_json()}

    def _open(
        self, graph: Path, options: EngineOptions
    ) -> tuple[tuple[int, int], dict[str, Shape]]:
        import tensorrt as trt

        if self.built is None:
            raise EngineError(
                f"tensorrt: {graph.name} was not built here; run: regraft build {graph.parent} "
                "--engine tensorrt --images DIR"
            )
        self._engine = _deserialise((self.built / PLAN).read_bytes(), graph.name)
        threads = options.threads or usable_cores()
        self._runner = Runner(self._engine, trt, Cuda(), options.optimize, threads)
        inner = self._runner.inner
        outputs: dict[str, Shape] = {
            name: ("batch", *shape) for name, shape in inner.items() if name != INPUT
        }
        _, height, width = inner[INPUT]
        return (height, width), outputs

    def _run(
        self, pixels: NDArray[np.float32], outputs: Sequence[str]
    ) -> Sequence[NDArray[np.float32]]:
        return self._logged(lambda runner: runner.run(pixels, outputs))

    def _device_seconds(self, batch: int, runs: int) -> float:
        return self._logged(lambda runner: runner.device_seconds(batch, runs))

    def _logged(self, work: Callable[[Runner], Result]) -> Result:
        if self._runner is None:
            raise EngineError("tensorrt: is closed; open it again")
        with logger().collecting() as errors:
            try:
                return work(self._runner)
            except EngineError as error:
                # TensorRT's own functions say no more than False; its log says why.
                if not errors:
                    raise
                raise failure(str(error).removeprefix("tensorrt: "), errors) from error

    def details(self) -> dict[str, str]:
        """TensorRT's version, the card, the batches executed and whether as CUDA graphs."""
        version, card = self.environment()
        runner = self._runner
        return {
            "tensorrt": version,
            "device": card,
            "batches": "" if runner is None else ",".join(map(str, runner.sizes)),
            "cuda graphs": "yes" if runner is not None and runner.graphs else "no",
        }

    def _close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._runner = self._engine = None


def _missing(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library that cannot be loaded
        # A broken installation fails with an ImportError too, and then says more.
        broken = not isinstance(error, ModuleNotFoundError)
        return f"cannot be imported ({error})" if broken else "is not installed"
    return None


def _options(options: BuildOptions) -> BuilderOptions:
    return BuilderOptions(
        min_batch=int(options["min-batch"]),
        opt_batch=int(options["opt-batch"]),
        max_batch=int(options["max-batch"]),
        level=int(options["level"]),
        workspace_mib=int(options["workspace-mib"]),
        fused_attention_only=options["attention"] == "fused",
    )


def _timing_key(environment: tuple[str, str]) -> CacheKey:
    # In the engine cache like a plan and as well guarded: it holds compiled kernels, too.
    version, device = environment
    return CacheKey("tensorrt-timing", version, device, "any", "", None)


def _deserialise(data: bytes, graph: str) -> Any:
    import tensorrt as trt

    with logger().collecting() as errors:
        engine = trt.Runtime(logger()).deserialize_cuda_engine(data)
    if engine is None:
        raise failure(f"the plan of {graph} cannot be opened; build it again", errors)
    return engine
