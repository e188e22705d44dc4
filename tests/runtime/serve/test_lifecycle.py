"""Start and end of a server: signals, the drain, and what does not start at all."""

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from tests.support.server import Server, serving, tensor

from regraft.commands.serve import HOST_VARIABLE
from regraft.serve import lifecycle
from regraft.serve.http_protocol import protocol

SIZE = 16
Regraft = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_with_0(pristine_bundle: Path, number: signal.Signals) -> None:
    with serving(pristine_bundle, "--drain-delay", 0) as server:
        assert server.stop(number) == 0
        time.sleep(0.1)
        assert not server.lines


@pytest.mark.parametrize("host", [None, "0.0.0.0"])
def test_the_environment_may_say_where_to_listen(pristine_bundle: Path, host: str | None) -> None:
    variables = {k: v for k, v in os.environ.items() if k != HOST_VARIABLE}
    env = variables if host is None else {**variables, HOST_VARIABLE: host}
    with serving(pristine_bundle, "--grpc-port", 0, env=env) as server:
        for port in (server.port, server.grpc_port):
            try:  # this machine as well, but not the address of the default
                socket.create_connection(("127.0.0.2", port), timeout=20).close()
                reached = True
            except ConnectionRefusedError:
                reached = False
            assert reached == (host is not None)
    option = ("--host", "127.0.0.1")  # is stronger
    with (
        serving(pristine_bundle, *option, env=env) as server,
        pytest.raises(ConnectionRefusedError),
    ):
        socket.create_connection(("127.0.0.2", server.port), timeout=20)


def test_connections_send_answers_at_once() -> None:
    with lifecycle._listen("127.0.0.1", 0) as listener:
        client = socket.create_connection(listener.getsockname()[:2])
        accepted, _ = listener.accept()
        with client, accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def _clients(server: Server, count: int) -> tuple[list[threading.Thread], list[str]]:
    """Clients, each request on a new connection; outcomes until nobody listens any more."""
    body = json.dumps({"inputs": [tensor(np.zeros((1, 3, SIZE, SIZE), np.float32))]})
    outcomes: list[str] = []

    def client() -> None:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            try:
                connection.connect()
            except OSError:
                return
            try:
                connection.request("POST", "/v2/models/small/infer", body)
                outcomes.append(str(connection.getresponse().status))
            except (OSError, http.client.HTTPException) as error:
                outcomes.append(type(error).__name__)
            finally:
                connection.close()

    threads = [threading.Thread(target=client) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, outcomes


def test_a_drain_answers_everything(pristine_bundle: Path) -> None:
    with serving(f"small={pristine_bundle}", "--drain-delay", 1) as server:
        threads, outcomes = _clients(server, 8)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.ask("GET", "/v2/health/live").status == 200
        ready = server.ask("GET", "/v2/health/ready")
        assert (ready.status, ready.headers["connection"]) == (503, "close")
        for thread in threads:
            thread.join(30)
        assert server.process.wait(30) == 0
    assert len(outcomes) > 20
    assert set(outcomes) == {"200"}


def test_connections_that_were_not_taken_yet_are_answered() -> None:
    listener = lifecycle._listen("127.0.0.1", 0)
    port = listener.getsockname()[1]

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answered"})

    async def end() -> list[socket.socket]:
        config = uvicorn.Config(
            application, http=protocol(20.0), lifespan="off", log_config=None, loop="none"
        )
        config.load()
        server = lifecycle._Uvicorn(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup([listener])
        # As long as this function does not wait, nobody accepts.
        clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(3)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await server.shutdown([listener])
        return clients

    for client in asyncio.run(end()):
        with client:
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=20)


class Waiting:
    """A listener in front of which some have waited too long."""

    def __init__(self, *outcomes: OSError | None) -> None:
        self._outcomes = list(outcomes)

    def accept(self) -> tuple[str, None]:
        if not self._outcomes:
            raise BlockingIOError
        if error := self._outcomes.pop(0):
            raise error
        return "connection", None


def test_taking_what_waits_survives_clients_and_limits(caplog: pytest.LogCaptureFixture) -> None:
    gone = ConnectionAbortedError(errno.ECONNABORTED, "aborted")
    waiting: Any = Waiting(None, gone, None)
    assert list(lifecycle._queued(waiting)) == ["connection", "connection"]
    assert not caplog.records
    waiting = Waiting(None, OSError(errno.EMFILE, "Too many open files"), None)
    assert list(lifecycle._queued(waiting)) == ["connection"]
    assert "cannot be taken (Too many open files)" in caplog.text


def test_the_end_comes_if_a_client_has_gone_that_was_not_taken_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[str] = []

    class Gone:
        def close(self) -> None:
            closed.append("closed")

    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    async def end() -> None:
        config = uvicorn.Config(application, lifespan="off", log_config=None, loop="none")
        config.load()
        server = lifecycle._Uvicorn(config)
        server.servers, server.lifespan = [], config.lifespan_class(config)
        monkeypatch.setattr(lifecycle, "_queued", lambda _: iter([Gone(), Gone()]))

        async def refuse(*_: object) -> None:
            raise OSError(errno.ENOTCONN, "not connected")

        monkeypatch.setattr(asyncio.get_running_loop(), "connect_accepted_socket", refuse)
        await server.shutdown([socket.socket()])

    asyncio.run(end())
    assert closed == ["closed", "closed"]


def test_a_connection_made_before_the_end_may_still_ask(pristine_bundle: Path) -> None:
    with serving(f"small={pristine_bundle}", "--drain-delay", 0) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.connect()
        assert server.ask("GET", "/v2").status == 200  # so the one above was accepted as well
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.25)  # uvicorn looks every 0.1 s whether it is to end
        connection.request("GET", "/v2")
        assert connection.getresponse().status == 200
        connection.close()
        assert server.process.wait(30) == 0


def test_log_lines(pristine_bundle: Path) -> None:
    with serving(f"small={pristine_bundle}", "--log-requests", "--drain-delay", 0) as server:
        server.infer("small", {"inputs": [tensor(np.zeros((1, 3, SIZE, SIZE), np.float32))]})
        server.infer("small", "{")
        assert server.stop() == 0
        assert server.process.stdout is not None
        lines = [json.loads(line) for line in server.process.stdout]
    assert [(line["status"], line["model"]) for line in lines] == [(200, "small"), (400, "small")]
    assert lines[0]["images"] == 1
    assert "failed to parse" in lines[1]["error"]


def test_a_log_that_nobody_reads_is_told_of(pristine_bundle: Path) -> None:
    with serving(f"small={pristine_bundle}", "--log-requests", "--drain-delay", 0) as server:
        for _ in range(40):  # 80 KiB of lines, of which a pipe holds 64
            assert server.ask("GET", f"/v2/models/{'n' * 2000}").status == 404
        assert server.stop() == 0
        time.sleep(0.1)
        [told] = server.lines
        found = re.search(r"nobody reads stdout: the last (\d+) lines of --log-requests are", told)
        assert found, told
        assert server.process.stdout is not None
        read = [json.loads(line) for line in server.process.stdout]
    assert len(read) + int(found[1]) == 40
    assert int(found[1]) > 0


def test_what_does_not_start(regraft: Regraft, pristine_bundle: Path, tmp_path: Path) -> None:
    cases = [
        (1, (tmp_path,), "is not a bundle"),
        (2, (f"a b={pristine_bundle}",), "cannot name a model"),
        (2, (f"x={pristine_bundle}", f"x_images={pristine_bundle}"), "collide"),
        (1, (pristine_bundle, "--key-file", tmp_path / "no"), "expected a file with a key"),
        (2, (pristine_bundle, "--max-queue", 1), "expected at least --max-batch"),
        (2, (pristine_bundle, "--preferred-batch", 33), "expected at most --max-batch, 32"),
    ]
    for expected, words, message in cases:
        code, _, err = regraft("serve", *words, "--port", "0")
        assert (code, message in err) == (expected, True), err
        assert len(err.splitlines()) == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = regraft("serve", pristine_bundle, "--port", port)
    assert (code, "cannot listen on 127.0.0.1" in err) == (1, True)
