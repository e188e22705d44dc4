"""The HTTP side as a client sees it: right answers, one clear answer to each wrong request."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.oip import bytes_tensor, http_request
from PIL import Image
from tests.support.server import Server, serving, tensor

from regraft import Extractor
from regraft.images import decode

SIZE = 16


@pytest.fixture(scope="module")
def server(pristine_bundle: Path) -> Iterator[Server]:
    with serving(f"small={pristine_bundle}", "--max-batch", 4, "--max-body", 1) as started:
        yield started


@pytest.fixture(scope="module")
def extractor(pristine_bundle: Path) -> Iterator[Extractor]:
    with Extractor.open(pristine_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)


def assert_features(arrays: dict[str, np.ndarray], extractor: Extractor, images: Any) -> None:
    expected = extractor.extract(images)
    last = arrays["last_hidden_state"]
    np.testing.assert_allclose(last[:, 0], expected.cls, rtol=1e-5, atol=1e-6)
    got = last[:, 1:].reshape(expected.patches.shape)
    np.testing.assert_allclose(got, expected.patches, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(arrays["pooler_output"], expected.pooled, rtol=1e-5, atol=1e-6)
    assert set(arrays) == {
        *("last_hidden_state", "pooler_output", "hidden.1", "attentions.1", "test_time_registers")
    }


def test_health_and_metadata(server: Server) -> None:
    for path in ("live", "ready"):
        assert server.ask("GET", f"/v2/health/{path}").status == 200
    about = server.ask("GET", "/v2").document
    assert about["name"] == "regraft"
    assert {"binary_tensor_data", "statistics"} <= set(about["extensions"])
    for name, datatype, shape in (
        ("small", "FP32", [-1, 3, SIZE, SIZE]),
        ("small_images", "BYTES", [-1, 1]),
    ):
        for path in (f"/v2/models/{name}", f"/v2/models/{name}/versions/1"):
            found = server.ask("GET", path).document
            assert (found["name"], found["versions"]) == (name, ["1"])
            assert [(i["datatype"], i["shape"]) for i in found["inputs"]] == [(datatype, shape)]
        assert server.ask("GET", f"/v2/models/{name}/ready").status == 200
        config = server.ask("GET", f"/v2/models/{name}/config").document
        assert config["max_batch_size"] == 4
        assert config["dynamic_batching"] == {
            "preferred_batch_size": [4],
            "max_queue_delay_microseconds": 0,
        }
    index = server.ask("POST", "/v2/repository/index", {}).document
    assert [(m["name"], m["state"]) for m in index] == [
        ("small", "READY"),
        ("small_images", "READY"),
    ]


def test_json_in_and_out(server: Server, extractor: Extractor, pixels: np.ndarray) -> None:
    reply = server.infer("small", {"id": "7", "inputs": [tensor(pixels)]})
    assert (reply.status, reply.document["id"]) == (200, "7")
    assert reply.headers["content-type"] == "application/json"
    assert_features(reply.arrays, extractor, pixels)


@pytest.mark.parametrize("pad", range(4))  # where the tensor begins decides its alignment
def test_binary_in_and_out(
    server: Server, extractor: Extractor, pixels: np.ndarray, pad: int
) -> None:
    body, headers = http_request(
        "pixel_values", "FP32", pixels.shape, pixels.tobytes(), id="x" * pad
    )
    assert_features(server.infer("small", body, **headers).arrays, extractor, pixels)


def test_outputs_are_those_asked_for_in_that_order(server: Server, pixels: np.ndarray) -> None:
    outputs = [
        {"name": "test_time_registers", "parameters": {"binary_data": True}},
        {"name": "pooler_output"},
    ]
    reply = server.infer("small", {"inputs": [tensor(pixels)], "outputs": outputs})
    assert list(reply.arrays) == ["test_time_registers", "pooler_output"]
    assert ["data" in output for output in reply.document["outputs"]] == [False, True]


def test_halves(server: Server, pixels: np.ndarray) -> None:
    full = server.infer("small", {"inputs": [tensor(pixels)]}).arrays
    asked = {"binary_data_output": True, "output_datatype": "FP16"}
    half = server.infer("small", {"inputs": [tensor(pixels)], "parameters": asked}).arrays
    for name, array in half.items():
        assert array.dtype == np.float16
        np.testing.assert_allclose(array, full[name], rtol=1e-3, atol=1e-4)


def test_encoded_images(server: Server, extractor: Extractor, photos: list[Path]) -> None:
    files = [path.read_bytes() for path in photos[:3]]
    body, headers = http_request("images", "BYTES", (3, 1), bytes_tensor(*files))
    assert_features(server.infer("small_images", body, **headers).arrays, extractor, photos[:3])


def test_the_whole_body_is_an_image(
    server: Server, extractor: Extractor, photos: list[Path]
) -> None:
    reply = server.infer(
        "small_images", photos[0].read_bytes(), Inference_Header_Content_Length="0"
    )
    assert_features(reply.arrays, extractor, [photos[0]])


def test_the_whole_body_is_pixels(server: Server, extractor: Extractor, pixels: np.ndarray) -> None:
    reply = server.infer("small", pixels[:1].tobytes(), Inference_Header_Content_Length="0")
    assert_features(reply.arrays, extractor, pixels[:1])


def test_raw_images(server: Server, extractor: Extractor, photos: list[Path]) -> None:
    arrays = [np.asarray(decode(path).resize((50, 40))) for path in photos[:2]]
    stacked = np.stack(arrays)
    body, headers = http_request("images", "UINT8", stacked.shape, stacked.tobytes())
    assert_features(server.infer("small_images", body, **headers).arrays, extractor, arrays)


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", lambda data: zlib.compress(data)[2:-4]),
    ],
)
def test_compressed_requests(
    server: Server, extractor: Extractor, pixels: np.ndarray, encoding: str, pack: Any
) -> None:
    body, headers = http_request("pixel_values", "FP32", pixels.shape, pixels.tobytes())
    reply = server.infer("small", pack(body), Content_Encoding=encoding, **headers)
    assert_features(reply.arrays, extractor, pixels)


ONE = np.zeros((1, 3, SIZE, SIZE), np.float32)
GOOD = tensor(ONE)
NAN = np.where(np.arange(ONE.size).reshape(ONE.shape) == 5, np.nan, ONE).astype(np.float32)


def changed(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{**GOOD, **fields}]}


BAD_JSON: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "failed to parse the request JSON"),
    "not UTF-8": (b"\xff\xfe\x00", "needs the header Inference-Header-Content-Length: 0"),
    "deep": ("[" * 200_000, "failed to parse the request JSON"),
    "a list": ([], "the request is []; expected an object"),
    "no inputs": ({}, "the request has no 'inputs'"),
    "inputs no list": ({"inputs": 3}, "'inputs' is 3; expected a list"),
    "input no object": ({"inputs": [3]}, "inputs[0] is 3; expected an object"),
    "empty inputs": ({"inputs": []}, "expected 1 inputs but got 0 inputs for model 'small'"),
    "two inputs": ({"inputs": [GOOD, GOOD]}, "expected 1 inputs but got 2 inputs"),
    "unknown input": (changed(name="zz"), "unexpected inference input 'zz' for model 'small'"),
    "unknown output": (
        {"inputs": [GOOD], "outputs": [{"name": "zz"}]},
        "unexpected inference output 'zz' for model 'small'",
    ),
    "an output twice": (
        {"inputs": [GOOD], "outputs": [{"name": "pooler_output"}] * 2},
        "an output is asked for twice",
    ),
    "unknown datatype": (changed(datatype="FLOAT"), 'unknown datatype "FLOAT"'),
    "wrong datatype": (
        changed(datatype="INT64", data=[0] * ONE.size),
        "data-type is 'INT64', but model 'small' expects 'FP32'",
    ),
    "negative size": (changed(shape=[-1, 3, SIZE, SIZE]), "shape is [-1, 3, 16, 16]"),
    "size no integer": (changed(shape=[1.0, 3, SIZE, SIZE]), "shape is [1.0, 3, 16, 16]"),
    "huge size": (changed(shape=[2**62, 2**62]), "expected at most 16 sizes"),
    "wrong rank": (changed(shape=[3, SIZE, SIZE]), "Expected [-1,3,16,16], got [3,16,16]"),
    "wrong shape": (changed(shape=[1, 3, 8, 32]), "Expected [-1,3,16,16], got [1,3,8,32]"),
    "zero batch": (changed(shape=[0, 3, SIZE, SIZE], data=[]), "got [0,3,16,16]"),
    "shape against data": (changed(data=[0.0]), "does not fit shape [1, 3, 16, 16]"),
    "ragged": (changed(data=[[1], [2, 3]]), "is not a list of numbers, or ragged"),
    "text for a number": (changed(data=["1"] * ONE.size), "something else than FP32 numbers"),
    "null for a number": (changed(data=[None] * ONE.size), "something else than FP32 numbers"),
    "beyond float32": (changed(data=[1e39] * ONE.size), "holds numbers beyond FP32"),
    "NaN": (json.dumps(tensor(NAN)), "NaN is not JSON"),
    "batch over the largest": (
        {"inputs": [tensor(np.zeros((5, 3, SIZE, SIZE), np.float32))]},
        "batch-size must be <= 4 for 'small', got 5",
    ),
    "FP16 as JSON in": (changed(datatype="FP16"), "receiving FP16 data via JSON is not supported"),
    "FP16 as JSON out": (
        {"inputs": [GOOD], "parameters": {"output_datatype": "FP16"}},
        "sending FP16 data via JSON is not supported",
    ),
    "classification": (
        {
            "inputs": [GOOD],
            "outputs": [{"name": "pooler_output", "parameters": {"classification": 2}}],
        },
        "classification is not supported",
    ),
    "id no string": ({"inputs": [GOOD], "id": 7}, "'id' is 7; expected a string"),
    "timeout no number": (
        {"inputs": [GOOD], "parameters": {"timeout": "soon"}},
        "parameter 'timeout' is 'soon'",
    ),
    "binary size alone": (changed(parameters={"binary_data_size": 4}), "expected one of them"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_requests(server: Server, case: str) -> None:
    body, message = BAD_JSON[case]
    reply = server.infer("small", body)
    assert (reply.status, list(reply.document)) == (400, ["error"]), reply.body
    assert message in reply.document["error"]


def test_bad_http_requests(server: Server) -> None:
    def refused(body: bytes, headers: dict[str, str], model: str = "small") -> str:
        reply = server.infer(model, body, **headers)
        assert reply.status == 400, reply.body
        return str(reply.document["error"])

    raw = ONE.tobytes()
    body, headers = http_request("pixel_values", "FP32", ONE.shape, raw)
    assert "expecting 4 additional bytes" in refused(body[:-4], headers)
    assert "unexpected additional input data: 4 bytes" in refused(body + b"1234", headers)
    short, its = http_request("pixel_values", "FP32", ONE.shape, raw[:-4])
    assert "input byte size mismatch for input 'pixel_values'" in refused(short, its)
    nan, its = http_request("pixel_values", "FP32", ONE.shape, NAN.tobytes())
    assert "NaN or Inf in image 0" in refused(nan, its)
    for wrong in ("-1", "+5", "x", "1e3", str(len(body) + 1), "9" * 30):
        told = refused(body, {"Inference_Header_Content_Length": wrong})
        assert "Inference-Header-Content-Length" in told
    raw_request = {"Inference_Header_Content_Length": "0"}
    assert "input byte size mismatch for input 'pixel_values'" in refused(b"GIF", raw_request)
    assert "image 0: is empty" in refused(b"", raw_request, "small_images")


def test_bad_images_are_named_by_index(server: Server, photos: list[Path]) -> None:
    good = photos[0].read_bytes()
    for bad, reason in ((b"no image", "is not an image file"), (good[: len(good) // 2], "cannot")):
        body, headers = http_request("images", "BYTES", (2, 1), bytes_tensor(good, bad))
        reply = server.infer("small_images", body, **headers)
        assert reply.status == 400
        assert reply.document["error"].startswith("input 'images', image 1: ")
        assert reason in reply.document["error"]
        assert " object at 0x" not in reply.document["error"]
    image = {"name": "images", "shape": [1, 1], "datatype": "BYTES"}
    image["data"] = [base64.b64encode(good).decode()]
    reply = server.infer("small_images", {"inputs": [image]})
    assert (reply.status, '"base64": true' in reply.document["error"]) == (400, True)
    reply = server.infer("small_images", {"inputs": [{**image, "parameters": {"base64": True}}]})
    assert reply.status == 200
    for elements, its in (
        (bytes_tensor(good)[:-1], "incomplete string data"),
        (b"\1\0", "incomplete"),
    ):
        body, headers = http_request("images", "BYTES", (1, 1), elements)
        assert its in server.infer("small_images", body, **headers).document["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nowhere", 404, "there is nothing at this path"),
        ("GET", "/v2/models/none", 404, "Request for unknown model: 'none' is not found"),
        ("GET", "/v2/models/none/ready", 404, "Request for unknown model"),
        ("GET", "/v2/models/small/versions/9", 404, "'small' version 9 is not found"),
        ("POST", "/v2/models/none/infer", 404, "Request for unknown model"),
        ("GET", "/v2/models/small/infer", 405, "GET is not allowed here"),
        ("DELETE", "/v2", 405, "DELETE is not allowed here"),
        ("POST", "/v2/repository/models/small/unload", 503, "--model-control"),
    ],
)
def test_wrong_paths(server: Server, method: str, path: str, status: int, message: str) -> None:
    reply = server.ask(method, path)
    assert (reply.status, list(reply.document)) == (status, ["error"])
    assert message in reply.document["error"]


def test_large_and_oddly_encoded_bodies(server: Server) -> None:
    assert server.infer("small", b"x" * (1 << 20) + b"y").status == 413
    bomb = gzip.compress(b" " * (8 << 20))
    assert server.infer("small", bomb, Content_Encoding="gzip").status == 413
    assert server.infer("small", b"{}", Content_Encoding="br").status == 415
    broken = server.infer("small", gzip.compress(b"{}")[:-3], Content_Encoding="gzip")
    assert (broken.status, broken.document) == (400, {"error": "the body is not gzip data"})


def test_what_is_not_http_is_answered_as_json(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        received = b"".join(iter(lambda: connection.recv(4096), b""))
    assert received.startswith(b"HTTP/1.1 400 ")
    assert list(json.loads(received.partition(b"\r\n\r\n")[2])) == ["error"]


def test_statistics_and_metrics_count(pristine_bundle: Path, pixels: np.ndarray) -> None:
    with serving(f"small={pristine_bundle}") as server:
        for _ in range(3):
            assert server.infer("small", {"inputs": [tensor(pixels)]}).status == 200
        assert server.infer("small", "{").status == 400
        (stats,) = server.ask("GET", "/v2/models/small/stats").document["model_stats"]
        text = server.ask("GET", "/metrics").body.decode()
    assert (stats["inference_count"], stats["execution_count"]) == (9, 3)
    assert stats["inference_stats"]["success"]["count"] == 3
    assert stats["inference_stats"]["fail"]["count"] == 1
    assert [row["batch_size"] for row in stats["batch_stats"]] == [3]
    labels = 'model="small",version="1"'
    for line in (
        f"nv_inference_request_success{{{labels}}} 3",
        f"nv_inference_count{{{labels}}} 9",
        f"nv_inference_exec_count{{{labels}}} 3",
        'nv_inference_request_failure{model="small",reason="OTHER",version="1"} 1',
        f"nv_inference_pending_request_count{{{labels}}} 0",
    ):
        assert line in text.splitlines()


def test_key(pristine_bundle: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("geheim\n")
    with serving(pristine_bundle, "--key-file", key) as server:
        assert server.ask("GET", "/v2/health/ready").status == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}):
            for method, path in (("GET", "/v2"), ("POST", "/v2/models/small/infer")):
                reply = server.ask(method, path, headers=headers)
                assert (reply.status, list(reply.document)) == (401, ["error"])
        assert server.ask("GET", "/v2", headers={"Authorization": "Bearer geheim"}).status == 200


def test_versions_and_reload(pristine_bundle: Path, tmp_path: Path, pixels: np.ndarray) -> None:
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "2").symlink_to(pristine_bundle)
    asked = {"inputs": [tensor(pixels)]}
    with serving(f"m={tmp_path / 'many'}", "--model-control") as server:
        assert server.infer("m", asked).document["model_version"] == "2"
        (tmp_path / "many" / "10").symlink_to(pristine_bundle)
        assert server.ask("POST", "/v2/repository/models/m/load", {}).status == 200
        assert server.infer("m", asked).document["model_version"] == "10"
        assert server.ask("GET", "/v2/models/m").document["versions"] == ["2", "10"]
        (tmp_path / "many" / "11").mkdir()
        failed = server.ask("POST", "/v2/repository/models/m/load", {})
        assert (failed.status, "is not a bundle" in failed.document["error"]) == (400, True)
        assert server.infer("m", asked).document["model_version"] == "10"
        assert server.ask("POST", "/v2/repository/models/m/unload", {}).status == 200
        assert server.infer("m", asked).status == 503
        assert server.ask("GET", "/v2/health/ready").status == 503


def test_an_image_larger_than_allowed(pristine_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (101, 100)).save(tmp_path / "large.png")
    with serving(f"small={pristine_bundle}", "--max-pixels", 10_000) as server:
        body = (tmp_path / "large.png").read_bytes()
        reply = server.infer("small_images", body, Inference_Header_Content_Length="0")
    assert (reply.status, "101 x 100 pixels" in reply.document["error"]) == (400, True)


@pytest.mark.parametrize(
    ("words", "preferred"), [((), 8), (("--max-batch", 5), 5), (("--preferred-batch", 3), 3)]
)
def test_how_many_images_share_a_run(
    pristine_bundle: Path, words: tuple[str | int, ...], preferred: int
) -> None:
    with serving(f"small={pristine_bundle}", *words) as server:
        config = server.ask("GET", "/v2/models/small/config").document
        assert config["dynamic_batching"]["preferred_batch_size"] == [preferred]
