from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.constants import Constants
from regraft.errors import BundleError
from regraft.manifest import GRAPHS, FileRecord, Manifest
from regraft.manifest_file import SCHEMA, digest
from regraft.preprocessing import Preprocessing
from regraft.redirect import RedirectOptions
from regraft.rewrite_counts import CudaFusions, Sites
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
shapes = st.lists(st.integers(1, 999) | st.just("batch"), max_size=4).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, registers: int) -> TokenLayout:
    class_token = draw(st.booleans())
    return TokenLayout(
        class_token=class_token,
        prefix=draw(st.integers(int(class_token), 9)),
        grid=draw(sizes),
        width=draw(st.integers(1, 4096)),
        depth=draw(st.integers(1, 60)),
        heads=draw(st.integers(1, 32)),
        test_time_registers=registers,
    )


@st.composite
def constants(draw: st.DrawFn, depth: int) -> Constants:
    errors = st.floats(0, 10, allow_nan=False)
    return Constants(
        first_layer=draw(st.integers(0, depth)),
        images=draw(st.integers(1, 1000)),
        pixels_sha256=draw(text),
        measured_images=draw(st.integers(1, 8)),
        errors=draw(st.dictionaries(st.integers(0, depth), errors, min_size=1, max_size=4)),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    redirect = draw(redirects())
    kv = draw(st.booleans())
    tokens = draw(layouts(0 if kv else redirect.registers))
    blocks = st.integers(0, tokens.depth - 1)
    last = {"last_hidden_state": ("batch", tokens.count, tokens.width)}
    records = st.builds(FileRecord, sha256=text, bytes=st.integers(0, 2**50))
    return Manifest(
        model=draw(st.dictionaries(text, text, max_size=3)),
        preprocessing=draw(preprocessings),
        tokens=tokens,
        redirect=redirect,
        layers=tuple(sorted(draw(st.sets(blocks, min_size=1, max_size=5)))),
        detection_layer=draw(blocks),
        threshold=draw(st.floats(0, 1e6, exclude_min=True)),
        outputs=draw(st.dictionaries(text, shapes, max_size=4)) | last,
        precision=draw(st.sampled_from(["fp32", "fp16", "bf16"])),
        opset=draw(st.integers(17, 25)),
        sites=Sites(
            token=draw(st.integers(0, 3)),
            redirect=draw(st.integers(0, 40)),
            output=draw(st.integers(0, 9)),
            mended=tuple(draw(st.lists(text, max_size=4))),
            attention=draw(st.integers(0, 40)),
        ),
        graphs=draw(st.dictionaries(st.sampled_from(GRAPHS), file_names, max_size=4)),
        files=draw(st.dictionaries(file_names, records, max_size=4)),
        versions=draw(st.dictionaries(text, text, max_size=3)),
        verified=draw(st.booleans()),
        constants=draw(constants(tokens.depth)) if kv else None,
    )


@given(manifests())
def test_a_manifest_survives_its_file(manifest: Manifest) -> None:
    data = json.loads(manifest.text())
    assert Manifest.from_json(data) == manifest
    assert data["sha256"] == digest(data)
    assert (data["schema"], data["input"]["shape"]) == (2, ["batch", 3, *manifest.image_size])


@pytest.fixture
def data(pristine_bundle: Any) -> Any:
    return json.loads((pristine_bundle / "manifest.json").read_text())


def reading(data: Any) -> str:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(data, "bundle/manifest.json")
    return str(caught.value)


@pytest.mark.parametrize("other", [None, [], "manifest", {}, {"sha256": "1"}])
def test_what_is_no_manifest_is_refused(other: Any) -> None:
    assert reading(other) == (
        'bundle/manifest.json: is not a manifest; expected a JSON object with "schema"'
    )


@pytest.mark.parametrize("schema", ["1", True, 0, -1, 1.0, None])
def test_a_schema_is_a_positive_integer(data: Any, schema: Any) -> None:
    assert reading({**data, "schema": schema}) == (
        f"bundle/manifest.json: schema is {schema!r}; expected an integer from 1 on"
    )


def test_a_newer_schema_is_refused(data: Any) -> None:
    assert reading({**data, "schema": SCHEMA + 1}) == (
        f"bundle/manifest.json: schema {SCHEMA + 1} is newer than {SCHEMA}, the newest this "
        "version reads; upgrade regraft-runtime"
    )


def test_every_field_is_needed_and_named(data: Any) -> None:
    for field in set(data) - {"schema", "input", "sha256"}:
        without = copy.deepcopy(data)
        del without[field]
        assert reading(without) == (
            f"bundle/manifest.json: the field '{field}' is missing; export again"
        )


def test_every_count_of_fusions_is_needed(data: Any) -> None:
    counts = asdict(CudaFusions(attentions=3, patches=True))
    older = {
        name: value for name, value in counts.items() if name not in ("operators", "constants")
    }
    old = {**data, "cuda": older}
    read = Manifest.from_json({**old, "sha256": digest(old)}).cuda
    assert read == CudaFusions(attentions=3, patches=True)
    for field in older:
        without = {name: value for name, value in counts.items() if name != field}
        assert reading({**data, "cuda": without}) == (
            f"bundle/manifest.json: the field '{field}' is missing; export again"
        )
    for field, value in (("attentions", True), ("constants", -1), ("patches", 1)):
        assert f"cuda.{field} is {value!r}" in reading({**data, "cuda": {**counts, field: value}})


def test_schema_1_is_read_as_the_variant_token(data: Any) -> None:
    older = {name: value for name, value in data.items() if name not in ("variant", "constants")}
    del older["sites"]["attention"]
    manifest = Manifest.from_json({**older, "schema": 1})
    assert (manifest.variant, manifest.constants, manifest.sites.attention) == ("token", None, 0)
    assert manifest == Manifest.from_json(data)


KV = {
    "first_layer": 1,
    "images": 4,
    "pixels_sha256": "ab",
    "measured_images": 2,
    "errors": {"1": 0.1, "3": 0.5},
}


def test_the_variant_kv_has_constants_and_no_register(data: Any) -> None:
    data["tokens"]["test_time_registers"] = 0
    data |= {"variant": "kv", "constants": KV}
    manifest = Manifest.from_json(data)
    assert manifest.variant == "kv"
    assert manifest.constants == Constants(1, 4, "ab", 2, {1: 0.1, 3: 0.5})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "both"}, "variant is 'both'; expected one of token, kv"),
        ({"variant": "kv", "constants": None}, "constants is None; expected an object for the"),
        ({"variant": "token"}, "; expected an object for the variant kv alone"),
        ({"constants": 3}, "constants is 3; expected an object"),
        ({"constants": {**KV, "first_layer": 4}}, "constants.first_layer is 4; expected one of "),
        ({"constants": {**KV, "images": 0}}, "constants.images is 0; expected an integer from 1"),
        ({"constants": {**KV, "errors": {"1": -1}}}, "constants.errors is {'1': -1}; expected num"),
        ({"constants": {**KV, "errors": [1]}}, "constants.errors is [1]; expected numbers"),
    ],
)
def test_a_variant_that_cannot_be_is_named(data: Any, fields: Any, message: str) -> None:
    data["tokens"]["test_time_registers"] = 0
    assert message in reading({**data, "variant": "kv", "constants": KV, **fields})


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


FROM_1 = "expected an integer from 1 on"
LAST = 'outputs["last_hidden_state"]'
BLOCKS = "of the 3 blocks, 0 to 2"
POSITIVE = "expected a finite number above 0"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("precision", "fp64", "is 'fp64'; expected one of fp32, fp16, bf16"),
        ("opset", 0, f"is 0; {FROM_1}"),
        ("opset", True, f"is True; {FROM_1}"),
        ("verified", "no", "is 'no'; expected true or false"),
        ("tokens", [], "is []; expected an object"),
        ("outputs", [], "is []; expected an object"),
        ("tokens.width", 0, f"is 0; {FROM_1}"),
        ("tokens.depth", "3", f"is '3'; {FROM_1}"),
        ("tokens.heads", -2, f"is -2; {FROM_1}"),
        ("tokens.prefix", 0, f"is 0; {FROM_1}"),
        ("tokens.test_time_registers", 2, "is 2; expected 1"),
        ("outliers.detection_layer", 3, f"is 3; expected one {BLOCKS}"),
        ("outliers.detection_layer", -1, "is -1; expected an integer from 0 on"),
        ("outliers.threshold", 0, f"is 0; {POSITIVE}"),
        ("outliers.threshold", -1.5, f"is -1.5; {POSITIVE}"),
        ("outliers.threshold", math.inf, f"is inf; {POSITIVE}"),
        ("outliers.threshold", math.nan, f"is nan; {POSITIVE}"),
        ("outliers.threshold", True, f"is True; {POSITIVE}"),
        ("outliers.threshold", None, f"is None; {POSITIVE}"),
        ("redirect.layers", [1, 0], f"is [1, 0]; expected some {BLOCKS}, ascending"),
        ("redirect.layers", [1, 1], f"is [1, 1]; expected some {BLOCKS}, ascending"),
        ("redirect.layers", [3], f"is [3]; expected some {BLOCKS}, ascending"),
        ("redirect.layers", 1, "is 1; expected a list of blocks"),
    ],
)
def test_a_field_that_cannot_be_is_named(data: Any, place: str, value: Any, message: str) -> None:
    assert reading(changed(data, place, value)) == (
        f"bundle/manifest.json: a field is malformed ({place} {message}); export again"
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("outputs", {}, f'{LAST} is missing; expected ["batch", 17, 8]'),
        ("tokens.grid", [4, 5], f'{LAST} is ["batch", 17, 8]; expected ["batch", 21, 8]'),
        (
            "outputs.last_hidden_state",
            ["batch", 16, 8],
            f'{LAST} is ["batch", 16, 8]; expected ["batch", 17, 8]',
        ),
        ("outputs.pooler_output", ["batch", 0], "outputs[\"pooler_output\"] is ['batch', 0]; "),
        ("outputs.pooler_output", 8, 'outputs["pooler_output"] is 8; expected a list of '),
        ("tokens.grid", [4, 0], "tokens.grid[1] is 0; expected an integer from 1 on"),
        ("redirect.cls", "drop", "redirect option cls is 'drop'; expected one of zero, keep"),
        ("outliers.threshold", 10**400, f"outliers.threshold is {10**400}; {POSITIVE}"),
    ],
)
def test_fields_that_do_not_fit_are_named(data: Any, place: str, value: Any, message: str) -> None:
    start = f"bundle/manifest.json: a field is malformed ({message}"
    assert reading(changed(data, place, value)).startswith(start)


def changed(data: Any, place: str, value: Any) -> Any:
    *sections, field = place.split(".")
    section = data
    for name in sections:
        section = section[name]
    section[field] = value
    return data


def test_a_file_is_read_only_as_it_was_written(pristine_bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(pristine_bundle / "manifest.json")
    path = tmp_path / "manifest.json"
    path.write_text(manifest.text())
    assert Manifest.load(path) == manifest
    path.write_text(manifest.text().replace("12.5", "12.25"))
    with pytest.raises(BundleError) as caught:
        Manifest.load(path)
    assert str(caught.value) == (
        f"{path}: was changed after export; copy the bundle again or export again"
    )


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
