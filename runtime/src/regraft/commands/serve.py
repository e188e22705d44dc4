"""Serves bundles over the Open Inference Protocol (KServe v2, Triton's clients), over HTTP
and gRPC.

Every NAME is served twice: as NAME, which takes preprocessed pixel_values (FP32), and as
NAME_images, which takes images: encoded files (BYTES [N, 1]) or raw RGB (UINT8 [N, H, W, 3]). NAME
is the folder's name unless it is given. The same NAME again is its next version, from 1; a folder
of bundles with numbers for names is all its versions.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

from regraft.cli.options import add_engine, at_least, duration, thread_count
from regraft.errors import InputError, UsageError, how_to_install
from regraft.serve.settings import MIB, Batching, EngineChoice, Limits, Settings

KEY_VARIABLE = "REGRAFT_SERVE_KEY"
HOST_VARIABLE = "REGRAFT_HOST"  # of containers, where 127.0.0.1 is reached from inside alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "bundles", metavar="[NAME=]BUNDLE", nargs="+", help="folder that `regraft export` wrote"
    )
    parser.add_argument(
        "--host",
        default=os.environ.get(HOST_VARIABLE) or Settings().host,
        help=f"address to listen on (default: {HOST_VARIABLE} in the environment, or 127.0.0.1)",
    )
    parser.add_argument(
        "--port", type=_port, default=8000, help="of HTTP; 0 takes a free one (default: 8000)"
    )
    parser.add_argument(
        "--grpc-port", type=_port, metavar="PORT", help="of gRPC; 0 takes a free one (default: off)"
    )
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        help="holds the key that clients must present, as Authorization: Bearer KEY; or "
        f"{KEY_VARIABLE} in the environment (default: none)",
    )
    parser.add_argument(
        "--model-control", action="store_true", help="let clients load and unload models"
    )
    parser.add_argument(
        "--log-requests", action="store_true", help="one JSON line a request on stdout"
    )
    parser.add_argument(
        "--no-ui",
        action="store_true",
        help="no page at /, where one sees an image's maps before and after the patch",
    )
    add_engine(parser)
    _add_batching(parser)
    _add_limits(parser)


def _add_batching(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("batching")
    default = Batching()
    group.add_argument(
        "--max-batch",
        type=at_least(1),
        default=default.max_batch,
        metavar="N",
        help="images in one request (default: %(default)s)",
    )
    group.add_argument(
        "--preferred-batch",
        type=at_least(1),
        metavar="N",
        help="images in one run of several requests, at most --max-batch "
        "(default: what the engine prefers, 8 for ort-cpu, else --max-batch)",
    )
    group.add_argument(
        "--max-delay",
        type=duration,
        default=default.max_delay * 1e3,
        metavar="MS",
        help="milliseconds to hold a request back for others to join it (default: %(default)g)",
    )
    group.add_argument(
        "--max-queue",
        type=at_least(1),
        default=default.max_queue,
        metavar="N",
        help="images waiting, of one model; more are answered 503 (default: %(default)s)",
    )
    group.add_argument(
        "--queue-timeout",
        type=duration,
        default=default.timeout,
        metavar="S",
        help="seconds a request may wait for the engine (default: %(default)g)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits and end")
    limits, settings = Limits(), Settings()
    group.add_argument(
        "--max-body",
        type=at_least(1),
        default=limits.body // MIB,
        metavar="MIB",
        help="of one request, decompressed (default: %(default)s)",
    )
    group.add_argument(
        "--max-pixels",
        type=at_least(1),
        default=limits.pixels,
        metavar="N",
        help="of one image (default: %(default)s)",
    )
    group.add_argument(
        "--workers",
        type=thread_count,
        default=settings.workers,
        metavar="N",
        help="threads that decode images (default: one a core)",
    )
    group.add_argument(
        "--drain-delay",
        type=duration,
        default=settings.drain_delay,
        metavar="S",
        help="seconds from losing readiness to closing the listeners (default: %(default)g)",
    )
    group.add_argument(
        "--drain-timeout",
        type=duration,
        default=settings.drain_timeout,
        metavar="S",
        help="seconds that accepted requests then have (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Serves until a signal ends it."""
    if importlib.util.find_spec("uvicorn") is None:
        raise InputError(f"uvicorn is not installed; {how_to_install('regraft-runtime', 'serve')}")
    if args.grpc_port is not None:
        _expect_grpc()
    if args.max_queue < args.max_batch:
        raise UsageError(
            f"--max-queue is {args.max_queue}; expected at least --max-batch, {args.max_batch}"
        )
    if (args.preferred_batch or 1) > args.max_batch:
        raise UsageError(
            f"--preferred-batch is {args.preferred_batch}; expected at most --max-batch, "
            f"{args.max_batch}"
        )
    from regraft.serve import lifecycle

    lifecycle.run(args.bundles, _settings(args))
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(
        host=args.host,
        port=args.port,
        grpc_port=args.grpc_port,
        key=_key(args.key_file),
        model_control=args.model_control,
        log_requests=args.log_requests,
        ui=not args.no_ui,
        drain_delay=args.drain_delay,
        drain_timeout=args.drain_timeout,
        workers=args.workers,
        engine=EngineChoice(args.engine, args.threads, args.precision),
        batching=Batching(
            args.max_batch,
            args.max_delay / 1e3,
            args.max_queue,
            args.queue_timeout,
            args.preferred_batch,
        ),
        limits=Limits(body=args.max_body * MIB, pixels=args.max_pixels),
    )


def _expect_grpc() -> None:
    for name in ("grpc", "google.protobuf"):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # google itself
            found = None
        if found is None:
            raise InputError(
                f"--grpc-port needs {name}, which is not installed; "
                f"{how_to_install('regraft-runtime', 'grpc')}"
            )


def _key(file: str | None) -> str | None:
    if file is None:
        key, origin = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
        if key is None:
            return None
    else:
        origin = file
        try:
            key = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise InputError(
                f"{file}: cannot be read ({reason}); expected a file with a key"
            ) from None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{origin}: holds no key; expected printable ASCII without spaces")
    return key


def _port(text: str) -> int:
    port = at_least(0)(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return port
