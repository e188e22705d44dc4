"""`regraft serve` in a process of its own, as benchmarks watch it, and requests to it."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from regraft.serve.grpc.messages import SERVICE, message

Array = NDArray[np.float32]
PATIENCE = 120.0
_LENGTH = "Inference-Header-Content-Length"


class Served:
    """A running server.

    Attributes:
        port: of HTTP.
        grpc_port: of gRPC.
        start_seconds: from the command to its readiness.
    """

    def __init__(
        self, process: subprocess.Popen[str], port: int, grpc_port: int, start_seconds: float
    ) -> None:
        self.port, self.grpc_port, self.start_seconds = port, grpc_port, start_seconds
        self._process = process
        self._folder = Path("/proc") / str(process.pid)

    def memory_mb(self) -> float:
        """Resident memory, shared pages by share (PSS), in MB of 10^6 bytes."""
        text = (self._folder / "smaps_rollup").read_text()
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        assert found
        return int(found[1]) * 1024 / 1e6

    def open_files(self) -> int:
        """File descriptors."""
        return len(list((self._folder / "fd").iterdir()))

    def threads(self) -> int:
        """Threads."""
        return len(list((self._folder / "task").iterdir()))

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def get(self, path: str) -> bytes:
        """A GET; the body of its answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def stop(self) -> int:
        """Ends it by SIGTERM; the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(PATIENCE)


@contextmanager
def serving(arguments: Sequence[str], log: Path) -> Iterator[Served]:
    """A server on free ports of 127.0.0.1, ready; what it says goes to ``log``."""
    words = [sys.executable, "-m", "regraft", "serve", *arguments]
    words += ["--port", "0", "--grpc-port", "0"]
    begun = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(words, stderr=out, stdout=out, text=True)
    try:
        while not (
            found := re.search(r"on http://\S+:(\d+) and grpc://\S+:(\d+)\n", log.read_text())
        ):
            if process.poll() is not None or time.perf_counter() - begun > PATIENCE:
                raise SystemExit(f"the server did not start: {log.read_text()}")
            time.sleep(0.005)
        seconds = time.perf_counter() - begun
        yield Served(process, int(found[1]), int(found[2]), seconds)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)


def http_body(
    name: str, datatype: str, shape: Sequence[int], raw: bytes, outputs: Sequence[str] = ()
) -> tuple[bytes, Any]:
    """Body and headers of a request with one input; input and outputs (all if empty) binary."""
    tensor = {
        "name": name,
        "shape": list(shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": len(raw)},
    }
    document = {
        "inputs": [tensor],
        "outputs": [{"name": output} for output in outputs],
        "parameters": {"binary_data_output": True},
    }
    head = json.dumps(document).encode()
    return head + raw, {_LENGTH: str(len(head))}


def http_arrays(answer: http.client.HTTPResponse, body: bytes) -> dict[str, Array]:
    """The binary outputs of an answer."""
    at = int(answer.getheader(_LENGTH) or 0)
    arrays = {}
    for output in json.loads(body[:at])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        arrays[output["name"]] = np.frombuffer(body, "<f4", size // 4, at).reshape(output["shape"])
        at += size
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes behind the outputs")
    return arrays


def grpc_body(
    model: str,
    name: str,
    datatype: str,
    shape: Sequence[int],
    raw: bytes,
    outputs: Sequence[str] = (),
) -> bytes:
    """A serialized request with one raw input, for all outputs or those named."""
    tensor = {"name": name, "datatype": datatype, "shape": shape}
    request = message("ModelInferRequest")(
        model_name=model,
        inputs=[tensor],
        outputs=[{"name": output} for output in outputs],
        raw_input_contents=[raw],
    )
    body: bytes = request.SerializeToString()
    return body


def grpc_infer(channel: Any) -> Any:
    """The call that takes such a request and gives a serialized answer."""
    return channel.unary_unary(f"/{SERVICE}/ModelInfer")


def grpc_channel(port: int) -> Any:
    """A connection of its own."""
    sizes = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    options = [*sizes, ("grpc.use_local_subchannel_pool", 1)]
    return grpc.insecure_channel(f"127.0.0.1:{port}", options=options)


def grpc_arrays(body: bytes) -> dict[str, Array]:
    """The outputs of an answer."""
    answer = message("ModelInferResponse").FromString(body)
    return {
        output.name: np.frombuffer(raw, "<f4").reshape(tuple(output.shape))
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }
