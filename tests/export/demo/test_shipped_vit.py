"""The shipped ViT is what it says: outlier tokens, written by the twelve units of its metadata."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors")

from PIL import Image  # noqa: E402
from torch.nn import functional  # noqa: E402

from regraft_export import demo  # noqa: E402
from regraft_export.demo import drawing, measure, vit  # noqa: E402

PATCHES = (vit.IMAGE_SIZE // vit.PATCH_SIZE) ** 2
FRESH_SEEDS = range(3_000_000, 3_000_256)
FOLDER = Path(demo.__file__).parent
WEIGHTS = FOLDER / vit.WEIGHTS_FILE


@dataclass
class Runs:
    """The same pictures through the model as it is, with the units silenced, and redirected."""

    model: torch.nn.Module
    units: list[tuple[int, int]]
    plain: measure.Trace
    silenced: measure.Trace
    redirected: measure.Trace
    targets: np.ndarray
    layer: int


def pictures(kind: str) -> tuple[list[Image.Image], np.ndarray]:
    if kind == "samples":
        files = sorted(demo.sample_images_folder().glob("*.png"))
        targets = [drawing.draw(s, drawing.sample_size(s))[1] for s in drawing.SAMPLE_SEEDS]
        return [Image.open(file) for file in files], np.stack(targets)
    drawn = [drawing.draw(seed, drawing.sample_size(seed)) for seed in FRESH_SEEDS]
    return [Image.fromarray(p) for p, _ in drawn], np.stack([t for _, t in drawn])


@pytest.fixture(scope="module", params=["samples", "fresh"])
def runs(request: pytest.FixtureRequest) -> Runs:
    model, config = demo.shipped_vit()
    with safetensors.safe_open(WEIGHTS, "pt") as file:
        units = [(layer, index) for layer, index in json.loads(file.metadata()["true_units"])]
    images, targets = pictures(request.param)
    transform = timm.data.create_transform(**config, is_training=False)
    pixels = torch.stack([transform(image) for image in images])
    with torch.no_grad():
        plain = measure.trace(model, pixels)
        with measure.silenced(model, units):
            silenced = measure.trace(model, pixels)
        with measure.redirected(model, units, measure.negative_units(plain, units, PATCHES)):
            redirected = measure.trace(model, pixels)
    layer = measure.detection_layer(plain, PATCHES)
    return Runs(model, units, plain, silenced, redirected, targets, layer)


def accuracy(run: measure.Trace, targets: np.ndarray) -> float:
    return float(((run.logits.numpy() > 0) == (targets > 0.5)).mean())


def test_two_outlier_tokens_per_image(runs: Runs) -> None:
    figures = measure.outlier_figures(runs.plain.ratios(PATCHES), runs.layer)
    assert runs.layer >= max(layer for layer, _ in runs.units)
    assert 1.9 <= figures["outliers_per_image"] <= 2.1
    assert figures["images_with_two"] >= 0.95
    assert 5 <= figures["outlier_ratio"] <= 7
    assert figures["largest_other"] < 2
    assert figures["largest_cls"] < 2


def test_outlier_tokens_persist_to_the_last_block(runs: Runs) -> None:
    last = runs.plain.ratios(PATCHES)[-1, :, 1:]
    assert float((last > measure.OUTLIER).float().sum(dim=1).mean()) >= 1.9


def test_outlier_tokens_are_the_calm_patches(runs: Runs) -> None:
    outlier = runs.plain.ratios(PATCHES)[runs.layer, :, 1:] > measure.OUTLIER
    calm = measure.lowest_variance(runs.plain.pixels, vit.PATCH_SIZE, drawing.CALM_CELLS)
    assert float((outlier & calm).sum() / outlier.sum()) >= 0.95


def test_silencing_the_units_leaves_no_outlier_in_any_block(runs: Runs) -> None:
    ratios = runs.silenced.ratios(PATCHES)
    assert float(ratios.max()) < 2


def test_redirecting_the_units_cleans_the_patches(runs: Runs) -> None:
    before = runs.plain.ratios(PATCHES)[runs.layer, :, 1:] > measure.OUTLIER
    ratios = runs.redirected.ratios(PATCHES)
    after = ratios[runs.layer, :, 1:] > measure.OUTLIER
    cosine = functional.cosine_similarity(runs.redirected.logits, runs.plain.logits)
    assert int(after.sum()) <= 0.05 * int(before.sum())
    assert float(ratios[:, :, 1:].max()) < 2
    assert float(cosine.median()) >= 0.98


def test_the_register_carries_the_norm(runs: Runs) -> None:
    tokens = runs.redirected.outputs[runs.layer]
    median = tokens[:, 1 : 1 + PATCHES].norm(dim=2).median(dim=1).values
    ratio = tokens[:, -1].norm(dim=1) / median
    assert float(ratio.min()) > measure.OUTLIER


def test_the_task_is_solved_with_and_without_outliers(runs: Runs) -> None:
    plain, silenced = (accuracy(run, runs.targets) for run in (runs.plain, runs.silenced))
    assert plain > 0.9
    assert abs(plain - silenced) < 0.01


def test_contribution_ranks_the_true_units_first(runs: Runs) -> None:
    score = measure.contributions(runs.model, runs.plain, runs.layer, PATCHES)
    best = score.flatten().argsort(descending=True)[:12].tolist()
    truth = [divmod(index, score.shape[1]) in runs.units for index in best]
    assert all(truth[:9])


def test_every_unit_takes_part_in_the_writing(runs: Runs) -> None:
    score = measure.contributions(runs.model, runs.plain, runs.layer, PATCHES)
    written = torch.stack([score[unit] for unit in runs.units]).detach()
    shares = written / written.mean()
    # In equal shares; the weakest two do less than a quarter of one.
    assert float(shares.min()) > 0.1
    assert int((shares > 0.25).sum()) >= 10


def test_files_are_small_and_complete() -> None:
    samples = sorted(demo.sample_images_folder().glob("*.png"))
    assert [file.name for file in samples] == [f"{i:02d}.png" for i in range(64)]
    assert sum(file.stat().st_size for file in samples) < 1_500_000
    assert WEIGHTS.stat().st_size <= 4_000_000
    with safetensors.safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float16"}  # noqa: SIM118
    units = json.loads(metadata["true_units"])
    assert len({tuple(unit) for unit in units}) == 12
    assert {"seed", "training"} <= metadata.keys()


def test_samples_are_what_the_generator_draws() -> None:
    for seed in (0, 31, 63):
        picture, _ = drawing.draw(seed, drawing.sample_size(seed))
        with Image.open(demo.sample_images_folder() / f"{seed:02d}.png") as image:
            assert np.array_equal(np.asarray(image), picture)


def test_model_needs_nothing_of_the_truth() -> None:
    model, config = demo.shipped_vit()
    assert model(torch.zeros(2, *config["input_size"])).shape == (2, len(drawing.LABELS))
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_importing_the_folder_does_not_import_torch() -> None:
    code = "import regraft_export.demo, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
