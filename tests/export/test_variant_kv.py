"""The variant kv from the command line to the features, and what it is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.planted import planted
from tests.support import bundles, pictures

from regraft.bundle import Bundle
from regraft.extractor import Extractor
from regraft.redirect import RedirectOptions
from regraft_export.calibration import calibrate, choose
from regraft_export.vit.hooks import redirected, register_replaced, silenced
from regraft_export.vit.observe import observe

Regraft = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return pictures.write(tmp_path / "pictures", 6)


@pytest.mark.usefixtures("quick_trace")
def test_the_whole_path(regraft: Regraft, photos: Path, tmp_path: Path) -> None:
    neurons = bundles.write_neurons(tmp_path / "neurons.json")
    words = ("export", bundles.PLANTED, "--neurons", neurons, "--images", photos)
    kv, token = tmp_path / "kv", tmp_path / "token"
    code, out, err = regraft(*words, "--out", kv, "--variant", "kv", "--strict")
    assert (code, err) == (0, "")
    assert "sites: 0 token, 2 redirect (layers 1, 2), 0 output, " in out
    assert "3 images: passed" in out  # the other half calibrates
    assert regraft(*words, "--out", token)[0] == 0
    manifest = Bundle.open(kv).manifest
    assert (manifest.variant, manifest.tokens.test_time_registers) == ("kv", 0)
    assert "test_time_registers" not in manifest.outputs
    made = manifest.constants
    assert made is not None
    assert {"model_cuda", "baseline_cuda"} <= set(manifest.graphs)
    assert manifest.cuda is not None
    assert manifest.cuda.constants == manifest.tokens.depth - made.first_layer
    assert (made.images, made.measured_images, list(made.errors)) == (3, 3, [2, 3, 4])
    assert made.first_layer == choose(made.errors)
    effect = Bundle.open(kv).verification()["effect"]
    assert effect["before"]["outliers"] > 0
    assert (effect["after"]["outliers"], effect["register_norm"]) == (0, None)
    for command in (
        ("verify", kv, "--images", photos),
        ("verify", kv, "--images", photos, "--model", bundles.PLANTED),
        ("bench", kv, "--seconds", "0.1", "--rounds", "2"),
        ("report", kv, "--images", photos, "--out", tmp_path / "report.html"),
    ):
        assert regraft(*command)[::2] == (0, ""), command
    assert "variant        kv: neurons zero in the weights" in regraft("inspect", kv)[1]
    assert "register norm" not in (tmp_path / "report.html").read_text().split("<h2>Controls")[0]
    code, out, _ = regraft("verify", kv, "--images", photos, "--against", token)
    assert code == 0
    assert "side by side                          baseline          kv       token" in out
    headings = [line for line in out.splitlines() if "parity of ort-cpu (fp32) with " in line]
    assert [line.partition(": parity")[0] for line in headings] == [
        f"{kv}, variant kv",
        f"{token}, variant token",
    ]
    assert "agreement of the two, cosine of cls: median " in out
    code, out, _ = regraft("verify", kv, "--images", photos, "--against", token, "--json")
    said = json.loads(out)
    assert (said["variant"], said["against"]["variant"]) == ("kv", "token")
    assert {a["what"] for a in said["agreement"]} == {"cls", "patches", "pooled"}
    with Extractor.open(kv) as extractor:
        features = extractor.extract(sorted(photos.iterdir()))
        assert features.test_time_registers is None
        single = extractor.extract([sorted(photos.iterdir())[2]])
        np.testing.assert_allclose(single.patches[0], features.patches[2], atol=1e-4)


@pytest.mark.usefixtures("quick_trace")
def test_exporting_twice_gives_the_same_bundle(tmp_path: Path, regraft: Regraft) -> None:
    photos = pictures.write(tmp_path / "pictures", 6)
    neurons = bundles.write_neurons(tmp_path / "neurons.json")
    words = ("export", bundles.PLANTED, "--neurons", neurons, "--images", photos)
    for out in ("a", "b"):
        assert regraft(*words, "--out", tmp_path / out, "--variant", "kv")[0] == 0
    a, b = (Bundle.open(tmp_path / out).manifest for out in ("a", "b"))
    assert a.files == b.files
    assert a.constants == b.constants


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cls", "keep"), "--variant kv silences the neurons in the weights, on every token; "),
        (("--patches", "mean"), "--patches mean needs --variant token"),
    ],
)
def test_options_that_need_a_token_are_refused(
    regraft: Regraft, photos: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    neurons = bundles.write_neurons(tmp_path / "neurons.json")
    code, _, err = regraft(
        *("export", bundles.PLANTED, "--neurons", neurons, "--images", photos, "--variant", "kv"),
        *("--out", tmp_path / "bundle", *words),
    )
    assert code == 2
    assert message in err
    assert not (tmp_path / "bundle").exists()


def test_products_are_operators_without_a_token_too(
    regraft: Regraft, photos: Path, tmp_path: Path
) -> None:
    neurons = bundles.write_neurons(tmp_path / "neurons.json")
    code, _, err = regraft(
        *("export", bundles.PLANTED, "--neurons", neurons, "--images", photos, "--variant", "kv"),
        *("--out", tmp_path / "bundle", "--cuda-operators"),
    )
    assert code == 0, err
    fused = Bundle.open(tmp_path / "bundle").manifest.cuda
    assert fused is not None
    assert fused.constants > 0
    assert fused.operators > 0


def test_one_image_is_too_few(regraft: Regraft, tmp_path: Path) -> None:
    photos = pictures.write(tmp_path / "pictures", 1)
    neurons = bundles.write_neurons(tmp_path / "neurons.json")
    code, _, err = regraft(
        *("export", bundles.PLANTED, "--neurons", neurons, "--images", photos, "--variant", "kv"),
        *("--out", tmp_path / "bundle"),
    )
    assert (code, "expected at least 2" in err) == (1, True)


def test_bundles_of_two_models_do_not_stand_side_by_side(
    regraft: Regraft, exported: Path, photos: Path, tmp_path: Path
) -> None:
    neurons = bundles.write_neurons(tmp_path / "n.json", bundles.neurons())
    words = ("export", bundles.PLAIN, "--neurons", neurons, "--images", photos, "--no-baseline")
    assert regraft(*words, "--out", tmp_path / "other")[0] == 0
    code, _, err = regraft("verify", exported, "--images", photos, "--against", tmp_path / "other")
    assert code == 1
    assert "differ in their weights" in err


@pytest.mark.parametrize(
    ("errors", "first"),
    [
        ({2: 0.1, 3: 0.1, 4: 0.5, 5: 0.5}, 3),
        ({2: 0.1, 3: 0.12, 4: 0.5}, 3),
        ({2: 0.1, 3: 0.13, 4: 0.5}, 2),
        ({2: 0.1, 3: 0.2, 4: 0.1}, 4),  # without any it is no worse: none is needed
        ({2: 0.3, 3: 0.2}, 3),
        ({4: 0.2}, 4),
    ],
)
def test_the_rule_for_the_first_block(errors: dict[int, float], first: int) -> None:
    assert choose(errors) == first


def test_where_the_register_is_needed_constants_keep_what_zeroing_loses() -> None:
    """The register takes over a fifth of CLS attention; other pictures than the calibration's."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.nn.functional.interpolate(
        torch.randn(24, 3, 16, 16, generator=generator), size=(64, 64), mode="bicubic"
    )
    vit, neurons = planted(pixels[:12])
    options = RedirectOptions()
    found = calibrate(vit, neurons, options, [pixels[:12].numpy()])
    images, count, depth = pixels[12:], vit.layout.count, vit.layout.depth

    def cosines(state: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
        similar = torch.nn.functional.cosine_similarity(state, right, dim=-1)
        return float(similar[:, 0].median()), float(similar[:, 1:].median())

    with torch.no_grad():
        before = observe(vit, images, layers=range(depth))
        with redirected(vit, neurons, options):
            token = observe(vit, images, attentions=range(depth))
        with register_replaced(vit, neurons.neurons, found.constants):
            kv = observe(vit, images, layers=range(depth), attentions=range(depth))
        with silenced(vit, neurons.neurons):
            zeroed = observe(vit, images)
    later = range(found.about.first_layer, depth)
    assert found.about.first_layer == neurons.layers[0] + 1
    share = [float(token.attention[i][:, :, count:].sum(dim=2).mean()) for i in later]
    assert min(share) >= 0.2
    kept = [float(kv.attention[i][:, :, count:].sum(dim=2).mean()) for i in later]
    np.testing.assert_allclose(kept, share, atol=0.1)
    for layer in range(neurons.layers[-1], depth):
        norms = kv.hidden[layer].norm(dim=-1)
        assert float(norms.max() / norms.median()) < 2
        patches = before.hidden[layer][:, 1:].norm(dim=-1)
        assert float(patches.max() / patches.median()) > 4
    by_kv = cosines(kv.last_hidden_state, token.last_hidden_state)
    by_zero = cosines(zeroed.last_hidden_state, token.last_hidden_state)
    # Less than half of what zeroing loses, in CLS and in the patches.
    assert 1 - by_kv[0] < (1 - by_zero[0]) / 2, (by_kv, by_zero)
    assert 1 - by_kv[1] < (1 - by_zero[1]) / 2, (by_kv, by_zero)
