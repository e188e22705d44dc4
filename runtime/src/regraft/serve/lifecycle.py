"""Starting a server, and ending it so that every accepted request is answered.

The listeners open first (alive, not ready), then the models load. On SIGTERM or SIGINT readiness
goes at once, so that balancers send their requests elsewhere; after the drain delay the listeners
close; what was accepted is answered; the process ends with 0. A second signal does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import uvicorn

from regraft.errors import InputError
from regraft.serve.http_app import Application
from regraft.serve.http_protocol import protocol
from regraft.serve.page.routes import Page
from regraft.serve.repository import Repository
from regraft.serve.request_log import RequestLog
from regraft.serve.service import Service
from regraft.serve.settings import Settings

if TYPE_CHECKING:
    from regraft.serve.grpc.server import GrpcServer

_log = logging.getLogger("regraft.serve")


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to :func:`serve`; uvicorn would end by the signal, not with 0.

    And closes no listener before what waits in its queue is taken: those clients are connected
    already, as far as they can see.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections, and returns once requests are answered."""
        queued = [connection for listener in sockets or [] for connection in _queued(listener)]
        for server in self.servers:  # at once: who connects in between is cut off
            server.close()
        loop = asyncio.get_running_loop()
        for connection in queued:
            try:
                await loop.connect_accepted_socket(self._connection, connection)
            except OSError:  # the client has gone
                connection.close()
        await super().shutdown(sockets)

    def _connection(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        made: asyncio.Protocol = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made


def run(arguments: Sequence[str], settings: Settings) -> None:
    """Serves until a signal ends it.

    Args:
        arguments: BUNDLE or NAME=BUNDLE each.
        settings: everything else.

    Raises:
        InputError: an argument is wrong, or an address cannot be listened on.
        RegraftError: a bundle or its engine cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(settings.host, settings.port))
        pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="regraft-decode")
        stack.callback(pool.shutdown, cancel_futures=True)
        log = stack.enter_context(RequestLog()) if settings.log_requests else None
        asyncio.run(_serve(arguments, settings, pool, listener, log))


async def _serve(
    arguments: Sequence[str],
    settings: Settings,
    pool: ThreadPoolExecutor,
    listener: socket.socket,
    log: RequestLog | None,
) -> None:
    stop = _Stop()
    repository = Repository(arguments, settings, pool)
    service = Service(repository, settings)
    application = Application(service, log)
    page = Page(service, application) if settings.ui else None
    config = uvicorn.Config(
        application,
        http=protocol(settings.limits.header_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        loop="none",
        timeout_keep_alive=math.ceil(settings.limits.header_seconds),
        timeout_graceful_shutdown=max(1, math.ceil(settings.drain_timeout)),
    )
    server = _Uvicorn(config)
    grpc = await _start_grpc(service, settings, log)
    http = asyncio.create_task(server.serve([listener]))
    try:
        loading = asyncio.create_task(repository.load_all())
        await _first(loading, stop.wait(), http)
        if loading.done():
            loading.result()
            _announce(repository, listener, grpc)
            await _first(stop.wait(), http)
        else:
            loading.cancel()
        service.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.again(), settings.drain_delay)
    finally:
        service.draining = True
        server.should_exit = True
        ends = [http]
        if grpc is not None:
            ends.append(asyncio.create_task(grpc.stop(settings.drain_timeout)))
        forced = asyncio.create_task(stop.again())
        await _first(asyncio.wait(ends), forced)
        server.force_exit = True
        if grpc is not None and forced.done():
            await grpc.abort()
        forced.cancel()
        await asyncio.gather(*ends)
        if page is not None:
            await page.close()
        await repository.close()


class _Stop:
    """Counts the signals that ask the server to end."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            # Ctrl-C that somebody switched off (nohup, a shell's background job) stays off.
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._signal)

    async def wait(self) -> None:
        """Returns at the first signal."""
        while self._count < 1:
            await self._changed.wait()

    async def again(self) -> None:
        """Returns at the second one."""
        while self._count < 2:
            self._changed.clear()
            await self._changed.wait()

    def _signal(self) -> None:
        self._count += 1
        self._changed.set()


def _queued(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that wait to be accepted, as far as they can be had."""
    while True:
        try:
            yield listener.accept()[0]
        except ConnectionAbortedError:  # the client has gone
            continue
        except BlockingIOError:
            return
        except OSError as error:  # too many open files, as a rule
            _log.warning("connections that wait cannot be taken (%s)", error.strerror or error)
            return


async def _first(*waits: object) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]  # type: ignore[call-overload]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _listen(host: str, port: int, option: str = "--port") -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listener = socket.create_server(found[0][4][:2], family=found[0][0], backlog=2048)
        # Connections inherit it. asyncio leaves sockets that it has not made as they are, and an
        # answer's second part would wait 40 ms for the client to acknowledge the first.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot listen on {host}:{port} ({reason}); choose others with --host and {option}"
        ) from None
    return listener


async def _start_grpc(
    service: Service, settings: Settings, log: RequestLog | None
) -> GrpcServer | None:
    if settings.grpc_port is None:
        return None
    # What gRPC's core logs is for its developers; it would stand beside our own messages.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from regraft.serve.grpc.server import GrpcServer

    # gRPC does not say why it cannot listen, so the same is tried without it first.
    with _listen(settings.host, settings.grpc_port, "--grpc-port") as tried:
        host, port = tried.getsockname()[:2]
    server = await GrpcServer.start(service, f"{_in_url(host)}:{port}", log)
    if server is None:
        raise InputError(
            f"cannot listen on {settings.host}:{port} (gRPC); choose others with --host and "
            "--grpc-port"
        )
    return server


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _announce(repository: Repository, listener: socket.socket, grpc: GrpcServer | None) -> None:
    host, port = listener.getsockname()[:2]
    shown = _in_url(host)
    names = ", ".join(
        f"{name} ({model.version}, {model.engine.name})" for name, model in repository.loaded()
    )
    places = f"http://{shown}:{port}"
    if grpc is not None:
        places += f" and grpc://{shown}:{grpc.port}"
    print(f"regraft: serving {names} on {places}", file=sys.stderr, flush=True)
