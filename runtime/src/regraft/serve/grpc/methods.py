"""The calls but inference: each gives the fields of its response, as the JSON of HTTP has them.

Over HTTP there is no counterpart of the health check, which has its place in gRPC's own tools.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from regraft.serve.checks import clip
from regraft.serve.grpc.messages import HEALTH, SERVICE
from regraft.serve.refusals import Kind, Refusal
from regraft.serve.service import Service

Fields = Mapping[str, Any]


async def server_live(service: Service, request: Any) -> Fields:
    """It answers, so it lives."""
    return {"live": True}


async def server_ready(service: Service, request: Any) -> Fields:
    """Whether every model answers."""
    return {"ready": service.ready}


async def model_ready(service: Service, request: Any) -> Fields:
    """Whether a model answers; one that does not exist does not."""
    try:
        service.model_ready(request.name, request.version)
    except Refusal:
        return {"ready": False}
    return {"ready": True}


async def server_metadata(service: Service, request: Any) -> Fields:
    """Name, version, extensions."""
    return service.metadata()


async def model_metadata(service: Service, request: Any) -> Fields:
    """Inputs and outputs of a model."""
    return service.model_metadata(request.name, request.version)


async def model_config(service: Service, request: Any) -> Fields:
    """A model's configuration under Triton's names."""
    return {"config": service.model_config(request.name, request.version)}


async def model_statistics(service: Service, request: Any) -> Fields:
    """Statistics of one model, or of all."""
    return service.model_statistics(request.name, request.version)


async def repository_index(service: Service, request: Any) -> Fields:
    """Which models there are."""
    _expect_no_repository(request)
    return {"models": service.repository.index(request.ready)}


async def repository_load(service: Service, request: Any) -> Fields:
    """Opens a model anew."""
    _expect_no_repository(request)
    await service.load(request.model_name, request.parameters)
    return {}


async def repository_unload(service: Service, request: Any) -> Fields:
    """Stops serving a model."""
    _expect_no_repository(request)
    await service.unload(request.model_name)
    return {}


async def check_health(service: Service, request: Any) -> Fields:
    """Readiness, as gRPC's health checks ask for it: of no service, which is all, or of ours."""
    if request.service not in ("", SERVICE, HEALTH):
        raise Refusal(
            Kind.NOT_FOUND, f"unknown service '{clip(request.service)}'; expected '' or '{SERVICE}'"
        )
    return {"status": "SERVING" if service.ready else "NOT_SERVING"}


def _expect_no_repository(request: Any) -> None:
    if request.repository_name:
        raise Refusal(
            Kind.UNSUPPORTED,
            "repository_name is not supported: there is one repository, without a name",
        )


# Name of the call -> what answers it, and whether it is open to everybody.
METHODS: Mapping[str, tuple[Callable[[Service, Any], Awaitable[Fields]], bool]] = {
    "ServerLive": (server_live, True),
    "ServerReady": (server_ready, True),
    "ModelReady": (model_ready, True),
    "ServerMetadata": (server_metadata, False),
    "ModelMetadata": (model_metadata, False),
    "ModelConfig": (model_config, False),
    "ModelStatistics": (model_statistics, False),
    "RepositoryIndex": (repository_index, False),
    "RepositoryModelLoad": (repository_load, False),
    "RepositoryModelUnload": (repository_unload, False),
    "Check": (check_health, True),
}
