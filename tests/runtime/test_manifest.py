from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import BundleError
from regraft.manifest import GRAPHS, SCHEMA, FileRecord, Manifest, Sites
from regraft.preprocessing import Preprocessing
from regraft.redirect import RedirectOptions
from regraft.tokens import TokenLayout

text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
file_names = st.from_regex(r"[a-z][a-z0-9_.-]{0,12}", fullmatch=True).filter(
    lambda name: ".." not in name
)
finite = st.floats(-1e6, 1e6, allow_nan=False)
sizes = st.tuples(st.integers(1, 4096), st.integers(1, 4096))
colours = st.tuples(finite, finite, finite)


@st.composite
def redirects(draw: st.DrawFn) -> RedirectOptions:
    registers = draw(st.integers(1, 5))
    return RedirectOptions(
        value=draw(st.sampled_from(["per-neuron", "per-layer", "constant"])),
        cls=draw(st.sampled_from(["zero", "keep"])),
        patches=draw(st.sampled_from(["zero", "mean", "only-outliers", "keep"])),
        registers=registers,
        scale=tuple(draw(st.lists(finite, min_size=registers, max_size=registers))),
    )


preprocessings = st.builds(
    Preprocessing,
    image_size=sizes,
    mean=colours,
    std=st.tuples(*[st.floats(1e-3, 10)] * 3),
    resize=st.sampled_from(["shortest-edge", "cover", "fit", "exact", "none"]),
    resize_size=sizes,
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]),
    crop_offset=st.sampled_from(["round", "floor"]),
    fill=st.tuples(*[st.integers(0, 255)] * 3),
    rescale=st.floats(1e-6, 10),
)
tokens = st.builds(
    TokenLayout,
    class_token=st.booleans(),
    prefix=st.integers(0, 9),
    grid=sizes,
    width=st.integers(1, 4096),
    depth=st.integers(1, 60),
    heads=st.integers(1, 32),
    test_time_registers=st.integers(1, 8),
)
manifests = st.builds(
    Manifest,
    model=st.dictionaries(text, text, max_size=3),
    preprocessing=preprocessings,
    tokens=tokens,
    redirect=redirects(),
    layers=st.lists(st.integers(0, 60), min_size=1, max_size=5).map(tuple),
    detection_layer=st.integers(0, 60),
    threshold=st.floats(0, 1e6),
    outputs=st.dictionaries(
        text, st.lists(st.integers(1, 999) | st.just("batch"), max_size=4).map(tuple), max_size=4
    ),
    precision=st.sampled_from(["fp32", "fp16", "bf16"]),
    opset=st.integers(17, 25),
    sites=st.builds(
        Sites,
        token=st.integers(0, 3),
        redirect=st.integers(0, 40),
        output=st.integers(0, 9),
        mended=st.lists(text, max_size=4).map(tuple),
    ),
    graphs=st.dictionaries(st.sampled_from(GRAPHS), file_names, max_size=4),
    files=st.dictionaries(
        file_names, st.builds(FileRecord, sha256=text, bytes=st.integers(0, 2**50)), max_size=4
    ),
    versions=st.dictionaries(text, text, max_size=3),
    verified=st.booleans(),
)


@given(manifests)
def test_a_manifest_survives_its_file(manifest: Manifest) -> None:
    data = json.loads(json.dumps(manifest.to_json(), allow_nan=False))
    assert Manifest.from_json(data) == manifest
    assert (data["schema"], data["input"]["shape"]) == (1, ["batch", 3, *manifest.image_size])


@pytest.fixture
def data(pristine_bundle: Any) -> Any:
    return json.loads((pristine_bundle / "manifest.json").read_text())


def reading(data: Any) -> str:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(data, "bundle/manifest.json")
    return str(caught.value)


@pytest.mark.parametrize("other", [None, [], "manifest", {}, {"schema": "1"}])
def test_what_is_no_manifest_is_refused(other: Any) -> None:
    assert reading(other) == (
        'bundle/manifest.json: is not a manifest; expected a JSON object with "schema"'
    )


def test_a_newer_schema_is_refused(data: Any) -> None:
    assert reading({**data, "schema": SCHEMA + 1}) == (
        f"bundle/manifest.json: schema {SCHEMA + 1} is newer than {SCHEMA}, the newest this "
        "version reads; upgrade regraft-runtime"
    )


def test_every_field_is_needed_and_named(data: Any) -> None:
    for field in set(data) - {"schema", "input"}:
        without = copy.deepcopy(data)
        del without[field]
        assert reading(without) == (
            f"bundle/manifest.json: the field '{field}' is missing; export again"
        )


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("tokens", "grid", [3]),
        ("tokens", "width", "wide"),
        ("outliers", "threshold", "high"),
        ("preprocessing", "mean", [0, 0]),
        ("redirect", "layers", 3),
    ],
)
def test_a_malformed_field_is_refused(data: Any, section: str, field: str, value: Any) -> None:
    data[section][field] = value
    message = reading(data)
    assert message.startswith("bundle/manifest.json: a field is malformed (")
    assert message.endswith("); export again")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "..", "a\\..\\b", "C:x", "", "."]
)
@pytest.mark.parametrize("place", ["files", "graphs"])
def test_a_file_name_that_leaves_the_bundle_is_refused(data: Any, place: str, name: str) -> None:
    if place == "files":
        data["files"][name] = {"sha256": "0", "bytes": 1}
    else:
        data["graphs"]["model"] = name
    assert reading(data) == (
        f"bundle/manifest.json: the file name {name!r} leaves the bundle; refused"
    )
