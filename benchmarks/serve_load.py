"""Closed-loop clients of a server: each asks again as soon as it is answered."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.oip import (
    grpc_arrays,
    grpc_call,
    grpc_channel,
    grpc_request,
    http_arrays,
    http_request,
)
from benchmarks.served import PATIENCE, Array, Served

OUTPUT = "pooler_output"
Ask = Callable[[], Array]


def load_with(
    connect: Callable[[], Any], clients: int, right: Array, seconds: float
) -> tuple[float, list[float]]:
    """Asks for a while; everybody's first answer does not count.

    Args:
        connect: opens a client's connection; within it, a function that asks once.
        clients: how many.
        right: the answer; another one ends the benchmark.
        seconds: how long.

    Returns:
        Answers per second, and the seconds of each.
    """
    waits: list[float] = []
    faults: list[BaseException] = []
    warm = threading.Barrier(clients + 1, timeout=PATIENCE)
    begun = [0.0]

    def client() -> None:
        try:
            with connect() as ask:
                ask()
            warm.wait()  # without a connection: the server closes what is idle
            with connect() as ask:
                while (asked := time.perf_counter()) - begun[0] < seconds or not begun[0]:
                    if not np.allclose(ask(), right, rtol=1e-3, atol=1e-4):
                        raise ValueError("another answer than the engine's")
                    waits.append(time.perf_counter() - asked)
        except BaseException as error:
            faults.append(error)
            warm.abort()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    warm.wait()
    begun[0] = time.perf_counter()
    for thread in threads:
        thread.join()
    if faults:
        raise SystemExit(f"a client failed: {faults[0]!r}")
    return len(waits) / (time.perf_counter() - begun[0]), waits


@contextmanager
def over_http(server: Served, pixels: Array) -> Iterator[Ask]:
    """A client over HTTP, for the pooled output of these pixels."""
    body, headers = http_request(*_input(pixels), outputs=[{"name": OUTPUT}])
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)

    def ask() -> Array:
        connection.request("POST", "/v2/models/vit/infer", body, headers)
        answer = connection.getresponse()
        named = {name.lower(): value for name, value in answer.getheaders()}
        return http_arrays(named, answer.read())[OUTPUT]

    yield ask
    connection.close()


@contextmanager
def over_grpc(server: Served, pixels: Array) -> Iterator[Ask]:
    """The same over gRPC."""
    request = grpc_request("vit", *_input(pixels), outputs=[{"name": OUTPUT}])
    body = request.SerializeToString()
    channel = grpc_channel(server.grpc_port)
    call = grpc_call(channel)
    yield lambda: grpc_arrays(call(body, timeout=PATIENCE))[OUTPUT]
    channel.close()


def _input(pixels: Array) -> tuple[str, str, tuple[int, ...], bytes]:
    return "pixel_values", "FP32", pixels.shape, pixels.tobytes()
