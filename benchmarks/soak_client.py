"""One client of the soak: what it may do next, and what must come of it."""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Self

import grpc
import numpy as np

from benchmarks.oip import (
    Floats,
    grpc_arrays,
    grpc_call,
    grpc_channel,
    grpc_request,
    http_arrays,
    http_request,
)
from benchmarks.served import PATIENCE, Array, Served
from benchmarks.soak_expected import Expected

_IDLE = 2.0  # seconds; the server may close what is idle for five, as HTTP allows
MODEL, IMAGES = "vit", "vit_images"


class Wrong(Exception):  # noqa: N818 - what the soak looks for
    """The server answered something else than it had to."""


class Client:
    """Connections to the server that are kept, and replaced at random; a context manager.

    Attributes:
        doing: name of the step that was begun last.
    """

    def __init__(self, server: Served, expected: Expected, rng: random.Random) -> None:
        self._server, self._expected, self._rng = server, expected, rng
        self._http = self._connect()
        self._grpc = grpc_channel(server.grpc_port)
        self._used = 0.0
        self.doing = ""
        self._steps: list[tuple[int, Callable[[], str]]] = [
            (20, self._http_pixels),
            (10, self._http_images),
            (20, self._grpc_pixels),
            (10, self._grpc_images),
            (3, self._http_json),
            (10, self._http_wrong),
            (10, self._grpc_wrong),
            (4, self._http_too_large),
            (6, self._http_cut_in_request),
            (6, self._http_gone_before_the_answer),
            (6, self._grpc_cancelled),
            (3, self._garbage),
            (3, self._new_connections),
            (1, self._asks_about),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()
        self._grpc.close()

    def step(self) -> str:
        """Does one thing; what came of it, where more than one outcome is right.

        Raises:
            Wrong: the answer was.
        """
        weights = [weight for weight, _ in self._steps]
        _, act = self._rng.choices(self._steps, weights)[0]
        self.doing = act.__name__.strip("_")
        return act()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=PATIENCE)

    def _post(
        self, model: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        if time.monotonic() - self._used > _IDLE:
            self._http.close()
        self._http.request("POST", f"/v2/models/{model}/infer", body, headers)
        self._used = time.monotonic()
        answer = self._http.getresponse()
        named = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, named, answer.read()

    def _compare(self, arrays: dict[str, Floats], right: Array) -> str:
        got = arrays["pooler_output"]
        # Sums of another batch size may differ in the last bits, and by nothing more.
        if got.shape != right.shape or not np.allclose(got, right, rtol=1e-3, atol=1e-4):
            raise Wrong(f"{self.doing}: another answer than the Extractor's")
        return ""

    def _over_http(self, model: str, tensor: Any, right: Array) -> str:
        status, headers, body = self._post(model, *http_request(*tensor))
        if status != 200:
            raise Wrong(f"{self.doing}: {status} {body[:200]!r}")
        return self._compare(http_arrays(headers, body), right)

    def _http_pixels(self) -> str:
        return self._over_http(MODEL, *self._expected.pixels(self._rng))

    def _http_images(self) -> str:
        return self._over_http(IMAGES, *self._expected.files(self._rng))

    def _http_json(self) -> str:
        one, right = self._expected.one(self._rng)
        tensor = {"name": "pixel_values", "shape": one.shape, "datatype": "FP32"}
        document = {"inputs": [{**tensor, "data": one.ravel().tolist()}]}
        status, headers, body = self._post(MODEL, json.dumps(document).encode(), {})
        if status != 200:
            raise Wrong(f"{self.doing}: {status} {body[:200]!r}")
        return self._compare(http_arrays(headers, body), right)

    def _over_grpc(self, model: str, tensor: Any, right: Array) -> str:
        body = grpc_request(model, *tensor).SerializeToString()
        return self._compare(grpc_arrays(grpc_call(self._grpc)(body, timeout=PATIENCE)), right)

    def _grpc_pixels(self) -> str:
        return self._over_grpc(MODEL, *self._expected.pixels(self._rng))

    def _grpc_images(self) -> str:
        return self._over_grpc(IMAGES, *self._expected.files(self._rng))

    def _http_wrong(self) -> str:
        (name, datatype, shape, raw), _ = self._expected.pixels(self._rng)
        body, headers = http_request(name, datatype, shape, raw)
        model, wrong, its, right = self._rng.choice(
            [
                (MODEL, body[:-8], headers, 400),
                (MODEL, b"{" + body, {}, 400),
                (MODEL, *http_request("zz", datatype, shape, raw), 400),
                (MODEL, *http_request(name, "INT32", shape, raw), 400),
                (MODEL, *http_request(name, datatype, shape[1:], raw[: len(raw) // shape[0]]), 400),
                (MODEL, *http_request(name, datatype, shape, b"\0\0\xc0\x7f" + raw[4:]), 400),
                (IMAGES, *http_request("images", "BYTES", (1, 1), b"\4\0\0\0JPEG"), 400),
                ("none", body, headers, 404),
            ]
        )
        status, _, told = self._post(model, wrong, its)
        if status != right or list(json.loads(told)) != ["error"]:
            raise Wrong(f"{self.doing}: {status} {told[:200]!r}, expected {right}")
        return str(status)

    def _http_too_large(self) -> str:
        with socket.create_connection(("127.0.0.1", self._server.port), PATIENCE) as connection:
            head = f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: x\r\n"
            connection.sendall(f"{head}Content-Length: {9 << 20}\r\n\r\n".encode())
            first = connection.recv(64)
        if not first.startswith(b"HTTP/1.1 413"):
            raise Wrong(f"{self.doing}: {first!r}")
        return ""

    def _grpc_wrong(self) -> str:
        (name, datatype, shape, raw), _ = self._expected.pixels(self._rng)
        wrong, right = self._rng.choice(
            [
                (b"\xff\xff", "INVALID_ARGUMENT"),
                (grpc_request(MODEL, name, datatype, shape, raw[:-4]), "INVALID_ARGUMENT"),
                (grpc_request(MODEL, "zz", datatype, shape, raw), "INVALID_ARGUMENT"),
                (grpc_request(IMAGES, "images", "BYTES", (1, 1), b"\1\0"), "INVALID_ARGUMENT"),
                (grpc_request("none", name, datatype, shape, raw), "NOT_FOUND"),
                (bytes(9 << 20), "RESOURCE_EXHAUSTED"),
            ]
        )
        body = wrong if isinstance(wrong, bytes) else wrong.SerializeToString()
        try:
            grpc_call(self._grpc)(body, timeout=PATIENCE)
        except grpc.RpcError as error:
            if error.code().name != right:
                raise Wrong(f"{self.doing}: {error.code()} {error.details()}") from None
            return right
        raise Wrong(f"{self.doing}: answered, expected {right}")

    def _http_cut_in_request(self) -> str:
        body, headers = http_request(*self._expected.pixels(self._rng)[0])
        lines = [f"POST /v2/models/{MODEL}/infer HTTP/1.1", "Host: x"]
        lines += [f"{k}: {v}" for k, v in {**headers, "Content-Length": str(len(body))}.items()]
        whole = "\r\n".join([*lines, "", ""]).encode() + body
        with socket.create_connection(("127.0.0.1", self._server.port), PATIENCE) as connection:
            connection.sendall(whole[: self._rng.randrange(1, len(whole))])
            self._leave(connection)
        return ""

    def _http_gone_before_the_answer(self) -> str:
        connection = self._connect()
        connection.request(
            "POST", f"/v2/models/{MODEL}/infer", *http_request(*self._expected.pixels(self._rng)[0])
        )
        time.sleep(self._rng.random() * 0.02)
        self._leave(connection.sock)
        connection.close()
        return ""

    def _leave(self, connection: socket.socket) -> None:
        if self._rng.random() < 0.5:  # a reset instead of an orderly end
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def _grpc_cancelled(self) -> str:
        own = self._rng.random() < 0.3
        channel = grpc_channel(self._server.grpc_port) if own else self._grpc
        body = grpc_request(MODEL, *self._expected.pixels(self._rng)[0]).SerializeToString()
        call = grpc_call(channel).future(body, timeout=PATIENCE)
        time.sleep(self._rng.random() * 0.02)
        if own:
            channel.close()
        else:
            call.cancel()
        return ""

    def _garbage(self) -> str:
        port = self._rng.choice((self._server.port, self._server.grpc_port))
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
            connection.sendall(self._rng.randbytes(self._rng.randrange(1, 2000)))
            self._leave(connection)
        return ""

    def _new_connections(self) -> str:
        self._http.close()
        self._grpc.close()
        self._http = self._connect()
        self._grpc = grpc_channel(self._server.grpc_port)
        return ""

    def _asks_about(self) -> str:
        path = self._rng.choice(("/v2", "/metrics", f"/v2/models/{MODEL}/stats"))
        if not self._server.get(path):
            raise Wrong(f"{self.doing}: {path} is empty")
        return ""
