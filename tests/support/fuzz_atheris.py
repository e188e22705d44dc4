"""The coverage-guided fuzzer: python fuzz_atheris.py [libFuzzer's options] [CORPUS]; needs atheris.

The first byte chooses what the rest is: an HTTP inference request with a sound header length, one
with any header length, a compressed one, any other HTTP request, a gRPC inference request, another
gRPC call.
"""

import struct
import sys
import zlib

import atheris

with atheris.instrument_imports(include=["regraft", "json"]):
    from tests.support.fuzzing import Target

    from regraft.serve.grpc.messages import HEALTH, message, methods

_LENGTH = b"inference-header-content-length"
_ENCODING = b"content-encoding"
_PATHS = ("/v2/models/m/infer", "/v2/models/m_images/infer")
_CALLS = (*methods(), *methods(HEALTH))
target = Target()


def one(data: bytes) -> None:
    if len(data) < 4:
        return
    kind, model, rest = data[0] % 8, data[1] % 2, data[4:]
    size = struct.unpack_from("<H", data, 2)[0]
    path = _PATHS[model]
    if kind == 0:
        target.http("POST", path, [(_LENGTH, str(min(size, len(rest))).encode())], rest)
    elif kind == 1:
        target.http("POST", path, [], rest)
    elif kind == 2:
        size %= 24
        target.http("POST", path, [(_LENGTH, rest[:size])], rest[size:])
    elif kind == 3:
        encoding = (b"gzip", b"deflate", b"br", b"identity")[size % 4]
        packed = zlib.compress(rest) if size & 4 else rest
        target.http("POST", path, [(_ENCODING, encoding), (_LENGTH, b"0")], packed)
    elif kind == 4:
        size %= 40
        url = "/v2/" + rest[:size].decode("latin-1")
        target.http("POST" if model else "GET", url, [(_LENGTH, b"1")], rest[size:])
    elif kind == 5:
        target.grpc(_CALLS[size % len(_CALLS)], rest)
    else:
        target.grpc("ModelInfer", rest)


def seeds() -> list[bytes]:
    """A request of every kind that is answered."""
    pixels = struct.pack("<12f", *range(12))
    head = (
        b'{"id":"1","inputs":[{"name":"pixel_values","shape":[1,3,2,2],"datatype":"FP32",'
        b'"parameters":{"binary_data_size":48}}],"outputs":[{"name":"a","parameters":'
        b'{"binary_data":true}}],"parameters":{"timeout":1000000,"output_datatype":"FP16"}}'
    )
    listed = (
        b'{"inputs":[{"name":"pixel_values","shape":[1,3,2,2],"datatype":"FP32",'
        b'"data":[1,2.5,3,4,5,6,7,8,9,10,11,1e2]}],"parameters":{"binary_data_output":false}}'
    )
    encoded = (
        b'{"inputs":[{"name":"images","shape":[1,1],"datatype":"BYTES",'
        b'"parameters":{"base64":true},"data":["R0lGODlhAQABAAAAACw="]}]}'
    )
    gif = b"GIF89a\x01\0\x01\0\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"
    tensor = {"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 2, 2]}
    infer = message("ModelInferRequest")
    raw = infer(
        model_name="m",
        id="1",
        inputs=[tensor],
        outputs=[{"name": "a"}],
        raw_input_contents=[pixels],
    )
    raw.parameters["timeout"].int64_param = 1_000_000
    typed = infer(model_name="m", inputs=[{**tensor, "contents": {"fp32_contents": range(12)}}])
    file = {"name": "images", "datatype": "BYTES", "shape": [1, 1]}
    image = infer(model_name="m_images", inputs=[{**file, "contents": {"bytes_contents": [gif]}}])
    small = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3]}
    rgb = infer(
        model_name="m_images", inputs=[{**small, "contents": {"uint_contents": [1, 2, 255]}}]
    )
    size = struct.pack("<H", len(head))
    found = [b"\0\0" + size + head + pixels, b"\1\0\0\0" + listed, b"\1\1\0\0" + encoded]
    found += [b"\3\1\7\0" + gif, b"\3\1\5\0" + gif, b"\2\1\1\0" + b"0" + gif, b"\4\0\x09\0models/m"]
    found += [b"\6\0\0\0" + made.SerializeToString() for made in (raw, typed, image, rgb)]
    asked = message("ModelStatisticsRequest")(name="m", version="1").SerializeToString()
    found += [b"\5\0" + struct.pack("<H", n) + asked for n in range(len(_CALLS))]
    return found


def main() -> None:
    if sys.argv[1:2] == ["--seeds"]:
        for number, seed in enumerate(seeds()):
            with open(f"{sys.argv[2]}/{number:02d}", "wb") as file:  # noqa: PTH123
                file.write(seed)
            one(seed)
        return
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
