"""One suite of calls, made with the real tritonclient, to `regraft serve` and to a real Triton.

Both serve the same bundle; answers must have the same shapes and numbers, refusals the same status.
What differs stands in DIFFERENCES with the reason, and nothing in that table may be untrue either.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import bundles, environments, pictures, triton_server
from tests.support.server import serving

pytestmark = pytest.mark.slow
CLIENT = environments.WORKSPACE / "tests" / "support" / "conformance_client.py"
ANSWERED = "answered"
TRITONS_500 = "a malformed request is the client's error (mended in Triton after 2.51)"
TWICE = "an output named twice is a mistake; Triton answers it once"
CLASSES = "features have no classes; the extension is not offered"
SHARED = "the shared memory extension is not offered"
UNKNOWN = "every call that names an unknown model says so in the same way"
# Case -> what Triton does, what regraft does, why.
DIFFERENCES: dict[str, tuple[str, str, str]] = {
    "http: statistics none": ("400", "404", UNKNOWN),
    "grpc: statistics none": ("INVALID_ARGUMENT", "NOT_FOUND", UNKNOWN),
    "grpc: version no number": ("INVALID_ARGUMENT", "NOT_FOUND", "as both do over HTTP"),
    "http: an output twice": (ANSWERED, "400", TWICE),
    "grpc: an output twice": (ANSWERED, "INVALID_ARGUMENT", TWICE),
    "http: classification": (ANSWERED, "400", CLASSES),
    "grpc: classification": (ANSWERED, "INVALID_ARGUMENT", CLASSES),
    "http: unknown shared memory": ("404", "400", SHARED),
    "grpc: unknown shared memory": ("NOT_FOUND", "INVALID_ARGUMENT", SHARED),
    "http: NaN for a number": (ANSWERED, "400", "NaN is not JSON, and no pixel"),
    "http: unknown encoding": ("501", "415", "415 is HTTP's own status for it"),
    "grpc: raw twice": (ANSWERED, "INVALID_ARGUMENT", "what belongs to no input is not dropped"),
    "grpc: no message": ("INTERNAL", "INVALID_ARGUMENT", "it is the client's error"),
    **{
        f"http: {case}": ("500", "400", TRITONS_500)
        for case in (
            *("negative size", "not JSON", "no object", "no inputs", "inputs no list"),
            *("no name", "no shape", "no datatype", "negative size as JSON", "size no integer"),
            *("text for a number", "null for a number", "too little data", "too much data"),
            *("ragged", "id no string", "binary size negative", "binary size no number"),
            *("deep JSON",),
        )
    },
}
Outcomes = dict[str, dict[str, Any]]
Both = tuple[tuple[Outcomes, dict[str, np.ndarray]], tuple[Outcomes, dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """What Triton and regraft answered: outcomes and arrays."""
    python = triton_server.environment()
    place = tmp_path_factory.mktemp("conformance")
    bundle = bundles.exported(tmp_path_factory)
    repository = triton_server.write_repository(bundle, place / "repository")
    images = sorted(pictures.write(place / "images", 4).iterdir())
    with triton_server.running(python, repository, place) as triton:
        theirs = _outcomes(python, triton.http, triton.grpc, place / "triton", images)
    with serving(f"vit={bundle}", "--grpc-port", 0) as server:
        ours = _outcomes(python, server.port, server.grpc_port, place / "regraft", images)
        assert not [line for line in server.lines if "Traceback" in line]
    return theirs, ours


def _outcomes(
    python: Path, http: int, grpc: int, out: Path, images: list[Path]
) -> tuple[Outcomes, dict[str, np.ndarray]]:
    texts, arrays = out.with_suffix(".json"), out.with_suffix(".npz")
    words = [str(word) for word in (python, CLIENT, http, grpc, texts, arrays, *images)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(arrays) as found:
        return json.loads(texts.read_text()), dict(found)


def _in_short(outcome: dict[str, Any]) -> str:
    return outcome.get("status", ANSWERED)


def test_both_do_the_same_but_for_the_table(both: Both) -> None:
    (theirs, _), (ours, _) = both
    assert set(theirs) == set(ours)
    assert len(ours) > 120
    different = {
        case: (_in_short(theirs[case]), _in_short(ours[case]))
        for case in ours
        if _in_short(theirs[case]) != _in_short(ours[case])
    }
    assert different == {case: row[:2] for case, row in DIFFERENCES.items()}
    for case in set(ours) - set(DIFFERENCES):
        if "answer" in ours[case]:
            assert (case, ours[case]) == (case, theirs[case])


def test_the_numbers_are_the_same(both: Both) -> None:
    (_, their_arrays), (_, our_arrays) = both
    compared = 0
    for name, array in our_arrays.items():
        assert name.partition("/")[0] not in DIFFERENCES
        np.testing.assert_allclose(array, their_arrays[name], rtol=1e-4, atol=1e-4, err_msg=name)
        compared += 1
    assert compared > 100
    batch = our_arrays["grpc: largest batch/pooler_output"]
    assert len(batch) == 32
    assert np.ptp(batch, axis=0).max() > 1e-2  # not one image over and over


def test_no_refusal_is_a_servers_error_or_shows_its_inside(both: Both) -> None:
    _, (ours, _) = both
    refusals = {case: outcome for case, outcome in ours.items() if "status" in outcome}
    assert len(refusals) > 60
    for case, outcome in refusals.items():
        assert outcome["status"] not in ("500", "INTERNAL", "UNKNOWN", "CANCELLED"), case
        assert outcome["message"], case
        assert " object at 0x" not in outcome["message"]
        assert "Traceback" not in outcome["message"]


def test_our_messages_are_the_protocols() -> None:
    """Every message and field of inference.proto has tritonclient's number, type and label."""
    python = triton_server.environment()
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from google.protobuf.descriptor import FieldDescriptor
from tritonclient.grpc import model_config_pb2, service_pb2
from regraft.serve.grpc import messages

theirs = {**model_config_pb2.DESCRIPTOR.message_types_by_name}
theirs.update(service_pb2.DESCRIPTOR.message_types_by_name)
count = 0

def compare(ours, their):
    global count
    for field in ours.fields:
        other = their.fields_by_name[field.name]
        repeated = [f.is_repeated for f in (field, other)]
        assert (field.number, field.type) == (other.number, other.type), field.full_name
        assert repeated[0] == repeated[1], field.full_name
        one_of = [f.containing_oneof and f.containing_oneof.name for f in (field, other)]
        assert one_of[0] == one_of[1], field.full_name
        if field.message_type:
            assert field.message_type.full_name == other.message_type.full_name
        count += 1
    for nested in ours.nested_types:
        compare(nested, their.nested_types_by_name[nested.name])

for name in messages._POOL.FindFileByName("inference.proto").message_types_by_name:
    compare(messages.message(name).DESCRIPTOR, theirs[name])
ours = messages._POOL.FindEnumTypeByName("inference.DataType").values_by_name
others = model_config_pb2.DataType.DESCRIPTOR.values_by_name
assert {n: v.number for n, v in ours.items()} == {n: v.number for n, v in others.items()}
service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
for name, (asked, answered) in messages.methods().items():
    assert service[name].input_type.full_name == asked.DESCRIPTOR.full_name
    assert service[name].output_type.full_name == answered.DESCRIPTOR.full_name
print(count)
"""
    source = environments.WORKSPACE / "runtime" / "src"
    done = subprocess.run(
        [python, "-c", script, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
