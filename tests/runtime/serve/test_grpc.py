"""The gRPC side as a client sees it: the same service as over HTTP, under gRPC's status names."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from benchmarks.oip import bytes_tensor, grpc_request
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.runtime.serve.test_http import assert_features
from tests.support.grpc_client import Client, pixels_request
from tests.support.server import Server, serving, tensor

from regraft import Extractor
from regraft.images import decode
from regraft.serve.grpc import messages

SIZE = 16
ONE = np.zeros((1, 3, SIZE, SIZE), np.float32)
Regraft = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def server(pristine_bundle: Path) -> Iterator[Server]:
    words = ("--grpc-port", 0, "--max-batch", 4, "--max-body", 1)
    with serving(f"small={pristine_bundle}", *words) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(server.grpc_port) as opened:
        yield opened


@pytest.fixture(scope="module")
def extractor(pristine_bundle: Path) -> Iterator[Extractor]:
    with Extractor.open(pristine_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)


def test_health_metadata_and_configuration_are_those_of_http(
    server: Server, client: Client
) -> None:
    assert client.ask("ServerLive").live
    assert client.ask("ServerReady").ready
    about = client.ask("ServerMetadata")
    told = {"name": about.name, "version": about.version, "extensions": list(about.extensions)}
    assert told == server.ask("GET", "/v2").document
    for name in ("small", "small_images"):
        assert client.ask("ModelReady", name=name).ready
        assert client.ask("ModelReady", name=name, version="1").ready
        found = client.ask("ModelMetadata", name=name)
        there = server.ask("GET", f"/v2/models/{name}").document
        assert (found.name, list(found.versions), found.platform) == (
            *(there["name"], there["versions"], there["platform"]),
        )
        for kind in ("inputs", "outputs"):
            tensors = [
                {"name": t.name, "datatype": t.datatype, "shape": list(t.shape)}
                for t in getattr(found, kind)
            ]
            assert tensors == there[kind]
        config = client.ask("ModelConfig", name=name).config
        there = server.ask("GET", f"/v2/models/{name}/config").document
        assert (config.name, config.max_batch_size, config.backend) == (name, 4, "regraft")
        assert list(config.dynamic_batching.preferred_batch_size) == [4]
        assert [list(i.dims) for i in config.input] == [i["dims"] for i in there["input"]]
        assert [list(o.dims) for o in config.output] == [o["dims"] for o in there["output"]]
        assert config.parameters["engine"].string_value == "ort-cpu"
    assert not client.ask("ModelReady", name="none").ready
    assert not client.ask("ModelReady", name="small", version="9").ready
    index = client.ask("RepositoryIndex").models
    assert [(m.name, m.version, m.state) for m in index] == [
        ("small", "1", "READY"),
        ("small_images", "1", "READY"),
    ]


def test_raw_and_typed_contents(client: Client, extractor: Extractor, pixels: np.ndarray) -> None:
    assert_features(client.infer(pixels_request("small", pixels)), extractor, pixels)
    typed = grpc_request(
        *("small", "pixel_values", "FP32", pixels.shape),
        contents={"fp32_contents": pixels.ravel().tolist()},
    )
    assert_features(client.infer(typed), extractor, pixels)


def test_the_answer_repeats_id_model_and_version(client: Client) -> None:
    for asked in ("", "1"):
        body = pixels_request("small", ONE, id="7", model_version=asked).SerializeToString()
        answer = messages.message("ModelInferResponse").FromString(client.raw("ModelInfer", body))
        assert (answer.model_name, answer.model_version, answer.id) == ("small", "1", "7")
        assert not any(output.HasField("contents") for output in answer.outputs)


def test_outputs_asked_for_and_halves(client: Client, pixels: np.ndarray) -> None:
    full = client.infer(pixels_request("small", pixels))
    outputs = [{"name": "test_time_registers"}, {"name": "pooler_output"}]
    half = client.infer(
        pixels_request(
            *("small", pixels),
            outputs=outputs,
            parameters={"output_datatype": {"string_param": "FP16"}},
        )
    )
    assert list(half) == ["test_time_registers", "pooler_output"]
    for name, array in half.items():
        assert array.dtype == np.float16
        np.testing.assert_allclose(array, full[name], rtol=1e-3, atol=1e-4)


def test_images(client: Client, extractor: Extractor, photos: list[Path]) -> None:
    files = [path.read_bytes() for path in photos[:3]]
    raw = grpc_request("small_images", "images", "BYTES", (3, 1), bytes_tensor(*files))
    assert_features(client.infer(raw), extractor, photos[:3])
    typed = grpc_request(
        "small_images", "images", "BYTES", (3, 1), contents={"bytes_contents": files}
    )
    assert_features(client.infer(typed), extractor, photos[:3])
    arrays = [np.asarray(decode(path).resize((50, 40))) for path in photos[:2]]
    stacked = np.stack(arrays)
    for form in (
        {"raw": stacked.tobytes()},
        {"contents": {"uint_contents": stacked.ravel().tolist()}},
    ):
        request = grpc_request("small_images", "images", "UINT8", stacked.shape, **form)
        assert_features(client.infer(request), extractor, arrays)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests(
    client: Client, extractor: Extractor, pixels: np.ndarray, compression: Any
) -> None:
    answer = client.infer(pixels_request("small", pixels), compression=compression)
    assert_features(answer, extractor, pixels)
    status, _ = client.refused(bytes(80 << 20), compression=compression)
    assert status == "RESOURCE_EXHAUSTED"


def one(**changes: Any) -> Any:
    """A good request of one image, changed."""
    fields = {"name": "pixel_values", "datatype": "FP32", "shape": ONE.shape, "raw": ONE.tobytes()}
    fields.update(changes)
    return grpc_request(fields.pop("model", "small"), **fields)


NAN = np.where(np.arange(ONE.size).reshape(ONE.shape) == 5, np.nan, ONE).astype(np.float32)
ZEROS = [0] * ONE.size
INVALID, NOT_FOUND = "INVALID_ARGUMENT", "NOT_FOUND"
BAD: dict[str, tuple[Any, str, str]] = {
    "no message of its kind": (b"\xff\xff", INVALID, "is not a ModelInferRequest message"),
    "cut short": (one().SerializeToString()[:-5], INVALID, "is not a ModelInferRequest message"),
    "no UTF-8": (b"\x0a\x01\xff", INVALID, "is not a ModelInferRequest message"),
    "nothing": (b"", NOT_FOUND, "Request for unknown model: '' is not found"),
    "unknown model": (one(model="none"), NOT_FOUND, "Request for unknown model: 'none'"),
    "unknown version": (one(model_version="9"), NOT_FOUND, "'small' version 9 is not found"),
    "unknown input": (one(name="zz"), INVALID, "unexpected inference input 'zz'"),
    "no inputs": (
        messages.message("ModelInferRequest")(model_name="small"),
        *(INVALID, "expected 1 inputs but got 0 inputs for model 'small'"),
    ),
    "unknown output": (one(outputs=[{"name": "zz"}]), INVALID, "unexpected inference output 'zz'"),
    "an output twice": (
        one(outputs=[{"name": "pooler_output"}] * 2),
        *(INVALID, "an output is asked for twice"),
    ),
    "unknown datatype": (one(datatype="FLOAT"), INVALID, 'unknown datatype "FLOAT"'),
    "wrong datatype": (
        one(datatype="INT32"),
        *(INVALID, "data-type is 'INT32', but model 'small' expects 'FP32'"),
    ),
    "negative size": (one(shape=[-1, 3, SIZE, SIZE]), INVALID, "shape is [-1, 3, 16, 16]"),
    "huge size": (one(shape=[2**62, 2**62]), INVALID, "expected at most 16 sizes"),
    "wrong rank": (one(shape=[3, SIZE, SIZE]), INVALID, "Expected [-1,3,16,16], got [3,16,16]"),
    "zero batch": (one(shape=[0, 3, SIZE, SIZE], raw=b""), INVALID, "got [0,3,16,16]"),
    "bytes missing": (one(raw=ONE.tobytes()[:-4]), INVALID, "input byte size mismatch"),
    "bytes left": (one(raw=ONE.tobytes() + b"1234"), INVALID, "input byte size mismatch"),
    "NaN": (one(raw=NAN.tobytes()), INVALID, "NaN or Inf in image 0"),
    "typed NaN": (
        one(raw=None, contents={"fp32_contents": NAN.ravel()}),
        *(INVALID, "NaN or Inf in image 0"),
    ),
    "batch over the largest": (
        pixels_request("small", np.zeros((5, 3, SIZE, SIZE), np.float32)),
        *(INVALID, "batch-size must be <= 4 for 'small', got 5"),
    ),
    "contents and raw": (
        one(contents={"fp32_contents": ZEROS}),
        *(INVALID, "has contents and raw_input_contents"),
    ),
    "raw for no input": (
        one(raw_input_contents=[b"more"]),
        *(INVALID, "raw_input_contents has 2 elements for 1 inputs"),
    ),
    "too few elements": (
        one(raw=None, contents={"fp32_contents": [0]}),
        *(INVALID, "fp32_contents has 1 elements, but shape [1, 3, 16, 16] has 768"),
    ),
    "no data": (one(raw=None), INVALID, "fp32_contents has 0 elements"),
    "another field": (
        one(raw=None, contents={"fp64_contents": ZEROS}),
        *(INVALID, "has fp64_contents; FP32 elements belong in fp32_contents"),
    ),
    "halves without a field": (
        one(raw=None, datatype="FP16"),
        *(INVALID, "FP16 has no contents field; send it as raw_input_contents"),
    ),
    "beyond the datatype": (
        one(
            raw=None, datatype="UINT8", shape=[1, 1, 1, 3], contents={"uint_contents": [1, 2, 256]}
        ),
        *(INVALID, "holds numbers beyond UINT8"),
    ),
    "classification": (
        one(
            outputs=[
                {"name": "pooler_output", "parameters": {"classification": {"int64_param": 2}}}
            ]
        ),
        *(INVALID, "classification is not supported"),
    ),
    "a parameter without value": (
        one(parameters={"timeout": {}}),
        *(INVALID, 'parameter "timeout" has no value'),
    ),
    "timeout no number": (
        one(parameters={"timeout": {"string_param": "soon"}}),
        *(INVALID, "parameter 'timeout' is 'soon'"),
    ),
    "output datatype": (
        one(parameters={"output_datatype": {"string_param": "INT8"}}),
        *(INVALID, "parameter 'output_datatype' is 'INT8'; expected FP32 or FP16"),
    ),
    "no image": (
        grpc_request("small_images", "images", "BYTES", (1, 1), bytes_tensor(b"no image")),
        *(INVALID, "input 'images', image 0: is not an image file"),
    ),
    "elements cut short": (
        grpc_request("small_images", "images", "BYTES", (1, 1), b"\1\0"),
        *(INVALID, "incomplete string length"),
    ),
    "many fields": (b"\x78\x00" * 5000, INVALID, "more than 4096 fields"),
    "too large": (one(raw=bytes(1 << 20)), "RESOURCE_EXHAUSTED", "larger than max"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(client: Client, case: str) -> None:
    request, status, message = BAD[case]
    told, details = client.refused(request)
    assert (told, message in details) == (status, True), (told, details)


@pytest.mark.parametrize(
    ("method", "fields", "status", "message"),
    [
        ("ModelMetadata", {"name": "none"}, NOT_FOUND, "Request for unknown model: 'none'"),
        ("ModelConfig", {"name": "none"}, NOT_FOUND, "Request for unknown model: 'none'"),
        ("ModelStatistics", {"name": "small", "version": "9"}, NOT_FOUND, "version 9 is not found"),
        (
            "RepositoryIndex",
            {"repository_name": "x"},
            "UNIMPLEMENTED",
            "repository_name is not supported",
        ),
        ("RepositoryModelLoad", {"model_name": "small"}, "UNAVAILABLE", "--model-control"),
        ("RepositoryModelUnload", {"model_name": "small"}, "UNAVAILABLE", "--model-control"),
    ],
)
def test_other_calls_refused(
    client: Client, method: str, fields: dict[str, Any], status: str, message: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.ask(method, **fields)
    assert (caught.value.code().name, message in caught.value.details()) == (status, True)


def test_calls_that_do_not_exist_and_messages_that_are_none(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.raw("ModelStreamInfer", b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError) as caught:
        client.raw("ModelConfig", b"\xff")
    assert "is not a ModelConfigRequest message" in caught.value.details()
    call = client._channel.stream_unary(f"/{messages.SERVICE}/ModelInfer")
    with pytest.raises(grpc.RpcError) as caught:
        call(iter(()), timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_both_transports_are_counted_together(pristine_bundle: Path, pixels: np.ndarray) -> None:
    with (
        serving(f"small={pristine_bundle}", "--grpc-port", 0) as server,
        Client(server.grpc_port) as client,
    ):
        client.infer(pixels_request("small", pixels))
        assert server.infer("small", {"inputs": [tensor(pixels)]}).status == 200
        client.refused(one(datatype="INT32"))
        (stats,) = client.ask("ModelStatistics", name="small").model_stats
        assert len(client.ask("ModelStatistics").model_stats) == 2
        text = server.ask("GET", "/metrics").body.decode()
    assert (stats.inference_count, stats.execution_count) == (6, 2)
    assert (stats.inference_stats.success.count, stats.inference_stats.fail.count) == (2, 1)
    assert [(row.batch_size, row.compute_infer.count) for row in stats.batch_stats] == [(3, 2)]
    assert 'nv_inference_request_success{model="small",version="1"} 2' in text


def test_key(pristine_bundle: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("geheim\n")
    with serving(f"small={pristine_bundle}", "--grpc-port", 0, "--key-file", key) as server:
        for wrong in (None, "wrong", ""):
            with Client(server.grpc_port, wrong) as client:
                assert client.ask("ServerLive").live
                assert client.ask("ModelReady", name="small").ready
                assert client.refused(one())[0] == "UNAUTHENTICATED"
                with pytest.raises(grpc.RpcError) as caught:
                    client.ask("ServerMetadata")
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with Client(server.grpc_port, "geheim") as client:
            assert client.infer(one())


def health(port: int, service: str = "") -> str:
    """What gRPC's own client for health checks is told: the status, or that of the call."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = health_pb2_grpc.HealthStub(channel).Check
        try:
            answer = ask(health_pb2.HealthCheckRequest(service=service), timeout=30)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def test_health_checks(pristine_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("geheim")
    words = ("--grpc-port", 0, "--model-control", "--key-file", tmp_path / "key")
    with (
        serving(f"m={pristine_bundle}", *words, "--drain-delay", 5) as server,
        Client(server.grpc_port, "geheim") as client,
    ):
        for service in ("", messages.SERVICE, messages.HEALTH):
            assert health(server.grpc_port, service) == "SERVING"
        assert health(server.grpc_port, "another") == "NOT_FOUND"
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch
            with pytest.raises(grpc.RpcError) as caught:
                next(watch(health_pb2.HealthCheckRequest(), timeout=30))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # clients then do without
        client.ask("RepositoryModelUnload", model_name="m")
        assert health(server.grpc_port) == "NOT_SERVING"
        client.ask("RepositoryModelLoad", model_name="m")
        assert health(server.grpc_port) == "SERVING"
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert health(server.grpc_port) == "NOT_SERVING"


def test_a_full_queue(pristine_bundle: Path) -> None:
    words = ("--grpc-port", 0, "--max-batch", 2, "--max-queue", 2, "--max-delay", 60_000)
    two = np.concatenate([ONE, ONE])
    with (
        serving(f"small={pristine_bundle}", *words) as server,
        Client(server.grpc_port) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(client.infer, one())
        waits = 'nv_inference_pending_request_count{model="small",version="1"} 1'
        while waits not in server.ask("GET", "/metrics").body.decode():
            time.sleep(0.02)
        full = "Exceeds maximum queue size: 1 images are waiting, expected at most 2"
        status, told = client.refused(pixels_request("small", two))
        assert (status, told.partition(";")[0]) == ("UNAVAILABLE", full)
        reply = server.infer("small", {"inputs": [tensor(two)]})
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert reply.document["error"].startswith(full)
        assert client.infer(one())  # which fills the batch that the first one waits for
        assert first.result(30)


def test_reload(pristine_bundle: Path) -> None:
    words = ("--grpc-port", 0, "--model-control")
    with serving(f"m={pristine_bundle}", *words) as server, Client(server.grpc_port) as client:
        client.ask("RepositoryModelLoad", model_name="m")
        client.infer(one(model="m"))
        client.ask("RepositoryModelUnload", model_name="m")
        assert not client.ask("ServerReady").ready
        assert client.refused(one(model="m")) == ("UNAVAILABLE", "model 'm' is not ready: unloaded")
        assert [m.state for m in client.ask("RepositoryIndex").models] == ["UNAVAILABLE"] * 2
        assert not client.ask("RepositoryIndex", ready=True).models
        with pytest.raises(grpc.RpcError) as caught:
            client.ask("RepositoryModelLoad", model_name="none")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_time_limits(pristine_bundle: Path) -> None:
    # Held back for fuller batches, every request is still in the queue when its time is up.
    words = ("--grpc-port", 0, "--max-delay", 5000)
    with (
        serving(f"small={pristine_bundle}", *words) as server,
        Client(server.grpc_port) as client,
    ):
        own = one(parameters={"timeout": {"int64_param": 200_000}})
        begun = time.monotonic()
        assert client.refused(own) == ("UNAVAILABLE", "Request timeout expired")
        assert client.refused(one(), timeout=0.2)[0] == "DEADLINE_EXCEEDED"
        assert time.monotonic() - begun < 4
        time.sleep(0.3)
        (stats,) = client.ask("ModelStatistics", name="small").model_stats
        asked = {"inputs": [tensor(ONE)], "parameters": {"timeout": 200_000}}
        reply = server.infer("small", asked)
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert reply.document == {"error": "Request timeout expired"}
    assert (stats.inference_stats.fail.count, stats.execution_count) == (2, 0)


def test_reloads_drop_no_call(pristine_bundle: Path) -> None:
    words = ("--grpc-port", 0, "--model-control")
    body, reloads = one(model="m").SerializeToString(), 0
    with serving(f"m={pristine_bundle}", *words) as server:

        def over_grpc() -> None:
            with Client(server.grpc_port) as client:
                while reloads < 15:
                    client.raw("ModelInfer", body)

        def over_http() -> None:
            while reloads < 15:
                reply = server.infer("m", {"inputs": [tensor(ONE)]})
                assert reply.status == 200, reply.body

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(ask) for ask in (over_grpc, over_http) * 2]
            try:
                while reloads < 15 and not any(client.done() for client in clients):
                    assert server.ask("POST", "/v2/repository/models/m/load", {}).status == 200
                    reloads += 1
            finally:
                reloads = 15
            for client in clients:
                client.result(90)
        assert server.stop() == 0
        time.sleep(0.1)
        assert not server.lines


@pytest.mark.parametrize("fresh", [False, True])
def test_a_drain_answers_everything(pristine_bundle: Path, fresh: bool) -> None:
    body = one().SerializeToString()
    outcomes: Counter[str] = Counter()

    def ask(server: Server) -> None:
        client = Client(server.grpc_port)
        while True:
            try:
                client.raw("ModelInfer", body)
                outcomes["OK"] += 1
            except grpc.RpcError as error:
                # A connection that cannot be made was not accepted.
                refused = "Failed to connect" in error.details()
                outcomes["not accepted" if refused else f"{error.code()}: {error.details()}"] += 1
                if refused:
                    return
            finally:
                if fresh:
                    client.__exit__()
                    client = Client(server.grpc_port)

    with (
        serving(
            f"small={pristine_bundle}", "--grpc-port", 0, "--drain-delay", 0, "--log-requests"
        ) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        assert server.process.stdout is not None
        log = pool.submit(list, server.process.stdout)  # a pipe holds some 270 lines
        threads = [threading.Thread(target=ask, args=(server,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert server.process.wait(30) == 0
        lines = [json.loads(line) for line in log.result(30)]
        time.sleep(0.1)
        assert not server.lines
    assert set(outcomes) == {"OK", "not accepted"}, outcomes
    assert outcomes["OK"] > 20
    assert Counter((line["protocol"], line["method"], line["status"]) for line in lines) == {
        ("grpc", "ModelInfer", "OK"): outcomes["OK"]
    }
    assert {line["images"] for line in lines} == {1}


def test_what_does_not_start(
    regraft: Regraft, pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = regraft("serve", pristine_bundle, "--port", 0, "--grpc-port", port)
    assert (code, len(err.splitlines())) == (1, 1)
    assert f"cannot listen on 127.0.0.1:{port}" in err
    assert "choose others with --host and --grpc-port" in err
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "grpc" else real(name)
    )
    code, _, err = regraft("serve", pristine_bundle, "--grpc-port", "0")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "--grpc-port needs grpc, which is not installed" in err
    assert "pip install 'regraft-runtime[grpc]'" in err


def test_the_compiled_messages_are_those_of_the_source(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "runtime" / "compile_proto.py"
    spec = importlib.util.spec_from_file_location("compile_proto", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(tmp_path) == 0
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_bytes() for file in module.FOLDER.glob("*.binpb")}
    assert set(made) == {"inference.binpb", "health.binpb"}


def test_messages_live_beside_others_of_the_same_names() -> None:
    script = """
from google.protobuf import descriptor_pb2, descriptor_pool
file = descriptor_pb2.FileDescriptorProto(name="grpc_service.proto", package="inference")
file.message_type.add(name="ServerLiveRequest")
pool = descriptor_pool.Default()
pool.AddSerializedFile(file.SerializeToString())
from regraft.serve.grpc.messages import message
assert message("ServerLiveRequest").DESCRIPTOR.file.pool is not pool
assert len(pool.FindFileByName("grpc_service.proto").message_types_by_name) == 1
"""
    environment = {**os.environ}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
