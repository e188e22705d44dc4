"""ONNX graph -> plan, one code path for TensorRT 10.13 to 11.x.

Precision is the graph's: networks are strongly typed, no precision flag is ever set, and TF32,
which TensorRT allows by default, is off. What differs between versions is found by looking for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.engines.options import BuildProgress
from regraft.engines.tensorrt.inspect import Network, look_at_network
from regraft.engines.tensorrt.listeners import DONE, failure, logger, monitor
from regraft.errors import EngineError, UsageError
from regraft.manifest import INPUT

LEVELS = range(6)


@dataclass(frozen=True)
class BuilderOptions:
    """How to compile.

    Attributes:
        min_batch: smallest batch the plan accepts.
        opt_batch: the batch it is tuned for.
        max_batch: largest batch it accepts; its buffers are that large.
        level: TensorRT's builder optimisation level, 0 (fast build) to 5 (fast engine).
        workspace_mib: limit on scratch memory; 0 for all that the card has.
        fused_attention_only: fail where TensorRT has no fused kernel for an ``Attention`` node,
            instead of letting it take several kernels.
    """

    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 64
    level: int = 3
    workspace_mib: int = 0
    fused_attention_only: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise UsageError(
                f"tensorrt: the batches are min {self.min_batch}, opt {self.opt_batch}, "
                f"max {self.max_batch}; expected 1 <= min <= opt <= max"
            )
        if self.level not in LEVELS:
            raise UsageError(f"tensorrt: level is {self.level}; expected 0 to {LEVELS[-1]}")
        if self.workspace_mib < 0:
            raise UsageError(f"tensorrt: workspace-mib is {self.workspace_mib}; expected 0 or more")


@dataclass(frozen=True)
class Plan:
    """What a build gave.

    Attributes:
        data: the plan, which only this version of TensorRT on this card can run.
        timing_cache: shortens the next build with the same version and card; may be empty.
        network: what the parser made of the graph.
    """

    data: bytes
    timing_cache: bytes
    network: Network


@dataclass(frozen=True)
class Parsed:
    """A parsed graph. The network's weights lie in the parser, so all three live together."""

    builder: Any
    network: Any
    parser: Any


def build(
    graph: Path,
    options: BuilderOptions,
    progress: BuildProgress,
    timing_cache: bytes = b"",
) -> Plan:
    """Compiles a graph for the card of this machine.

    Args:
        graph: the ONNX file, its external data beside it.
        options: how.
        progress: is told how far it is.
        timing_cache: of an earlier build; one of another version or card is left aside.

    Raises:
        EngineError: TensorRT refuses the graph, naming the node, or cannot compile it.
    """
    parsed = parse(graph)
    if not options.fused_attention_only:
        allow_decomposition(parsed.network)
    network = look_at_network(parsed.network)
    config = configure(parsed, options, timing_cache)
    watching = monitor(progress)
    config.progress_monitor = watching
    with logger().collecting() as errors:
        data = parsed.builder.build_serialized_network(parsed.network, config)
    config.progress_monitor = None
    if watching.stopped_by is not None:
        raise watching.stopped_by
    if data is None:
        raise failure(f"{graph.name} cannot be compiled", errors)
    progress(*DONE)  # phases may end before their last step
    cache = config.get_timing_cache()
    return Plan(bytes(data), b"" if cache is None else bytes(cache.serialize()), network)


def parse(graph: Path) -> Parsed:
    """Reads a graph and checks that its input and outputs are what the runner can feed.

    Raises:
        EngineError: the parser refuses it; all its errors are named, with their nodes.
    """
    import tensorrt as trt

    flags = 0
    # Mandatory for 10.x, where networks are weakly typed by default; without effect in 11.
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    log = logger()
    with log.collecting() as errors:
        builder = trt.Builder(log)
        network = builder.create_network(flags) if builder else None
        if network is None:
            raise failure("cannot start its builder", errors)
        parser = trt.OnnxParser(network, log)
        # By path and not from memory: external data is looked for beside the file.
        accepted = parser.parse_from_file(str(graph))
    if not accepted:
        refused = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise failure(f"{graph.name} is refused by the parser", refused or errors)
    _check_tensors(graph.name, network, trt)
    return Parsed(builder, network, parser)


def _parser_error(error: Any) -> str:
    node = f"node {error.node_name()!r}" if error.node_name() else ""
    kind = f"({error.node_operator()})" if error.node_operator() else ""
    where = " ".join(part for part in (node, kind) if part)
    return f"{where}: {error.desc()}" if where else str(error.desc())


def _check_tensors(graph: str, network: Any, trt: Any) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    if [tensor.name for tensor in inputs] != [INPUT]:
        names = ", ".join(tensor.name for tensor in inputs) or "nothing"
        raise EngineError(f"tensorrt: {graph} takes {names}; expected one input {INPUT}")
    for tensor in (*inputs, *outputs):
        shape = tuple(tensor.shape)
        free = [axis for axis, length in enumerate(shape) if length < 0]
        if tensor.dtype != trt.float32 or free != [0]:
            raise EngineError(
                f"tensorrt: {tensor.name} of {graph} is {tensor.dtype.name} of shape {shape}; "
                "expected FLOAT with a free batch and no other free axis; export again"
            )


def allow_decomposition(network: Any) -> int:
    """Lets TensorRT compute ``Attention`` nodes with several kernels; returns how many there are.

    By default it fails on a node for which it has no fused kernel, for example in fp32. Where it
    has one it still takes it.
    """
    import tensorrt as trt

    count = 0
    for layer in attention_layers(network):
        # The bindings hand every layer out as ILayer; the cast is what its Python API offers.
        layer.__class__ = trt.IAttentionInputLayer
        layer.attention.decomposable = True
        count += 1
    return count


def attention_layers(network: Any) -> Iterator[Any]:
    """The layers that stand for ``Attention`` nodes (opset 23); none where TensorRT lacks them."""
    import tensorrt as trt

    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if kind is not None and layer.type == kind:
            yield layer


def profile_of(parsed: Parsed, options: BuilderOptions) -> Any:
    """The one optimisation profile: the batch from min to max, everything else as it is."""
    profile = parsed.builder.create_optimization_profile()
    rest = tuple(parsed.network.get_input(0).shape)[1:]
    batches = (options.min_batch, options.opt_batch, options.max_batch)
    profile.set_shape(INPUT, *((batch, *rest) for batch in batches))
    return profile


def configure(parsed: Parsed, options: BuilderOptions, timing_cache: bytes = b"") -> Any:
    """The builder's configuration.

    Raises:
        EngineError: TensorRT refuses the profile.
    """
    import tensorrt as trt

    config = parsed.builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.builder_optimization_level = options.level
    # The inspector says nothing without; the runner turns its cost off again.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    with logger().collecting() as errors:
        profile = profile_of(parsed, options)
        # Both report failure by what they return; neither raises.
        if not profile or config.add_optimization_profile(profile) < 0:
            raise failure(f"the batches of {options} are refused", errors)
    _set_timing_cache(config, timing_cache)
    return config


def _set_timing_cache(config: Any, data: bytes) -> None:
    for content in (data, b""):  # what is refused is replaced by an empty one
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return
