"""The request parser: whatever the bytes, a request or a refusal, never anything else."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from regraft.serve.compression import inflate
from regraft.serve.messages import InferRequest
from regraft.serve.refusals import Refusal
from regraft.serve.rest_request import parse
from regraft.serve.rest_response import Binary

HEADERS = st.none() | st.integers(-2, 400).map(str) | st.text(max_size=6)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)
SIZES = st.lists(st.integers(0, 4) | VALUES, max_size=4)
NAMES = st.sampled_from(["FP32", "UINT8", "BYTES", "BOOL", "FP16", "BF16", "INT64", "x"])


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return usual | VALUES


INPUT = st.fixed_dictionaries(
    {"name": mostly(st.just("a")), "datatype": mostly(NAMES), "shape": mostly(SIZES)},
    optional={
        "data": VALUES,
        "parameters": mostly(
            st.fixed_dictionaries(
                {}, optional={"binary_data_size": mostly(st.integers(-1, 40)), "base64": VALUES}
            )
        ),
    },
)
REQUEST = st.fixed_dictionaries(
    {"inputs": mostly(st.lists(mostly(INPUT), max_size=3))},
    optional={"outputs": VALUES, "id": VALUES, "parameters": VALUES},
)


def expect_clear(refusal: Refusal, *statuses: int) -> None:
    assert refusal.kind.http in statuses
    assert str(refusal).isprintable()
    assert len(str(refusal)) < 1000


def parsed_or_refused(body: bytes, header: str | None) -> InferRequest | None:
    try:
        request = parse(body, header)
        Binary(request)
        request.timeout()
    except Refusal as refusal:
        expect_clear(refusal, 400, 413)
        return None
    return request


@given(st.binary(max_size=300), HEADERS)
@example(b"[" * 100_000, None)
@example(b'{"inputs":' + b"9" * 5000 + b"}", None)
def test_any_bytes(body: bytes, header: str | None) -> None:
    parsed_or_refused(body, header)


@given(mostly(REQUEST), st.binary(max_size=60), st.booleans())
def test_any_json(document: Any, tail: bytes, tailed: bool) -> None:
    head = json.dumps(document).encode()
    request = parsed_or_refused(head + tail if tailed else head, str(len(head)) if tailed else None)
    for tensor in () if request is None else request.inputs:
        assert len(np.shape(tensor.data)) == 1 or np.shape(tensor.data) == tensor.shape


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_bytes_come_back(elements: list[bytes]) -> None:
    raw = b"".join(len(e).to_bytes(4, "little") + e for e in elements)
    entry = {"name": "a", "datatype": "BYTES", "shape": [len(elements), 1]}
    document = {"inputs": [{**entry, "parameters": {"binary_data_size": len(raw)}}]}
    head = json.dumps(document).encode()
    (tensor,) = parse(head + raw, str(len(head))).inputs
    assert tensor.data == elements


@given(st.binary(max_size=200), st.sampled_from(["gzip", "deflate", "identity", "br", ""]))
def test_any_compressed_bytes(body: bytes, encoding: str) -> None:
    try:
        assert len(inflate(body, encoding, 1000)) <= 1000
    except Refusal as refusal:
        expect_clear(refusal, 400, 413, 415)
