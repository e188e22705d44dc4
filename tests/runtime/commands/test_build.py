"""`regraft build` with the engine that runs everywhere: openvino."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import openvino
import pytest
from tests.support import bundles, pictures

from regraft.bundle import record as file_record
from regraft.engines import NAMES, base
from regraft.engines import openvino as module
from regraft.engines.openvino import OpenVinoEngine
from regraft.engines.options import BuildOption
from regraft.manifest_file import digest
from regraft.parity import LIMITS

Regraft = Callable[..., tuple[int, str, str]]
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.exported(tmp_path_factory)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write(tmp_path_factory.mktemp("build"), 5, first=60)


def words(bundle: Path, images: Path, *more: str) -> list[object]:
    return ["build", bundle, "--engine", "openvino", "--images", images, *more]


def entries(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.rglob("key.json"))


def features(regraft: Regraft, bundle: Path, images: Path, out: Path, *more: str) -> dict:
    code, _, err = regraft("extract", bundle, images, "--out", out, *more)
    assert (code, err) == (0, "")
    return dict(np.load(out))


def test_built_verified_and_used_by_every_command(
    regraft: Regraft, bundle: Path, images: Path, cache: Path, tmp_path: Path
) -> None:
    before = sorted((p.name, p.stat().st_mtime_ns) for p in bundle.iterdir())
    code, out, err = regraft(*words(bundle, images, "--batch-size", "2"))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "openvino (fp32): built"
    assert lines[1].startswith("  model: graph model.onnx; precision fp32; version ")
    assert lines[2].startswith("  baseline: graph baseline.onnx; ")
    folders = [line.removeprefix("  cached: ") for line in lines if line.startswith("  cached: ")]
    assert sorted(map(Path, folders)) == entries(cache)
    assert len(folders) == 2
    assert "parity of openvino (fp32) with the graph that export verified" in out
    assert ", 5 images: passed" in out
    assert sorted((p.name, p.stat().st_mtime_ns) for p in bundle.iterdir()) == before

    code, out, err = regraft("verify", bundle, "--images", images, "--engine", "openvino", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["engine"], found["precision"], found["passed"]) == ("openvino", "fp32", True)
    assert {row["graph"] for row in found["parity"]} == {"model", "baseline"}

    expected = features(regraft, bundle, images, tmp_path / "cpu.npz", "--engine", "ort-cpu")
    for batch, threads in (("1", "1"), ("3", "2"), ("8", "2")):
        got = features(
            *(regraft, bundle, images, tmp_path / f"{batch}.npz", "--engine", "openvino"),
            *("--batch-size", batch, "--threads", threads),
        )
        assert list(got) == list(expected)
        for name, array in expected.items():
            if array.dtype.kind == "f":
                error = np.linalg.norm(got[name] - array) / np.linalg.norm(array)
                assert error < LIMITS["fp32"].relative_error, name
            else:
                np.testing.assert_array_equal(got[name], array)

    code, out, err = regraft(
        *("bench", bundle, "--engine", "openvino", "--seconds", "0.1", "--rounds", "2"),
        *("--batch-sizes", "2", "--json"),
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["engine"] == "openvino"


def test_bf16_passes_its_own_gate_and_stays_beside_fp32(
    regraft: Regraft, bundle: Path, images: Path, cache: Path, tmp_path: Path
) -> None:
    code, out, err = regraft(*words(bundle, images, "--precision", "bf16", "--json"))
    if not BF16:
        assert (code, out) == (1, "")
        assert "this processor has no bf16 arithmetic" in err
        return
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["state"], found["precision"]) == ("built", "bf16")
    assert "bf16" in found["built"]["model"]["layers"]
    assert found["verification"]["limits"] == vars(LIMITS["bf16"])
    worst = max(row["relative_error"] for row in found["verification"]["parity"])
    assert LIMITS["fp32"].relative_error < worst <= LIMITS["bf16"].relative_error
    features(
        *(regraft, bundle, images, tmp_path / "f.npz", "--engine", "openvino"),
        *("--precision", "bf16"),
    )
    # fp32 was not built, and bf16 does not stand in for it.
    code, _, err = regraft("verify", bundle, "--images", images, "--engine", "openvino")
    assert code == 1
    assert "model.onnx was not built in fp32 on this machine" in err
    assert regraft(*words(bundle, images))[0] == 0
    assert len(entries(cache)) == 4


def test_an_engine_that_needs_no_build_is_verified(
    regraft: Regraft, bundle: Path, images: Path, cache: Path
) -> None:
    code, out, err = regraft("build", bundle, "--engine", "ort-cpu", "--images", images)
    assert (code, err) == (0, "")
    assert out.startswith("ort-cpu (fp32): needs no build\nparity of ort-cpu (fp32) with ")
    assert ", 5 images: passed" in out
    assert not cache.exists()


def test_what_was_built_is_not_built_again_without_force(
    regraft: Regraft, bundle: Path, images: Path, cache: Path
) -> None:
    def built() -> list[str]:
        return [json.loads((e / "record.json").read_text())["built"] for e in entries(cache)]

    assert regraft(*words(bundle, images))[0] == 0
    first = built()
    code, out, err = regraft(*words(bundle, images))
    assert (code, err) == (0, "")
    assert out.startswith("openvino (fp32): built before; --images not used (--force ")
    code, _, err = regraft(*words(bundle, bundle / "absent"))
    assert (code, "absent: no such" in err) == (1, True)
    assert built() == first
    assert json.loads(regraft(*words(bundle, images, "--json"))[1])["state"] == "built before"
    assert regraft(*words(bundle, images, "--force"))[1].startswith("openvino (fp32): built\n")
    assert len(first) == len(built()) == 2
    assert not set(first) & set(built())


def test_a_missed_limit_caches_nothing_and_says_which(
    regraft: Regraft, bundle: Path, images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OpenVinoEngine._run

    def wrong(self: OpenVinoEngine, pixels: np.ndarray, outputs: Sequence[str]):
        return [array * np.float32(1.001) for array in run(self, pixels, outputs)]

    with monkeypatch.context() as patch:
        patch.setattr(OpenVinoEngine, "_run", wrong)
        code, out, err = regraft(*words(bundle, images))
        assert code == 1
        assert out.startswith("parity of openvino (fp32) with ")
        assert ", 5 images: FAILED" in out
        assert err.startswith("regraft: openvino is not equal to the graph that export verified")
        assert "model last_hidden_state: relative error 1.00e-03; at most 1e-04 allowed" in err
        assert not any(path.is_file() for path in cache.rglob("*"))
    # What stood there before a failed rebuild is still there and still good.
    assert regraft(*words(bundle, images))[0] == 0
    monkeypatch.setattr(OpenVinoEngine, "_run", wrong)
    assert regraft(*words(bundle, images, "--force"))[0] == 1
    monkeypatch.undo()
    monkeypatch.setenv("REGRAFT_CACHE", str(cache))
    assert regraft("verify", bundle, "--images", images, "--engine", "openvino")[0] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("Check failed")], ids=str)
def test_a_build_that_breaks_off_leaves_nothing(
    regraft: Regraft,
    bundle: Path,
    images: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    build = OpenVinoEngine.build.__func__

    def half(cls: type, graph: Path, precision: str, options: dict, folder: Path, progress):
        build(cls, graph, precision, options, folder, progress)
        if graph.name == "baseline.onnx":
            with cls._failures("cannot compile baseline.onnx"):
                raise error
        return {}

    monkeypatch.setattr(OpenVinoEngine, "build", classmethod(half))
    code, out, err = regraft(*words(bundle, images))
    assert out == ""
    if error is KeyboardInterrupt:
        assert (code, err) == (130, "regraft: interrupted\n")
    else:
        expected = "regraft: openvino: cannot compile baseline.onnx (Check failed)\n"
        assert (code, err) == (1, expected)
    assert cache.exists()
    assert not any(path.is_file() for path in cache.rglob("*"))
    assert not [path for path in cache.rglob("*") if path.name.startswith(".")]


def test_ctrl_c_in_a_process_of_its_own_leaves_nothing(
    bundle: Path, images: Path, cache: Path
) -> None:
    many = [str(word) for word in words(bundle, images)]
    process = subprocess.Popen(
        [sys.executable, "-m", "regraft", *many, *[str(images)] * 3000],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "REGRAFT_CACHE": str(cache)},
    )
    deadline = time.monotonic() + 60
    while not any(cache.rglob("*.blob")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "regraft: interrupted\n")
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_a_damaged_entry_is_named_and_building_again_mends_it(
    regraft: Regraft, bundle: Path, images: Path, cache: Path
) -> None:
    assert regraft(*words(bundle, images))[0] == 0
    verify = ("verify", bundle, "--images", images, "--engine", "openvino")
    for entry in entries(cache):
        blob = entry / "model.blob"
        content = bytearray(blob.read_bytes())
        content[len(content) // 2] ^= 1
        blob.write_bytes(content)
    code, out, err = regraft(*verify)
    assert (code, out) == (1, "")
    assert str(cache) in err
    assert "is damaged: model.blob was changed (its sha256 differs); remove it and build" in err
    code, out, err = regraft(*words(bundle, images))
    assert code == 0
    assert out.startswith("openvino (fp32): built\n")
    assert err.endswith("build again with `regraft build`; doing so\n")
    assert regraft(*verify)[0] == 0


def test_another_bundle_is_another_entry(
    regraft: Regraft, bundle: Path, images: Path, tmp_path: Path
) -> None:
    assert regraft(*words(bundle, images))[0] == 0
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    verify = ("verify", copy, "--images", images, "--engine", "openvino")
    assert regraft(*verify)[0] == 0  # the same content elsewhere
    manifest = json.loads((copy / "manifest.json").read_text())
    graph = copy / manifest["graphs"]["model"]
    graph.write_bytes(graph.read_bytes() + bytes([0xA2, 0x06, 0x00]))  # an empty doc field
    record = file_record(graph)
    manifest["files"][graph.name] = vars(record)
    manifest["sha256"] = digest(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = regraft(*verify)
    assert code == 1
    assert f"run: regraft build {copy} --engine openvino --images DIR" in err


def test_a_cache_inside_the_bundle_is_refused(
    regraft: Regraft, bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(bundle / "cache"))
    code, out, err = regraft(*words(bundle, images))
    assert (code, out) == (1, "")
    assert f"the cache of built engines lies in the bundle {bundle}" in err
    assert not (bundle / "cache").exists()


def test_images_that_cannot_be_read_prove_nothing(
    regraft: Regraft, bundle: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("no picture")
    code, out, err = regraft(*words(bundle, tmp_path / "pictures"))
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "regraft: none of the images could be read; parity is proven on real images"
    )
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_images_that_cannot_be_read_are_counted(
    regraft: Regraft, bundle: Path, images: Path, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    good = next(images.glob("*.png"))
    shutil.copy(good, folder / "b.png")
    for name in ("a.png", "c.png"):
        (folder / name).write_text("no picture")
    code, out, err = regraft(*words(bundle, folder))
    assert code == 0
    assert ", 1 image: passed" in out
    assert err.splitlines()[-1] == (
        "regraft: warning: 2 of 3 images could not be read (named above); verified on the others"
    )
    assert sum("is not an image file" in line for line in err.splitlines()) == 2
    assert any(path.is_file() for path in cache.rglob("*"))


def test_the_gate_needs_images(regraft: Regraft, bundle: Path) -> None:
    code, _, err = regraft("build", bundle, "--engine", "openvino")
    assert code == 2
    assert "the following arguments are required: --images" in err


def test_auto_cannot_be_built(regraft: Regraft, bundle: Path, images: Path) -> None:
    assert "auto" in NAMES
    code, _, err = regraft("build", bundle, "--engine", "auto", "--images", images)
    assert code == 2
    assert "invalid choice: 'auto'" in err


def test_a_missing_package_says_what_to_install(
    regraft: Regraft, bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for command in (
        words(bundle, images),
        ["verify", bundle, "--images", images, "--engine", "openvino"],
    ):
        code, out, err = regraft(*command)
        assert (code, out) == (1, "")
        expected = "openvino: openvino is not installed; pip install 'regraft-runtime[openvino]'"
        elsewhere = "or in a checkout of regraft pip install './runtime[openvino]'"
        assert err == f"regraft: {expected}, {elsewhere}\n"


OPTIONS = (
    BuildOption("max-batch", 64, "largest batch", least=1),
    BuildOption("effort", "low", "how hard to try", choices=("low", "high")),
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("batch=3", "there is no build option 'batch'; it has max-batch, effort"),
        ("max-batch=0", "build option max-batch is '0'; expected an integer from 1"),
        ("max-batch=x", "build option max-batch is 'x'; expected an integer from 1"),
        ("effort=mid", "build option effort is 'mid'; expected one of low, high"),
    ],
)
def test_a_wrong_build_option_is_named(
    regraft: Regraft,
    bundle: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    message: str,
) -> None:
    code, _, err = regraft(*words(bundle, images, "--option", given))
    assert code == 2
    name = given.partition("=")[0]
    assert err == f"regraft: openvino: there is no build option {name!r}; it has none\n"
    monkeypatch.setattr(OpenVinoEngine, "build_options", OPTIONS)
    code, _, err = regraft(*words(bundle, images, "--option", given))
    assert (code, err) == (2, f"regraft: openvino: {message}\n")


def test_a_build_option_that_is_no_pair_is_wrong_usage(
    regraft: Regraft, bundle: Path, images: Path
) -> None:
    code, _, err = regraft(*words(bundle, images, "--option", "max-batch"))
    assert code == 2
    assert "'max-batch' is not NAME=VALUE" in err


def test_other_build_options_are_another_entry_which_replaces_the_one_before(
    regraft: Regraft, bundle: Path, images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    keep = base.Engine.__init__

    def watch(self, graph: Path, precision: str, options, built: Path | None = None) -> None:
        opened.append(built)
        keep(self, graph, precision, options, built)

    monkeypatch.setattr(OpenVinoEngine, "build_options", OPTIONS)
    assert regraft(*words(bundle, images))[0] == 0
    first = entries(cache)
    _, out, _ = regraft(*words(bundle, images, "--option", "max-batch=8", "--json"))
    found = json.loads(out)
    assert found["options"] == {"max-batch": 8, "effort": "low"}
    assert sorted(map(str, entries(cache))) == sorted(found["folders"].values())
    assert not set(entries(cache)) & set(first)
    monkeypatch.setattr(OpenVinoEngine, "__init__", watch)
    verify = ("verify", bundle, "--images", images, "--engine", "openvino", "--max-images", "1")
    assert regraft(*verify)[0] == 0
    assert sorted(map(str, opened)) == sorted(found["folders"].values())
    # Built before, but not last: built again.
    assert regraft(*words(bundle, images))[1].startswith("openvino (fp32): built\n")
    opened.clear()
    assert regraft(*verify)[0] == 0
    assert sorted(opened) == first


def test_the_first_image_is_also_run_alone(
    regraft: Regraft, bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = OpenVinoEngine._run

    def watch(self: OpenVinoEngine, pixels: np.ndarray, outputs: Sequence[str]):
        sizes.append(len(pixels))
        return run(self, pixels, outputs)

    monkeypatch.setattr(OpenVinoEngine, "_run", watch)
    assert regraft(*words(bundle, images, "--batch-size", "3"))[0] == 0
    assert sizes == [1, 1, 2, 2, 2, 2]  # model and baseline by turns


def test_a_bf16_bundle_needs_the_model_as_reference(
    regraft: Regraft,
    images: Path,
    write_bundle: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The reference is asked for before anything is compiled, so any processor shows it.
    monkeypatch.setattr(module, "_capabilities", lambda core: ["BF16", "FP32"])
    folder = write_bundle(tmp_path / "small", precision="bf16")
    code, _, err = regraft(*words(folder, images))
    assert code == 1
    assert err == (
        f"regraft: {folder}: is a bf16 bundle, which ort-cpu, the reference without PyTorch, "
        "cannot run; give --model MODEL (needs regraft-export)\n"
    )
