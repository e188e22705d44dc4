"""Whatever bytes come, on either transport, the server answers, and never that it failed itself."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support import environments
from tests.support.fuzzing import Insane, Target

from regraft.serve.grpc import request as grpc_request
from regraft.serve.grpc import wire
from regraft.serve.grpc.messages import HEALTH, message, methods
from regraft.serve.refusals import Refusal

INFER = message("ModelInferRequest")
MODELS = st.sampled_from(["m", "m_images"])
LENGTH = b"inference-header-content-length"
HEADERS = st.lists(
    st.tuples(
        st.sampled_from([LENGTH, b"content-encoding", b"content-length", b"authorization"]),
        st.sampled_from([b"0", b"10", b"gzip", b"deflate", b"identity"]) | st.binary(max_size=8),
    ),
    max_size=3,
)
PARAMETER = st.fixed_dictionaries(
    {},
    optional={
        "int64_param": st.integers(-(2**63), 2**63 - 1),
        "string_param": st.text(max_size=4),
        "double_param": st.floats(),
        "bool_param": st.booleans(),
        "uint64_param": st.integers(0, 2**64 - 1),
    },
)
NAMES = st.sampled_from(
    ["timeout", "output_datatype", "classification", "shared_memory_region", "binary_data", "x"]
)
PARAMETERS = st.dictionaries(NAMES, PARAMETER, max_size=2)
NUMBERS = {
    "bool_contents": st.booleans(),
    "int_contents": st.integers(-(2**31), 2**31 - 1),
    "int64_contents": st.integers(-(2**63), 2**63 - 1),
    "uint_contents": st.integers(0, 2**32 - 1),
    "uint64_contents": st.integers(0, 2**64 - 1),
    "fp32_contents": st.floats(width=32),
    "fp64_contents": st.floats(),
    "bytes_contents": st.binary(max_size=6),
}
INPUT = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["pixel_values", "images", "", "x\n"]),
        "datatype": st.sampled_from(["FP32", "UINT8", "BYTES", "BOOL", "FP16", "BF16", "INT8", ""]),
        "shape": st.sampled_from([[1, 3, 2, 2], [1, 1], [1, 1, 1, 3], []])
        | st.lists(st.integers(-1, 3) | st.integers(-(2**63), 2**63 - 1), max_size=5),
    },
    optional={
        "parameters": PARAMETERS,
        "contents": st.fixed_dictionaries(
            {}, optional={name: st.lists(kind, max_size=13) for name, kind in NUMBERS.items()}
        ),
    },
)
REQUEST = st.fixed_dictionaries(
    {"model_name": MODELS},
    optional={
        "inputs": st.lists(INPUT, max_size=2),
        "outputs": st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(["a", "x"]), "parameters": PARAMETERS}),
            max_size=2,
        ),
        "raw_input_contents": st.lists(
            st.binary(max_size=60) | st.binary(min_size=48, max_size=48), max_size=2
        ),
        "parameters": PARAMETERS,
        "id": st.text(max_size=4),
    },
)


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.close()


@given(MODELS, HEADERS, st.binary(max_size=200))
@example("m", [(LENGTH, b"0")], struct.pack("<12f", *range(12)))
def test_any_http_request(
    target: Target, model: str, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    target.http("POST", f"/v2/models/{model}/infer", headers, body)


@given(st.sampled_from(["GET", "POST", "PUT", "HEAD", "x"]), st.text(max_size=20), st.binary())
def test_any_path(target: Target, method: str, path: str, body: bytes) -> None:
    target.http(method, f"/v2/{path}", [], body)


@given(st.sampled_from(sorted({**methods(), **methods(HEALTH)})), st.binary(max_size=200))
def test_any_bytes_over_grpc(target: Target, method: str, body: bytes) -> None:
    target.grpc(method, body)


@given(REQUEST, st.binary(max_size=10))
def test_any_grpc_request(target: Target, fields: dict[str, Any], tail: bytes) -> None:
    target.grpc("ModelInfer", _parameters_apart(fields).SerializeToString() + tail)


@given(REQUEST, st.binary(max_size=10))
def test_raw_contents_are_found_as_protobuf_finds_them(fields: dict[str, Any], tail: bytes) -> None:
    body = _parameters_apart(fields).SerializeToString() + tail
    try:
        found = wire.read(body, 1 << 20)
    except Refusal:
        return
    whole = INFER.FromString(body)
    assert [bytes(raw) for raw in found.raw] == list(whole.raw_input_contents)
    del whole.raw_input_contents[:]
    assert found.message == whole


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=8))
def test_numbers_come_back(numbers: list[float]) -> None:
    array = np.array(numbers, np.float32)
    tensor = {"name": "x", "datatype": "FP32", "shape": [len(numbers)]}
    forms = (
        INFER(inputs=[tensor], raw_input_contents=[array.tobytes()]),
        INFER(inputs=[{**tensor, "contents": {"fp32_contents": numbers}}]),
    )
    for form in forms if numbers else ():
        parsed = grpc_request.parse(wire.read(form.SerializeToString(), 1 << 20))
        np.testing.assert_array_equal(parsed.inputs[0].data, array)


def test_what_is_not_raw_has_a_limit_of_its_own() -> None:
    body = INFER(model_name="m" * 100, raw_input_contents=[bytes(1000)]).SerializeToString()
    assert len(wire.read(body, 102).raw[0]) == 1000
    with pytest.raises(Refusal, match="without raw_input_contents is larger than 101 bytes"):
        wire.read(body, 101)


def test_a_failure_would_be_found(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("planted")

    body = struct.pack("<12f", *range(12))
    assert target.http("POST", "/v2/models/m/infer", [(LENGTH, b"0")], body) == 200
    monkeypatch.setattr("regraft.serve.signature.Signature.check_input", broken)
    with pytest.raises(Insane):
        target.http("POST", "/v2/models/m/infer", [(LENGTH, b"0")], body)
    with pytest.raises(Insane):
        target.grpc("ModelInfer", INFER(model_name="m").SerializeToString())


@pytest.mark.slow
def test_guided_by_coverage(tmp_path: Path) -> None:
    requirements = [
        *environments.RUNTIME[:2],
        *("atheris==3.0.0", "uvicorn==0.54.0", "grpcio==1.85.1", "protobuf==7.36.2"),
    ]
    python = environments.environment("atheris", requirements)
    script = environments.WORKSPACE / "tests" / "support" / "fuzz_atheris.py"
    paths = f"{environments.variables()['PYTHONPATH']}:{environments.WORKSPACE}"
    env = environments.variables(PYTHONPATH=paths)
    (tmp_path / "corpus").mkdir()

    def run(*words: object) -> str:
        # Through a shell that forks: a process keeps the peak memory of what it was forked from
        # (getrusage), which libFuzzer would take for its own, and a test worker's is large.
        forked = ("sh", "-c", '"$@"; exit $?', "sh")
        done = subprocess.run(
            [str(word) for word in (*forked, python, script, *words)],
            capture_output=True,
            text=True,
            check=False,
            env=env,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stderr

    run("--seeds", "corpus")
    seeds = len(list((tmp_path / "corpus").iterdir()))
    said = run("-max_total_time=60", "-timeout=10", "-rss_limit_mb=2048", "corpus")
    assert "DONE" in said
    assert len(list((tmp_path / "corpus").iterdir())) > seeds  # it was guided


def _parameters_apart(fields: dict[str, Any]) -> Any:
    """The request; maps of messages cannot be given as dicts of dicts to every protobuf."""

    def fill(made: Any, parameters: dict[str, Any]) -> None:
        for name, value in parameters.items():
            made.parameters[name].SetInParent()
            for choice, content in value.items():
                setattr(made.parameters[name], choice, content)

    plain = {k: v for k, v in fields.items() if k not in ("inputs", "outputs", "parameters")}
    request = INFER(**plain)
    fill(request, fields.get("parameters", {}))
    for kind in ("inputs", "outputs"):
        for entry in fields.get(kind, []):
            parts = {k: v for k, v in entry.items() if k != "parameters"}
            fill(getattr(request, kind).add(**parts), entry.get("parameters", {}))
    return request
