from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from tests.support import bundles, pictures

from regraft.bundle import Bundle
from regraft.image_files import evenly
from regraft.redirect import SCALES, RedirectOptions
from regraft_export import exporting
from regraft_export.commands._redirect_arguments import add_redirect_arguments, redirect_options

Regraft = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write(tmp_path_factory.mktemp("photos"), 5)


@pytest.fixture
def neurons(tmp_path: Path) -> Path:
    return bundles.write_neurons(tmp_path / "neurons.json")


@pytest.fixture
def export(
    regraft: Regraft, photos: Path, neurons: Path, tmp_path: Path, quick_trace: None
) -> Callable[..., tuple[int, str, str]]:
    """``export(more words)`` exports the planted model to tmp_path / "bundle"."""

    def run(*words: object, model: str = bundles.PLANTED, images: Path = photos) -> object:
        fixed = (model, "--neurons", neurons, "--images", images, "--out", tmp_path / "bundle")
        return regraft("export", *fixed, *words)

    return run


def nothing_left(tmp_path: Path) -> bool:
    return {file.name for file in tmp_path.iterdir()} <= {"neurons.json", "pictures"}


def test_a_bundle_and_what_was_found(export: Regraft, tmp_path: Path) -> None:
    code, out, err = export("--layers", "3,1", "--attentions", "2", "--batch-size", "2")
    assert (code, err) == (0, "")
    bundle = Bundle.open(tmp_path / "bundle")
    lines = out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'bundle'}: {bundles.PLANTED}, fp32, opset 20, ")
    assert lines[1] == (
        "sites: 1 token, 2 redirect (layers 1, 2), 4 output, 0 attention; 8 baked token counts "
        "mended"
    )
    assert lines[2] == (
        "parity of ort-cpu (fp32) with PyTorch with hooks, float32, 5 images: passed"
    )
    assert "model           last_hidden_state" in out
    assert "  probes: 20 outputs compared, largest relative error " in out
    assert "effect at layer 2: outlier tokens (norm above 40) " in out
    assert list(bundle.manifest.outputs) == [
        "last_hidden_state",
        "hidden.3",
        "hidden.1",
        "attentions.2",
        "pooler_output",
        "test_time_registers",
    ]
    assert bundle.manifest.preprocessing.image_size == bundles.SIZE


def test_the_answer_for_machines(export: Regraft, tmp_path: Path) -> None:
    code, out, err = export("--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["out"] == str(tmp_path / "bundle")
    assert answer["verify"] == Bundle.open(tmp_path / "bundle").verification()
    assert answer["verify"]["passed"] is True


def test_every_redirect_option_reaches_the_bundle(export: Regraft, tmp_path: Path) -> None:
    options = ["--value", "per-layer", "--cls", "keep", "--patches", "only-outliers"]
    options += ["--registers", "2", "--scale", "1", "0.25"]
    assert export(*options, "--no-baseline")[0] == 0
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.redirect == RedirectOptions(
        "per-layer", "keep", "only-outliers", 2, (1.0, 0.25)
    )
    assert list(manifest.graphs) == ["model", "model_cuda"]


def test_without_probes_the_effect_is_not_measured(export: Regraft) -> None:
    code, out, _ = export("--no-baseline")
    assert code == 0
    assert out.splitlines()[-1] == (
        "effect: not measured, the bundle has no probes (exported with --no-baseline)"
    )


def test_bfloat16_says_that_it_was_not_verified_itself(export: Regraft, tmp_path: Path) -> None:
    code, out, _ = export("--precision", "bf16")
    assert code == 0
    assert out.splitlines()[-1] == (
        "ort-cpu cannot run bf16: the same rewrite was verified in fp32; the bf16 graph itself is "
        f"unverified until `regraft build {tmp_path / 'bundle'}` verifies it on an engine that "
        "runs it"
    )
    assert not Bundle.open(tmp_path / "bundle").manifest.verified


def test_the_answer_for_machines_is_nothing_but_json_in_half_precision(export: Regraft) -> None:
    for precision in ("fp16", "bf16"):
        code, out, _ = export("--precision", precision, "--json", "--force")
        assert code == 0
        assert json.loads(out)["verify"]["passed"] is True


def test_a_list_made_by_hand_is_taken_and_its_level_measured(
    export: Regraft, neurons: Path, tmp_path: Path
) -> None:
    bundles.write_neurons(neurons, bundles.neurons())
    code, _, err = export()
    assert code == 0
    assert err == (
        "regraft: warning: the neurons file says nothing of its model (made by hand?), so it "
        "cannot be checked that the neurons belong to these weights\n"
    )
    manifest = Bundle.open(tmp_path / "bundle").manifest
    # The layer with the largest norm over its median, and twice that median.
    assert manifest.detection_layer in (1, 2)
    assert 20 < manifest.threshold < 40
    effect = Bundle.open(tmp_path / "bundle").verification()["effect"]
    assert effect["before"]["outliers"] > effect["after"]["outliers"] == 0


def test_neurons_of_another_model_are_refused_and_forced(
    export: Regraft, neurons: Path, tmp_path: Path
) -> None:
    code, out, err = export(model=bundles.PLAIN)
    assert (code, out) == (1, "")
    assert err.startswith(f"regraft: the neurons were found in {bundles.PLANTED} with weights ")
    assert err.endswith(
        "; run `regraft find` for this model, size and preprocessing, or give --force\n"
    )
    assert err.count("\n") == 1
    assert nothing_left(tmp_path)


def test_neurons_of_another_size_are_refused(
    export: Regraft, neurons: Path, tmp_path: Path
) -> None:
    about = {**bundles.found().about, "image_size": [64, 48]}
    bundles.write_neurons(neurons, bundles.neurons(**about))
    code, _, err = export()
    assert code == 1
    assert "the neurons were found at image size [64, 48], this export has [32, 32]" in err
    assert nothing_left(tmp_path)
    code, _, err = export("--force")
    assert code == 0
    assert err.startswith("regraft: warning: the neurons were found at image size [64, 48]")
    assert err.endswith("(forced)\n")


def test_neurons_of_another_preprocessing_are_refused_and_forced(
    export: Regraft, neurons: Path, tmp_path: Path
) -> None:
    steps = bundles.loaded().preprocessing.to_json()
    bundles.write_neurons(neurons, bundles.neurons(**bundles.found().about, preprocessing=steps))
    assert export("--no-baseline")[0] == 0
    other = ("--mean", "0.1", "0.2", "0.3", "--interpolation", "nearest", "--no-baseline")
    code, out, err = export(*other, "--out", tmp_path / "other")
    assert (code, out) == (1, "")
    assert err.startswith(
        "regraft: the neurons were found with another preprocessing: interpolation bicubic, here "
        "nearest, mean 0.485 0.456 0.406, here 0.1 0.2 0.3; "
    )
    assert err.endswith(" or give --force\n")
    assert not (tmp_path / "other").exists()
    code, _, err = export(*other, "--force")
    assert code == 0
    assert err.startswith("regraft: warning: the neurons were found with another preprocessing: ")
    assert err.endswith("(forced)\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"layer": 1, "index": 96},
            "neuron (layer 1, index 96): layer 1 has 96 hidden units, so indices run from 0 to 95",
        ),
        (
            {"layer": 12, "index": 0},
            "neuron (layer 12, index 0): the model has 4 blocks, so layers run from 0 to 3",
        ),
    ],
)
def test_neurons_outside_the_model_are_refused_even_by_force(
    export: Regraft, neurons: Path, tmp_path: Path, row: dict[str, int], message: str
) -> None:
    neurons.write_text(json.dumps({"schema": 1, "neurons": [row]}))
    for words in ((), ("--force",)):
        assert export(*words) == (1, "", f"regraft: {message}\n")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "",
            "is not JSON (Expecting value: line 1 column 1 (char 0)); expected the file that "
            "`regraft find` wrote",
        ),
        ("[]", 'expected a JSON object with "schema": 1 and a list "neurons"'),
        ('{"schema": 9, "neurons": []}', "schema 9 is newer than 1, the newest this version reads"),
        (
            '{"schema": 1, "neurons": [{"layer": 1, "index": 2}, {"layer": 1, "index": 2}]}',
            "neuron (layer 1, index 2) is listed twice",
        ),
        ('{"schema": 1, "neurons": []}', "the list of register neurons is empty"),
    ],
)
def test_a_file_that_is_no_neurons_file_is_refused(
    export: Regraft, neurons: Path, tmp_path: Path, content: str, message: str
) -> None:
    neurons.write_text(content)
    code, out, err = export()
    assert (code, out) == (1, "")
    assert err.startswith(f"regraft: {neurons}: {message}")
    assert err.count("\n") == 1
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detection_layer": 4}, "detection_layer is 4; expected a block of the model, 0 to 3"),
        ({"detection_layer": "two"}, "detection_layer is 'two'; expected an integer from 0"),
        ({"threshold": "high"}, "threshold is 'high'; expected a finite number above 0"),
    ],
)
def test_an_outlier_level_that_is_none_is_refused(
    export: Regraft,
    neurons: Path,
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
) -> None:
    bundles.write_neurons(neurons, bundles.neurons(**{**bundles.found().about, **changes}))
    code, out, err = export()
    assert (code, out) == (1, "")
    assert err.startswith(f"regraft: {neurons}: {message}")
    assert err.count("\n") == 1
    assert nothing_left(tmp_path)


def test_a_constant_value_without_recorded_values_is_refused(
    export: Regraft, neurons: Path, tmp_path: Path
) -> None:
    neurons.write_text('{"schema": 1, "neurons": [{"layer": 1, "index": 7}]}')
    code, _, err = export("--value", "constant")
    assert code == 1
    assert err.splitlines()[-1] == (
        "regraft: value = constant needs the `value` of every neuron; (layer 1, index 7) has none "
        "(written by hand?): run `regraft find`, or use value = per-neuron"
    )
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "1,4"), "--layers: there is no block 4; the model has 4 blocks, 0 to 3"),
        (
            ("--attentions", "9"),
            "--attentions: there is no block 9; the model has 4 blocks, 0 to 3",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(
    export: Regraft, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    code, out, err = export(*words)
    assert (code, out) == (1, "")
    assert err.startswith(f"regraft: {message}")
    assert err.count("\n") == 1
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--value", "median"), "argument --value: invalid choice: 'median'"),
        (("--registers", "0"), "argument --registers: '0' is not an integer from 1 to 64"),
        (("--registers", "65"), "argument --registers: '65' is not an integer from 1 to 64"),
        (("--scale", "0"), "argument --scale: '0' is not a number from 6.103515625e-05 to 65504"),
        (("--scale", "-1"), "argument --scale: '-1' is not a number from 6.103515625e-05 to 65504"),
        (
            ("--scale", "1e30"),
            "argument --scale: '1e30' is not a number from 6.103515625e-05 to 65504",
        ),
        (("--scale", "nan"), "argument --scale: 'nan' is not a finite number"),
        (
            ("--registers", "2", "--scale", "1"),
            "regraft: --scale has 1 number for 2 registers; expected one per register\n",
        ),
        (
            ("--calibration-images", "8"),
            "regraft: --calibration-images is for --variant kv, and the variant is token; give "
            "both or neither\n",
        ),
        (("--image-size", "1,2,3"), "argument --image-size: '1,2,3' has 3 numbers; expected one"),
        (("--layers", "1,x"), "argument --layers: 'x' is not an integer from 0"),
        (("--precision", "int8"), "argument --precision: invalid choice: 'int8'"),
    ],
)
def test_wrong_usage_exits_with_two(
    export: Regraft, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    code, out, err = export(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert nothing_left(tmp_path)


def test_the_ends_that_a_message_tells_may_be_typed() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_redirect_arguments(parser)
    with pytest.raises(argparse.ArgumentError) as caught:
        parser.parse_args(["--scale", "0"])
    least, most = str(caught.value).partition(" from ")[2].split(" to ")
    args = parser.parse_args(["--registers", "2", "--scale", least, most])
    assert redirect_options(args).scale == SCALES
    assert f"{least} to {most}" in " ".join(parser.format_help().split())


def test_an_unreadable_picture_among_good_ones_is_named_once_and_left_out(
    export: Regraft, neurons: Path, tmp_path: Path
) -> None:
    folder = pictures.write(tmp_path / "pictures", 4)
    (folder / "picture-001.png").write_text("no picture")
    (folder / "empty.jpg").touch()
    bundles.write_neurons(neurons, bundles.neurons())  # then the pictures are read twice
    code, out, err = export(images=folder)
    assert code == 0
    assert "3 images: passed" in out
    lines = [line for line in err.splitlines() if "warning" not in line]
    assert lines == [
        f"regraft: {folder}/empty.jpg: is empty (0 bytes)",
        f"regraft: {folder}/picture-001.png: is not an image file that Pillow reads",
    ]


@pytest.mark.parametrize("level_recorded", [True, False])
def test_strict_writes_nothing_if_a_picture_is_unreadable(
    export: Regraft, neurons: Path, tmp_path: Path, level_recorded: bool
) -> None:
    folder = pictures.write(tmp_path / "pictures", 3)
    assert export("--strict", "--no-baseline", images=folder)[0] == 0
    before = (tmp_path / "bundle" / "manifest.json").read_bytes()
    (folder / "picture-001.png").write_text("no picture")
    if not level_recorded:
        bundles.write_neurons(neurons, bundles.neurons())
    code, out, err = export("--strict", "--force", "--cls", "keep", images=folder)
    assert (code, out) == (1, "")
    assert [line for line in err.splitlines() if "warning" not in line] == [
        f"regraft: {folder}/picture-001.png: is not an image file that Pillow reads",
        "regraft: 1 of 3 images could not be read (named above); nothing was written; without "
        "--strict they are left out",
    ]
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == before


def test_nothing_but_unreadable_pictures_is_an_error(export: Regraft, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_text("no picture")
    code, out, err = export(images=folder)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "regraft: the only image could not be read (named above)"
    assert nothing_left(tmp_path)


def test_an_empty_and_a_missing_folder_are_refused(export: Regraft, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    code, _, err = export(images=folder)
    assert (code, err) == (1, f"regraft: {folder}: no such file or folder; expected images\n")
    folder.mkdir()
    code, _, err = export(images=folder)
    assert code == 1
    assert err.startswith(f"regraft: {folder}: the folder holds no images; expected files with ")
    assert nothing_left(tmp_path)


def test_an_existing_bundle_is_replaced_only_by_force(export: Regraft, tmp_path: Path) -> None:
    assert export("--no-baseline")[0] == 0
    first = (tmp_path / "bundle" / "manifest.json").read_bytes()
    code, out, err = export("--no-baseline", "--cls", "keep")
    assert (code, out) == (1, "")
    assert err == (f"regraft: {tmp_path / 'bundle'}: exists already; give --force to replace it\n")
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == first
    assert export("--no-baseline", "--cls", "keep", "--force")[0] == 0
    assert Bundle.open(tmp_path / "bundle").manifest.redirect.cls == "keep"


def test_a_failed_gate_exits_with_one_and_leaves_nothing(
    export: Regraft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exporting.PyTorchReference.run

    def other(self: object, graph: str, *rest: object) -> object:
        right = dict(real(self, graph, *rest))
        if graph == "model":
            right["pooler_output"] = right["pooler_output"] * 1.01
        return right

    monkeypatch.setattr(exporting.PyTorchReference, "run", other)
    code, out, err = export()
    assert (code, out) == (1, "")
    assert err == (
        "regraft: ort-cpu is not equal to PyTorch with hooks, float32: model pooler_output: "
        "relative error 9.90e-03; at most 1e-04 allowed; model_cuda pooler_output: "
        "relative error 9.90e-03; at most 1e-04 allowed\n"
    )
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("python:nowhere.py:vit", "python:nowhere.py:vit: no such file nowhere.py"),
        (f"python:{bundles.FILE}:nothing", "has no function 'nothing'"),
        (f"python:{bundles.FILE}:not_a_vit", "no stack of equal transformer blocks was found"),
        (f"python:{bundles.FILE}:without_preprocessing", "the preprocessing lacks input_size"),
        ("timm:no_such_vit", "no_such_vit"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    export: Regraft, tmp_path: Path, model: str, message: str
) -> None:
    code, out, err = export(model=model)
    assert (code, out) == (1, "")
    assert err.startswith("regraft: ")
    assert message in err
    assert err.count("\n") == 1
    assert nothing_left(tmp_path)


def test_what_is_no_model_is_wrong_usage(export: Regraft, tmp_path: Path) -> None:
    code, out, err = export(model="vit")
    assert (code, out) == (2, "")
    assert err.startswith("regraft: 'vit' is not a model; expected one of timm:NAME")
    assert nothing_left(tmp_path)


def test_a_model_without_preprocessing_takes_it_from_the_command_line(
    regraft: Regraft, photos: Path, neurons: Path, tmp_path: Path
) -> None:
    words = "--image-size 32 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.25 --interpolation bilinear "
    words += "--crop-pct 0.9 --crop-mode squash --no-baseline"
    bundles.write_neurons(neurons, bundles.neurons())
    code, _, _ = regraft(
        *("export", f"python:{bundles.FILE}:without_preprocessing", "--neurons", neurons),
        *("--images", photos, "--out", tmp_path / "bundle", *words.split()),
    )
    assert code == 0
    used = Bundle.open(tmp_path / "bundle").manifest.preprocessing
    assert (used.image_size, used.mean, used.std) == ((32, 32), (0.5,) * 3, (0.5, 0.5, 0.25))
    assert (used.interpolation, used.resize, used.resize_size) == ("bilinear", "exact", (35, 35))


@pytest.mark.parametrize(("count", "most"), [(3, 5), (5, 5), (11, 5), (100, 7)])
def test_the_pictures_to_verify_on_are_spread_evenly(count: int, most: int) -> None:
    paths = [Path(str(i)) for i in range(count)]
    taken = [int(path.name) for path in evenly(paths, most)]
    assert len(taken) == min(count, most)
    steps = {b - a for a, b in pairwise(taken)}
    assert max(steps) - min(steps) <= 1
    assert taken[0] == 0


def test_at_most_so_many_pictures_are_used(export: Regraft) -> None:
    code, out, _ = export("--max-images", "2", "--no-baseline")
    assert code == 0
    assert "2 images: passed" in out


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "regraft", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_process_of_its_own_traces_and_exports(
    photos: Path, neurons: Path, tmp_path: Path, exported: Path
) -> None:
    done = run(
        *("export", bundles.PLANTED, "--neurons", neurons, "--images", photos),
        *("--out", tmp_path / "bundle", "--layers", "1,3", "--attentions", "2"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[2].endswith("5 images: passed")
    ours, theirs = Bundle.open(tmp_path / "bundle").manifest, Bundle.open(exported).manifest
    assert ours.outputs == theirs.outputs
    assert ours.sites == theirs.sites
    assert ours.files["weights.data"] == theirs.files["weights.data"]


def test_a_process_of_its_own_fails_in_one_line(photos: Path, tmp_path: Path) -> None:
    done = run(
        *("export", bundles.PLANTED, "--neurons", tmp_path / "none.json"),
        *("--images", photos, "--out", tmp_path / "bundle"),
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"regraft: {tmp_path / 'none.json'}: cannot be read (No such file or "
        "directory); expected the file that `regraft find` wrote\n"
    )
    assert nothing_left(tmp_path)
