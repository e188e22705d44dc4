"""The protocol's messages as classes, out of a descriptor pool of their own.

The process's default pool stays free of them: Triton's client registers messages of the same names
there, and protobuf ends a process that has two of a name.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"


def _read() -> Any:
    pool = descriptor_pool.DescriptorPool()
    for name in ("inference.binpb", "health.binpb"):
        compiled = resources.files(__package__).joinpath(name).read_bytes()
        for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
            pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL = _read()


def message(name: str) -> Any:
    """The class of a message of the package ``inference``."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))


def methods(service: str = SERVICE) -> dict[str, tuple[Any, Any]]:
    """Name of each call of a service -> classes of its request and its response."""
    return {
        method.name: (
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
        )
        for method in _POOL.FindServiceByName(service).methods
    }
