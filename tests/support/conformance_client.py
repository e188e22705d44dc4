"""The conformance suite's calls, made with the real tritonclient; runs in its environment.

python conformance_client.py HTTP_PORT GRPC_PORT OUT.json OUT.npz IMAGE...

Every case is a call; what came of it goes to OUT.json: ``answer``, or ``status`` and ``message`` of
an error. Arrays go to OUT.npz as CASE/OUTPUT.
"""

import http.client
import json
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

HTTP_PORT, GRPC_PORT = map(int, sys.argv[1:3])
OUT_JSON, OUT_NPZ = sys.argv[3:5]
FILES = [Path(name).read_bytes() for name in sys.argv[5:]]
MODEL, IMAGES = "vit", "vit_images"

outcomes = {}
arrays = {}
over_http = triton_http.InferenceServerClient(f"127.0.0.1:{HTTP_PORT}")
over_grpc = triton_grpc.InferenceServerClient(f"127.0.0.1:{GRPC_PORT}")
CLIENTS = {"http": (triton_http, over_http), "grpc": (triton_grpc, over_grpc)}
SHAPE = over_http.get_model_metadata(MODEL)["inputs"][0]["shape"][1:]
PIXELS = np.random.default_rng(5).normal(size=(3, *SHAPE)).astype(np.float32)
ONE = PIXELS[:1]
RAW = ONE.tobytes()


def case(name, call):
    try:
        outcomes[name] = {"answer": call(name)}
    except InferenceServerException as error:
        status = str(error.status()).removeprefix("StatusCode.")
        outcomes[name] = {"status": status, "message": error.message()}
    except grpc.RpcError as error:
        outcomes[name] = {"status": error.code().name, "message": error.details()}


def keep(name, result):
    """What a client sees of an answer, its arrays apart."""
    answer = result.get_response()
    if not isinstance(answer, dict):
        outputs = [(o.name, o.datatype, list(o.shape)) for o in answer.outputs]
        about = (answer.model_name, answer.model_version, answer.id)
    else:
        outputs = [(o["name"], o["datatype"], o["shape"]) for o in answer["outputs"]]
        about = (answer["model_name"], answer["model_version"], answer.get("id", ""))
    for output, datatype, _ in outputs:
        if datatype == "BYTES":
            continue
        arrays[f"{name}/{output}"] = result.as_numpy(output)
    # By name, as clients look them up: Triton orders them by its own lights.
    return {"model": about, "outputs": sorted(outputs)}


def tensor(library, array, name="pixel_values", datatype="FP32", **more):
    made = library.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, **more)
    return made


def misshapen(library, shape, array=ONE, datatype="FP32"):
    """An input that says another shape than its bytes have."""
    made = tensor(library, array)
    made.set_shape(shape)
    if datatype != "FP32":
        holder = made._input if library is triton_grpc else made
        setattr(holder, "datatype" if library is triton_grpc else "_datatype", datatype)
    return made


def encoded(library, files, name="images"):
    return tensor(library, np.array([[file] for file in files], object), name, "BYTES")


def about_the_server(kind, library, client):
    case(f"{kind}: live", lambda _: client.is_server_live())
    case(f"{kind}: ready", lambda _: client.is_server_ready())
    for name, version in ((MODEL, ""), (MODEL, "1"), (IMAGES, ""), ("none", ""), (MODEL, "9")):
        case(
            f"{kind}: ready {name} {version}",
            lambda _, n=name, v=version: client.is_model_ready(n, v),
        )
    plain = {"as_json": True} if library is triton_grpc else {}

    def metadata(name):
        found = client.get_model_metadata(name, **plain)
        tensors = {
            side: [(t["name"], t["datatype"], list(map(int, t["shape"]))) for t in found[side]]
            for side in ("inputs", "outputs")
        }
        return {"name": found["name"], "versions": found["versions"], **tensors}

    def config(name):
        found = client.get_model_config(name, **plain)
        found = found.get("config", found)
        tensors = {
            side: [(t["name"], t["data_type"], list(map(int, t["dims"]))) for t in found[side]]
            for side in ("input", "output")
        }
        return {"name": found["name"], "max_batch_size": found["max_batch_size"], **tensors}

    for name in (MODEL, IMAGES, "none"):
        case(f"{kind}: metadata {name}", lambda _, n=name: metadata(n))
        case(f"{kind}: config {name}", lambda _, n=name: config(n))
    case(f"{kind}: metadata version 9", lambda _: client.get_model_metadata(MODEL, "9"))
    case(f"{kind}: statistics none", lambda _: client.get_inference_statistics("none"))

    def index(_):
        found = client.get_model_repository_index(**plain)
        rows = found.get("models", []) if isinstance(found, dict) else found
        states = sorted((row["name"], row["version"], row["state"]) for row in rows)
        return [row for row in states if row[0] in (MODEL, IMAGES)]  # Triton has the parts as well

    case(f"{kind}: index", index)
    case(f"{kind}: server metadata", lambda _: sorted(client.get_server_metadata(**plain)))
    case(f"{kind}: load without model control", lambda _: client.load_model(MODEL))
    case(f"{kind}: unload without model control", lambda _: client.unload_model(MODEL))


def counted(kind, library, client):
    """What a known number of requests adds to the statistics."""

    def read():
        plain = {"as_json": True} if library is triton_grpc else {}
        (row,) = client.get_inference_statistics(MODEL, **plain)["model_stats"]
        stats = row["inference_stats"]
        names = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        counts = {name: int(stats[name].get("count", 0)) for name in names}
        return {
            **counts,
            "inferences": int(row.get("inference_count", 0)),
            "executions": int(row.get("execution_count", 0)),
        }

    def settled():
        # Triton counts a request after it has answered it.
        last, now = None, read()
        while now != last:
            time.sleep(0.1)
            last, now = now, read()
        return now

    def difference(_):
        before = settled()
        for _i in range(4):
            client.infer(MODEL, [tensor(library, PIXELS)])
        return {name: value - before[name] for name, value in settled().items()}

    case(f"{kind}: statistics", difference)


def good_inference(kind, library, client):
    def infer(name, model, inputs, outputs=None, **more):
        return keep(name, client.infer(model, inputs, outputs=outputs, **more))

    pixels, wanted = tensor(library, PIXELS), library.InferRequestedOutput
    names = [output["name"] for output in over_http.get_model_metadata(MODEL)["outputs"]]
    some = names[::-1][:2]
    case(f"{kind}: infer", lambda n: infer(n, MODEL, [pixels]))
    case(f"{kind}: version 1", lambda n: infer(n, MODEL, [pixels], model_version="1"))
    case(f"{kind}: id", lambda n: infer(n, MODEL, [pixels], request_id="a b-7"))
    case(f"{kind}: some outputs", lambda n: infer(n, MODEL, [pixels], [wanted(s) for s in some]))
    large = np.concatenate([PIXELS] * 11)[:32]
    case(f"{kind}: largest batch", lambda n: infer(n, MODEL, [tensor(library, large)]))
    case(f"{kind}: timeout", lambda n: infer(n, MODEL, [pixels], timeout=30_000_000))
    case(f"{kind}: priority", lambda n: infer(n, MODEL, [pixels], priority=0))
    case(f"{kind}: own parameter", lambda n: infer(n, MODEL, [pixels], parameters={"mine": "x"}))
    for how in ("gzip", "deflate"):
        key = "request_compression_algorithm" if kind == "http" else "compression_algorithm"
        case(f"{kind}: {how}", lambda n, k=key, h=how: infer(n, MODEL, [pixels], **{k: h}))
    case(f"{kind}: images", lambda n: infer(n, IMAGES, [encoded(library, FILES)]))
    case(f"{kind}: several at a time", lambda n: at_a_time(n, kind, client, pixels))


def at_a_time(name, kind, client, pixels):
    if kind == "http":
        with triton_http.InferenceServerClient(f"127.0.0.1:{HTTP_PORT}", concurrency=4) as many:
            answers = [many.async_infer(MODEL, [pixels]) for _ in range(8)]
            results = [answer.get_result() for answer in answers]
    else:
        import queue

        done = queue.Queue()
        for _ in range(8):
            client.async_infer(MODEL, [pixels], lambda result, error: done.put(error or result))
        results = [done.get(timeout=60) for _ in range(8)]
    for result in results[1:]:
        for output in ("last_hidden_state", "pooler_output"):
            np.testing.assert_allclose(
                result.as_numpy(output), results[0].as_numpy(output), rtol=1e-4, atol=1e-4
            )
    return keep(name, results[0])


def bad_inference(kind, library, client):
    def infer(name, inputs, model=MODEL, **more):
        return keep(name, client.infer(model, inputs, **more))

    pixels, wanted = tensor(library, ONE), library.InferRequestedOutput
    empty = np.zeros((0, *SHAPE), np.float32)
    large = np.concatenate([PIXELS] * 11)
    c, h, w = SHAPE
    cases = {
        "unknown model": lambda n: infer(n, [pixels], "none"),
        "unknown version": lambda n: infer(n, [pixels], model_version="9"),
        "version no number": lambda n: infer(n, [pixels], model_version="x"),
        "unknown input": lambda n: infer(n, [tensor(library, ONE, "zz")]),
        "no input": lambda n: infer(n, []),
        "an input twice": lambda n: infer(n, [pixels, pixels]),
        "one input more": lambda n: infer(n, [pixels, tensor(library, ONE, "zz")]),
        "unknown output": lambda n: infer(n, [pixels], outputs=[wanted("zz")]),
        "an output twice": lambda n: infer(n, [pixels], outputs=[wanted("pooler_output")] * 2),
        "wrong datatype": lambda n: infer(
            n, [tensor(library, ONE.astype(np.int64), datatype="INT64")]
        ),
        "unknown datatype": lambda n: infer(n, [misshapen(library, ONE.shape, datatype="FLOAT")]),
        "wrong rank": lambda n: infer(n, [tensor(library, ONE[0])]),
        "wrong shape": lambda n: infer(n, [tensor(library, ONE.reshape(1, c, h // 2, w * 2))]),
        "zero batch": lambda n: infer(n, [tensor(library, empty)]),
        "negative size": lambda n: infer(n, [misshapen(library, [-1, c, h, w])]),
        "more than its shape": lambda n: infer(n, [misshapen(library, ONE.shape, PIXELS)]),
        "less than its shape": lambda n: infer(n, [misshapen(library, [2, c, h, w])]),
        "batch over the largest": lambda n: infer(n, [tensor(library, large)]),
        "no image": lambda n: infer(n, [encoded(library, [FILES[0], b"no image"])], IMAGES),
        "empty image": lambda n: infer(n, [encoded(library, [b""])], IMAGES),
        "classification": lambda n: infer(
            n, [pixels], outputs=[wanted("pooler_output", class_count=1)]
        ),
        "unknown shared memory": lambda n: infer(n, [in_shared_memory(library)]),
    }
    for name, call in cases.items():
        case(f"{kind}: {name}", call)


def in_shared_memory(library):
    made = library.InferInput("pixel_values", list(ONE.shape), "FP32")
    made.set_shared_memory("nowhere", ONE.nbytes)
    return made


def http_alone():
    """What tritonclient does not send, in bytes of our own."""
    one = {"name": "pixel_values", "shape": list(ONE.shape), "datatype": "FP32"}
    listed = {**one, "data": ONE.ravel().tolist()}
    length = "Inference-Header-Content-Length"

    def post(body, headers=(), path=f"/v2/models/{MODEL}/infer", method="POST"):
        data = body if isinstance(body, bytes | str) else json.dumps(body)
        connection = http.client.HTTPConnection("127.0.0.1", HTTP_PORT, timeout=60)
        try:
            connection.request(method, path, data, dict(headers))
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise InferenceServerException(text.decode(errors="replace"), str(answer.status))
            head = answer.getheader(length)
            document = json.loads(text[: int(head)] if head else text)
            outputs = document["outputs"]
            return {o["name"]: "json" if "data" in o else "binary" for o in outputs}
        finally:
            connection.close()

    def changed(**fields):
        return {"inputs": [{**listed, **fields}]}

    def binary(raw=RAW, size=None, head_length=None, **fields):
        sized = {**one, "parameters": {"binary_data_size": len(raw) if size is None else size}}
        head = json.dumps({"inputs": [{**sized, **fields}]}).encode()
        return head + raw, {length: str(len(head) if head_length is None else head_length)}

    def images(body, size="0"):
        return post(body, {length: size}, f"/v2/models/{IMAGES}/infer")

    cases = {
        "json": lambda: post(changed()),
        "nested json": lambda: post(changed(data=ONE.tolist())),
        "binary in, json out": lambda: post(*binary()),
        "json in, binary out": lambda: post(
            {**changed(), "parameters": {"binary_data_output": True}}
        ),
        "one output binary": lambda: post(
            {
                **changed(),
                "outputs": [
                    {"name": "pooler_output", "parameters": {"binary_data": True}},
                    {"name": "last_hidden_state"},
                ],
            }
        ),
        "an image as the whole body": lambda: images(FILES[0]),
        "no image as the whole body": lambda: images(b"no image"),
        "not JSON": lambda: post("{"),
        "nothing": lambda: post(b""),
        "no object": lambda: post([]),
        "no inputs": lambda: post({}),
        "inputs no list": lambda: post({"inputs": 3}),
        "empty inputs": lambda: post({"inputs": []}),
        "no name": lambda: post({"inputs": [{k: v for k, v in listed.items() if k != "name"}]}),
        "no shape": lambda: post({"inputs": [{k: v for k, v in listed.items() if k != "shape"}]}),
        "no datatype": lambda: post(
            {"inputs": [{k: v for k, v in listed.items() if k != "datatype"}]}
        ),
        "no data": lambda: post({"inputs": [one]}),
        "negative size as JSON": lambda: post(changed(shape=[-1, *SHAPE])),
        "size no integer": lambda: post(changed(shape=[1.5, *SHAPE])),
        "text for a number": lambda: post(changed(data=["x"] * ONE.size)),
        "null for a number": lambda: post(changed(data=[None] * ONE.size)),
        "too little data": lambda: post(changed(data=[0.5])),
        "too much data": lambda: post(changed(data=[0.5] * (ONE.size + 1))),
        "ragged": lambda: post(changed(data=[[0.5], [0.5, 1]])),
        "NaN": lambda: post(json.dumps(changed()).replace("[", "[NaN, ", 3)),
        "NaN for a number": lambda: post(changed(data=[float("nan"), *ONE.ravel()[1:].tolist()])),
        "FP16 as JSON": lambda: post(changed(datatype="FP16")),
        "id no string": lambda: post({**changed(), "id": {}}),
        "bytes missing": lambda: post(binary()[0][:-4], binary()[1]),
        "bytes left": lambda: post(binary()[0] + b"1234", binary()[1]),
        "binary size too small": lambda: post(*binary(RAW[:-4])),
        "binary size negative": lambda: post(*binary(size=-4)),
        "binary size no number": lambda: post(*binary(size="x")),
        "header length too large": lambda: post(*binary(head_length=10**9)),
        "header length negative": lambda: post(*binary(head_length=-1)),
        "header length no number": lambda: post(*binary(head_length="x")),
        "numbers as the whole body": lambda: post(RAW, {length: "0"}),
        "too few numbers as the whole body": lambda: post(RAW[:-4], {length: "0"}),
        "unknown encoding": lambda: post(changed(), {"Content-Encoding": "br"}),
        "damaged gzip": lambda: post(b"no gzip", {"Content-Encoding": "gzip"}),
        "deep JSON": lambda: post("[" * 100_000),
        "unknown model as JSON": lambda: post(changed(), path="/v2/models/none/infer"),
        "unknown path": lambda: post(b"", path="/v2/nowhere"),
        "wrong method": lambda: post(b"", path=f"/v2/models/{MODEL}/infer", method="GET"),
    }
    for name, call in cases.items():
        case(f"http: {name}", lambda _, c=call: c())


def grpc_alone():
    """Calls with messages that tritonclient's own functions do not make."""
    channel = grpc.insecure_channel(f"127.0.0.1:{GRPC_PORT}")
    path = "/inference.GRPCInferenceService/ModelInfer"
    plain = channel.unary_unary(path)

    def call(request):
        body = request if isinstance(request, bytes) else request.SerializeToString()
        answer = service_pb2.ModelInferResponse.FromString(plain(body, timeout=60))
        names = sorted(o.name for o in answer.outputs)
        return {"outputs": names, "raw": len(answer.raw_output_contents)}

    def message(raw=(RAW,), contents=None, **fields):
        about = {"name": "pixel_values", "datatype": "FP32", "shape": ONE.shape, **fields}
        if contents is not None:
            about["contents"] = service_pb2.InferTensorContents(**contents)
        made = service_pb2.ModelInferRequest.InferInputTensor(**about)
        return service_pb2.ModelInferRequest(
            model_name=MODEL, inputs=[made], raw_input_contents=raw
        )

    numbers = ONE.ravel().tolist()
    cases = {
        "raw": message(),
        "typed": message((), {"fp32_contents": numbers}),
        "typed and raw": message(contents={"fp32_contents": numbers}),
        "raw twice": message((RAW, b"1234")),
        "no data": message(()),
        "another typed field": message((), {"fp64_contents": numbers}),
        "too few typed": message((), {"fp32_contents": numbers[1:]}),
        "too many typed": message((), {"fp32_contents": [*numbers, 1.0]}),
        "too many typed, wrong datatype": message((), {"int_contents": [1]}, datatype="INT8"),
        "negative size, typed": message((), {"fp32_contents": numbers}, shape=[-1, *SHAPE]),
        "no message": b"\xff\xff",
    }
    for name, request in cases.items():
        case(f"grpc: {name}", lambda _, r=request: call(r))
    nowhere = channel.unary_unary("/inference.GRPCInferenceService/Nothing")
    case("grpc: unknown call", lambda _: str(nowhere(b"", timeout=60)))
    asked = service_pb2.RepositoryIndexRequest(repository_name="x").SerializeToString()
    index = channel.unary_unary("/inference.GRPCInferenceService/RepositoryIndex")
    case("grpc: index of a named repository", lambda _: len(index(asked, timeout=60)))


for kind, (library, client) in CLIENTS.items():
    about_the_server(kind, library, client)
    good_inference(kind, library, client)
    counted(kind, library, client)
    bad_inference(kind, library, client)
http_alone()
grpc_alone()
Path(OUT_JSON).write_text(json.dumps(outcomes))
np.savez(OUT_NPZ, **arrays)
