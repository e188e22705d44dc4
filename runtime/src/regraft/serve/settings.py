"""How a server behaves: limits, batching, where it listens."""

from __future__ import annotations

from dataclasses import dataclass, field

from regraft.pipeline import default_workers

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Attributes:
        body: bytes of one request, also after decompression.
        json: bytes of its JSON, which takes twenty times as much memory once parsed.
        bodies: bytes of all requests that are being read or answered; more are told to come back.
        body_seconds: how long a client may take to send a request.
        header_seconds: how long a connection may stay without a whole request header.
        pixels: of one encoded or raw image.
    """

    body: int = 64 * MIB
    json: int = 16 * MIB
    bodies: int = 512 * MIB
    body_seconds: float = 60.0
    header_seconds: float = 20.0
    pixels: int = 50_000_000


@dataclass(frozen=True)
class Batching:
    """How requests share runs of the engine.

    Attributes:
        max_batch: images in one request, and in one run.
        preferred_batch: images in one run of several requests; None for what the engine prefers.
        max_delay: seconds that the oldest waiting request may be held back for others to join it.
        max_queue: images that wait or are worked on, of one model; more are told to come back.
        timeout: seconds a request may wait for the engine; its own ``timeout`` can only shorten it.
    """

    max_batch: int = 32
    max_delay: float = 0.0
    max_queue: int = 256
    timeout: float = 60.0
    preferred_batch: int | None = None


@dataclass(frozen=True)
class EngineChoice:
    """Which engine executes the graphs, as the command line's ``--engine`` and so on."""

    name: str = "auto"
    threads: int | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Settings:
    """Everything but the models.

    Attributes:
        host: address to listen on.
        port: of HTTP; 0 takes a free one.
        grpc_port: of gRPC, likewise; None for no gRPC.
        key: what clients must present; None lets everybody in.
        model_control: whether clients may load and unload models.
        log_requests: one JSON line a request on stdout.
        ui: whether there is a page at ``/``.
        drain_delay: seconds between readiness going and the listeners closing.
        drain_timeout: seconds that accepted requests have to be answered after that.
        workers: threads that decode images.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    key: str | None = field(default=None, repr=False)
    model_control: bool = False
    log_requests: bool = False
    ui: bool = True
    drain_delay: float = 1.0
    drain_timeout: float = 30.0
    workers: int = field(default_factory=default_workers)
    engine: EngineChoice = field(default_factory=EngineChoice)
    batching: Batching = field(default_factory=Batching)
    limits: Limits = field(default_factory=Limits)
