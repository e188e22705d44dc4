"""How many actors a Ray cluster has room for, and what each of them books."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from regraft.engines import AUTO
from regraft.errors import InputError

_ON_GPU = ("ort-cuda", "tensorrt")
# An engine's actor books more than half of a node, so that no two share one; a decoding task books
# less than the rest of a node of one core. The threads of both share the cores. Ray fuses steps
# that book the same, hence the little less.
_ENGINE_SHARE, DECODING_CPUS, _LESS = 0.6, 0.4, 0.001


@dataclass(frozen=True)
class Plan:
    """Who is to work in a cluster.

    Attributes:
        engine: what actors open, by its name.
        actors: how many there are.
        slots: how many shards can be in work at once.
        booked: CPUs and GPUs of one actor.
    """

    engine: str
    actors: int
    slots: int
    booked: tuple[float, float]


def planned(nodes: Iterable[Mapping[str, Any]], engine: str, actors: int | None = None) -> Plan:
    """Shares a cluster out.

    Args:
        nodes: as ``ray.nodes()`` gives them.
        engine: by its name, or ``auto``.
        actors: how many; None for one per GPU, or one per node where the engine needs none.

    Raises:
        InputError: the cluster cannot run that.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [node["CPU"] for node in alive if node.get("CPU")]
    gpus = int(sum(node.get("GPU", 0) for node in alive))
    if not cpus:
        raise InputError("--ray: the cluster has no CPU to decode images on")
    if engine == AUTO:
        if gpus:
            raise InputError(
                f"--ray: the cluster has {gpus} GPUs; say with --engine what is to run "
                f"({', '.join(_ON_GPU)} or ort-cpu), because nodes might choose differently"
            )
        engine = "ort-cpu"
    on_gpu = engine in _ON_GPU
    if on_gpu and not gpus:
        raise InputError(f"--ray: {engine} needs a GPU, and the cluster has none")
    actors = actors or (gpus if on_gpu else len(cpus))
    if on_gpu and actors > gpus:
        raise InputError(f"--processes is {actors}, and the cluster has {gpus} GPUs")
    per_node = math.ceil(actors / len(cpus))
    share = _ENGINE_SHARE * min(cpus) / per_node - _LESS
    booked = (0.0, 1.0) if on_gpu else (share, 0.0)
    return Plan(engine, actors, max(actors, int(sum(cpus))), booked)
