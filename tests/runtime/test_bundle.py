from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from regraft.bundle import Bundle
from regraft.errors import BundleError
from regraft.manifest_file import digest


def edit_manifest(folder: Path, edit: Callable[[dict], object], *, sealed: bool = True) -> None:
    """Changes the manifest; sealed, as if export had written it so."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    if sealed:
        data["sha256"] = digest(data)
    path.write_text(json.dumps(data))


def test_an_intact_bundle_opens(pristine_bundle: Path) -> None:
    bundle = Bundle.open(pristine_bundle)
    assert bundle.graph("model") == pristine_bundle / "model.onnx"
    assert bundle.graph("baseline") == pristine_bundle / "baseline.onnx"
    assert [(n.layer, n.index) for n in bundle.neurons().neurons] == [(1, 5), (1, 7)]


def test_a_changed_byte_is_named(bundle_folder: Path) -> None:
    weights = bundle_folder / "weights.data"
    content = bytearray(weights.read_bytes())
    content[700] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle_folder)
    assert str(caught.value) == (
        f"{bundle_folder}: weights.data was changed (its sha256 differs); "
        "copy the bundle again or export again"
    )
    # The size is right, so that only the hash can tell.
    assert Bundle.open(bundle_folder, verify_hashes=False).path == bundle_folder


def test_every_offender_is_named(bundle_folder: Path) -> None:
    (bundle_folder / "neurons.json").unlink()
    size = (bundle_folder / "weights.data").stat().st_size
    with (bundle_folder / "weights.data").open("ab") as stream:
        stream.write(b"more")
    (bundle_folder / "model.onnx").write_bytes(b"cut")
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle_folder, verify_hashes=False)
    text = str(caught.value)
    assert "neurons.json is missing" in text
    assert f"weights.data has {size + 4} bytes, expected {size}" in text
    assert "model.onnx has 3 bytes, expected " in text
    assert "baseline.onnx" not in text


def test_unlisted_files_do_no_harm(bundle_folder: Path) -> None:
    (bundle_folder / ".DS_Store").write_text("")
    assert Bundle.open(bundle_folder).manifest.precision == "fp32"


def test_a_newer_schema_is_refused(bundle_folder: Path) -> None:
    edit_manifest(bundle_folder, lambda data: data.update(schema=99))
    with pytest.raises(BundleError, match=r"manifest\.json: schema 99 is newer than 2"):
        Bundle.open(bundle_folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "C:\\x", ""])
def test_a_path_that_leaves_the_bundle_is_refused(bundle_folder: Path, name: str) -> None:
    edit_manifest(
        bundle_folder, lambda data: data["files"].update({name: {"sha256": "0", "bytes": 1}})
    )
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle_folder)
    assert f"the file name {name!r} leaves the bundle; refused" in str(caught.value)


def test_a_graph_must_have_its_sha256(bundle_folder: Path) -> None:
    edit_manifest(bundle_folder, lambda data: data["graphs"].update(probe="probe.onnx"))
    with pytest.raises(BundleError, match=r"its manifest has no sha256 for probe\.onnx"):
        Bundle.open(bundle_folder)
    edit_manifest(bundle_folder, lambda data: data["graphs"].clear())
    with pytest.raises(BundleError, match="its manifest names no graph 'model'"):
        Bundle.open(bundle_folder)


@pytest.mark.parametrize("name", ["neurons.json", "verify.json", "weights.data", "baseline.onnx"])
def test_what_a_bundle_needs_must_be_listed(bundle_folder: Path, name: str) -> None:
    edit_manifest(bundle_folder, lambda data: data["files"].pop(name))
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle_folder)
    assert str(caught.value) == (
        f"{bundle_folder}: its manifest has no sha256 for {name}; export again"
    )


def test_weights_inside_the_graphs_need_no_file(bundle_folder: Path) -> None:
    edit_manifest(bundle_folder, lambda data: data["files"].pop("weights.data"))
    (bundle_folder / "weights.data").unlink()
    assert "weights.data" not in Bundle.open(bundle_folder).manifest.files


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data["preprocessing"].update(mean=[0.4, 0.5, 0.5]),
        lambda data: data["tokens"].update(grid=[2, 8]),
        lambda data: data["files"].pop("verify.json"),
        lambda data: data.update(note="mine"),
        lambda data: data.update(sha256="0" * 64),
    ],
    ids=["mean", "grid", "unlisted", "added", "seal"],
)
def test_an_edited_manifest_is_named(bundle_folder: Path, edit: Callable[[dict], object]) -> None:
    edit_manifest(bundle_folder, edit, sealed=False)
    for verify_hashes in (True, False):
        with pytest.raises(BundleError) as caught:
            Bundle.open(bundle_folder, verify_hashes)
        assert str(caught.value) == (
            f"{bundle_folder / 'manifest.json'}: was changed after export; copy the bundle again "
            "or export again"
        )


def test_a_manifest_without_its_sha256_is_refused(bundle_folder: Path) -> None:
    edit_manifest(bundle_folder, lambda data: data.pop("sha256"), sealed=False)
    with pytest.raises(
        BundleError, match=r"manifest\.json: the field 'sha256' is missing; copy the"
    ):
        Bundle.open(bundle_folder)


def test_another_order_of_the_same_manifest_is_no_change(bundle_folder: Path) -> None:
    path = bundle_folder / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(data.items()))))
    assert Bundle.open(bundle_folder).manifest.precision == "fp32"


def test_what_is_no_bundle_says_what_was_expected(tmp_path: Path) -> None:
    expected = r"expected a folder with manifest\.json, as `regraft export` writes it"
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, problem in {
        "missing": "no such folder",
        "file": "is a file, not a bundle",
        "empty": "is not a bundle",
    }.items():
        with pytest.raises(BundleError, match=f"{name}: {problem}; {expected}"):
            Bundle.open(tmp_path / name)


def test_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(0o000)
    root = os.geteuid() == 0
    if root:  # who may enter everywhere
        os.seteuid(65534)
    try:
        with pytest.raises(BundleError) as caught:
            Bundle.open(locked / "bundle")
    finally:
        if root:
            os.seteuid(0)
    assert str(caught.value) == (
        f"{locked / 'bundle'}: cannot be read (Permission denied); expected a folder with "
        "manifest.json, as `regraft export` writes it"
    )


def test_a_manifest_that_is_not_json(bundle_folder: Path) -> None:
    (bundle_folder / "manifest.json").write_text('{"schema": 1,')
    with pytest.raises(BundleError, match=r"manifest\.json: is not JSON"):
        Bundle.open(bundle_folder)


def test_a_graph_that_was_left_out(tmp_path: Path, write_bundle: Callable[..., Path]) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "lean", baseline=False))
    with pytest.raises(BundleError) as caught:
        bundle.graph("baseline")
    assert str(caught.value) == (
        f"{bundle.path}: holds no graph 'baseline', because it was exported with --no-baseline; "
        "export it again without"
    )
    with pytest.raises(BundleError, match="there is no graph 'fast'; expected one of model,"):
        bundle.graph("fast")


def test_verification_is_read_or_missed(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    assert bundle.verification() == {"images": 4}
    (bundle_folder / "verify.json").unlink()
    with pytest.raises(BundleError, match=r"verify\.json: cannot be read"):
        bundle.verification()
    (bundle_folder / "verify.json").write_text("[]")
    with pytest.raises(BundleError, match=r"verify\.json: is not a JSON object"):
        bundle.verification()
