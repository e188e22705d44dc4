from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from regraft import Extractor
from regraft.bundle import record
from regraft.manifest_file import digest

Regraft = Callable[..., tuple[int, str, str]]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "features.npz"


def left_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_the_file_holds_what_the_extractor_gives(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], out: Path
) -> None:
    code, said, err = regraft("extract", pristine_bundle, photos[0].parent, "--out", out)
    assert (code, err) == (0, "")
    assert said.startswith(f"{out}: 11 images, float32: cls (11, 8), patches (11, 4, 4, 8), pooled")
    assert "\nort-cpu: " in said
    with Extractor.open(pristine_bundle) as extractor:
        expected = extractor.extract(photos).arrays()
    with np.load(out, allow_pickle=False) as file:
        assert file["paths"].tolist() == [str(photo) for photo in photos]
        assert set(file) == {*expected, "paths"}
        for name, array in expected.items():
            np.testing.assert_allclose(file[name], array, rtol=1e-5, atol=1e-6)
    assert left_beside(out) == ["features.npz"]


def test_outputs_dtype_and_summary(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], out: Path
) -> None:
    out = out.with_suffix(".parquet")
    code, said, err = regraft(
        *("extract", pristine_bundle, *photos[3:6], photos[0], "--out", out, "--json"),
        *("--outputs", "cls,pooled", "--dtype", "float16", "--batch-size", 3),
        *("--workers", 1, "--threads", 1, "--engine", "ort-cpu", "--draft"),
    )
    assert (code, err) == (0, "")
    summary = json.loads(said)
    assert summary.pop("seconds") > 0
    assert summary.pop("images_per_second") > 0
    assert summary == {
        "out": str(out),
        "engine": "ort-cpu",
        "dtype": "float16",
        "images": 4,
        "arrays": {"cls": [4, 8], "pooled": [4, 8]},
        "failed": [],
    }
    import pyarrow.parquet as pq

    table = pq.read_table(out)
    assert table.column_names == ["paths", "cls", "pooled", "error"]
    assert table["paths"].to_pylist() == [str(p) for p in (*photos[3:6], photos[0])]


@pytest.fixture
def bad_images(tmp_path: Path, photos: list[Path]) -> dict[str, Path]:
    """Files that look like pictures and are none."""
    folder = tmp_path / "bad"
    folder.mkdir()
    files = {name: folder / f"{name}.jpg" for name in ("cut", "empty", "text", "bomb")}
    files["cut"].write_bytes(photos[0].read_bytes()[:400])
    files["empty"].write_bytes(b"")
    files["text"].write_text("dear diary")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    files["bomb"] = folder / "bomb.png"
    return files


REASONS = {
    "cut": "cannot be decoded",
    "empty": "is empty (0 bytes)",
    "text": "is not an image file",
    "bomb": "refused",
}


@pytest.mark.parametrize("strict", [False, True])
def test_bad_images_are_named_and_left_out(
    regraft: Regraft,
    pristine_bundle: Path,
    photos: list[Path],
    bad_images: dict[str, Path],
    out: Path,
    strict: bool,
) -> None:
    words = ["extract", pristine_bundle, photos[4], bad_images["cut"].parent, photos[2]]
    code, _, err = regraft(*words, "--out", out, *(["--strict"] if strict else []))
    for name, path in bad_images.items():
        (line,) = (line for line in err.splitlines() if str(path) in line)
        assert line.startswith(f"regraft: {path}: "), line
        assert REASONS[name] in line, line
    with np.load(out) as file:
        assert file["paths"].tolist() == [str(photos[4]), str(photos[2])]
    assert code == int(strict)
    if strict:
        assert err.splitlines()[-1] == (
            f"regraft: 4 of 6 images could not be read (named above); {out} holds the others; "
            "without --strict this is no error"
        )


def unusual_images(folder: Path) -> Iterator[Path]:
    """Pictures that are legal and seldom."""
    rng = np.random.default_rng(5)
    rgb = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image, options in [
        ("dot.png", Image.new("RGB", (1, 1), (9, 99, 199)), {}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("grey.png", rgb.convert("L"), {}),
        ("deep.png", Image.fromarray(rng.integers(0, 65536, (20, 20), np.uint16)), {}),
        ("alpha.png", rgb.convert("RGBA"), {}),
        ("palette.gif", rgb.convert("P"), {}),
        ("moving.gif", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("turned.jpg", rgb, {"exif": turned}),
    ]:
        image.save(folder / name, **options)
        yield folder / name


def test_unusual_images_are_extracted(
    regraft: Regraft, pristine_bundle: Path, tmp_path: Path, out: Path
) -> None:
    paths = list(unusual_images(tmp_path))
    code, said, err = regraft("extract", pristine_bundle, *paths, "--out", out)
    assert (code, err) == (0, "")
    assert said.startswith(f"{out}: 8 images")


def test_when_no_image_can_be_read(
    regraft: Regraft, pristine_bundle: Path, bad_images: dict[str, Path], out: Path
) -> None:
    code, _, err = regraft("extract", pristine_bundle, bad_images["text"], "--out", out)
    assert code == 1
    assert err.splitlines()[-1] == (
        f"regraft: {out}: there are no features to write; the only image could not be read "
        "(named above)"
    )
    assert left_beside(out) == []


def damage_byte(bundle: Path) -> None:
    content = bytearray((bundle / "weights.data").read_bytes())
    content[1000] ^= 255
    (bundle / "weights.data").write_bytes(content)


def edit_manifest(bundle: Path, **fields: object) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    data |= fields
    data["sha256"] = digest(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "byte": (damage_byte, "weights.data was changed (its sha256 differs)"),
    "missing": (lambda b: (b / "model.onnx").unlink(), "model.onnx is missing"),
    "schema": (lambda b: edit_manifest(b, schema=3), "schema 3 is newer than 2"),
    "escape": (
        lambda b: edit_manifest(b, graphs={"model": "../model.onnx"}),
        "the file name '../model.onnx' leaves the bundle; refused",
    ),
    "manifest": (lambda b: (b / "manifest.json").unlink(), "is not a bundle; expected a folder"),
    "field": (lambda b: edit_manifest(b, tokens={}), "the field 'grid' is missing; export again"),
    "gone": (shutil.rmtree, "no such folder; expected a folder with manifest.json"),
    "bf16": (lambda b: edit_manifest(b, precision="bf16"), "ort-cpu: cannot run bf16"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_bundle_is_one_line(
    regraft: Regraft, bundle_folder: Path, photos: list[Path], out: Path, damage: str
) -> None:
    harm, message = DAMAGE[damage]
    harm(bundle_folder)
    code, said, err = regraft("extract", bundle_folder, *photos, "--out", out)
    assert (code, said, err.count("\n")) == (1, "", 1)
    assert err.startswith("regraft: ")
    assert message in err
    if damage != "bf16":
        assert str(bundle_folder) in err
    assert left_beside(out) == []


def test_bad_words_are_one_line(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], tmp_path: Path, out: Path
) -> None:
    (tmp_path / "empty").mkdir()
    standard = [pristine_bundle, photos[0]]
    for words, message in [
        ([pristine_bundle, "nowhere"], "nowhere: no such file or folder; expected images"),
        (
            [pristine_bundle, tmp_path / "empty"],
            f"{tmp_path / 'empty'}: the folder holds no images",
        ),
        ([*standard, "--outputs", "prefix"], "output 'prefix' is not in this bundle, which gives"),
        (
            [*standard, "--engine", "ort-cuda"],
            "ort-cuda: the onnxruntime that is installed is the one for CPUs",
        ),
        ([*standard, "--out", "/sys/f.npz"], "/sys/f.npz: cannot be written (Permission denied); "),
        ([*standard, "--out", "/dev/null"], "/dev/null: is a device or a pipe; expected"),
        ([*standard, "--out", tmp_path / "no/f.npz"], "does not exist; create it first"),
        (
            [*standard, "--out", tmp_path / "empty"],
            "empty: exists already; give --force to replace",
        ),
        ([*standard, "--out", f"{tmp_path}/no/f/"], "no/f/: the folder"),
    ]:
        given = ["--out", out] if "--out" not in words else []
        code, said, err = regraft("extract", *words, *given)
        assert (code, said, err.count("\n")) == (1, "", 1), words
        assert err.startswith("regraft: "), words
        assert message in err
    assert left_beside(out) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--outputs", "cls,clas"], "there is no output 'clas'; expected cls, prefix"),
        (["--out", "features.csv"], "features.csv: ends in '.csv'; expected .npz or .parquet"),
        (["--out", "sub.npz/"], "sub.npz/: ends as a file does, and in '/' as a folder does"),
        (["--processes", 2], "--processes needs a folder to write to, and --out"),
        (["--shard-size", 2], "--shard-size needs a folder to write to, and --out"),
        (["--ray"], "--ray needs a folder to write to, and --out"),
    ],
)
def test_wrong_usage(
    regraft: Regraft,
    pristine_bundle: Path,
    photos: list[Path],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[object],
    message: str,
) -> None:
    monkeypatch.chdir(out.parent)
    code, said, err = regraft("extract", pristine_bundle, photos[0], "--out", out, *words)
    assert (code, said) == (2, "")
    assert message in err
    assert left_beside(out) == []


def test_what_exists_needs_force(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], out: Path
) -> None:
    out.write_text("precious")
    words = ["extract", pristine_bundle, photos[0], "--out", out]
    code, _, err = regraft(*words)
    assert (code, err) == (1, f"regraft: {out}: exists already; give --force to replace it\n")
    assert out.read_text() == "precious"
    assert regraft(*words, "--force")[0] == 0
    assert np.load(out)["paths"].tolist() == [str(photos[0])]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_full_disk_is_one_line(
    regraft: Regraft, pristine_bundle: Path, photos: list[Path], out: Path, suffix: str
) -> None:
    out = out.with_suffix(suffix)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        code, said, err = regraft("extract", pristine_bundle, *photos, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, said) == (1, "")
    assert err == (
        f"regraft: {out}: cannot be written (File too large); "
        "choose a file system that takes files of this size\n"
    )
    assert left_beside(out) == []


def test_nan_is_reported_not_written(
    regraft: Regraft, bundle_folder: Path, photos: list[Path], out: Path
) -> None:
    model = onnx.load(bundle_folder / "model.onnx")
    (kernel,) = (t for t in model.graph.initializer if t.name == "kernel")
    values = numpy_helper.to_array(kernel).copy()
    values[3, 0, 0, 0] = np.nan
    kernel.CopyFrom(numpy_helper.from_array(values, "kernel"))
    onnx.save(model, bundle_folder / "model.onnx")
    files = json.loads((bundle_folder / "manifest.json").read_text())["files"]
    files["model.onnx"] = vars(record(bundle_folder / "model.onnx"))
    edit_manifest(bundle_folder, files=files)
    code, said, err = regraft("extract", bundle_folder, *photos[:2], "--out", out)
    assert (code, said) == (1, "")
    assert err.startswith(
        f"regraft: ort-cpu: last_hidden_state holds NaN or Inf for {photos[0]}, {photos[1]}; "
    )
    assert left_beside(out) == []


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "regraft: interrupted\n"), (signal.SIGTERM, 143, "")],
)
@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_an_interrupt_leaves_what_stood_there(
    pristine_bundle: Path,
    photos: list[Path],
    out: Path,
    number: signal.Signals,
    code: int,
    said: str,
    suffix: str,
) -> None:
    out = out.with_suffix(suffix)
    out.write_text("precious")
    command = [sys.executable, "-m", "regraft", "extract", pristine_bundle]
    command += [photos[0].parent] * 2000
    process = subprocess.Popen(
        [*command, "--out", out, "--force"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    # In the middle: rows are being written beside.
    limit = time.monotonic() + 30
    while len(left_beside(out)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    printed, err = process.communicate(timeout=30)
    assert (process.returncode, printed, err) == (code, "", said)
    assert out.read_text() == "precious"
    assert left_beside(out) == [out.name]
