from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from regraft.effect import EffectMeter
from regraft.manifest import Manifest
from regraft.parity import cosine
from regraft.preprocessing import Preprocessing
from regraft.redirect import RedirectOptions
from regraft.rewrite_counts import Sites
from regraft.tokens import TokenLayout

# CLS and a trained register, four patches, two test-time registers; three layers, two heads.
TOKENS = TokenLayout(True, 2, (2, 2), 4, depth=3, heads=2, test_time_registers=2)
MANIFEST = Manifest(
    model={},
    preprocessing=Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, "exact", (8, 8)),
    tokens=TOKENS,
    redirect=RedirectOptions(registers=2, scale=(1.0, 1.0)),
    layers=(1,),
    detection_layer=1,
    threshold=10.0,
    outputs={"last_hidden_state": ("batch", 6, 4), "pooler_output": ("batch", 4)},
    precision="fp32",
    opset=20,
    sites=Sites(1, 1, 1),
    graphs={},
)
Outputs = dict[str, NDArray[np.float32]]


def outputs(batch: int, tokens: int, seed: int) -> Outputs:
    rng = np.random.default_rng(seed)
    found = {f"norms.{i}": rng.uniform(1, 9, (batch, tokens)) for i in range(3)}
    found |= {f"attentions.{i}": rng.dirichlet(np.ones(tokens), (batch, 2)) for i in range(3)}
    found["last_hidden_state"] = rng.normal(size=(batch, 6, 4))
    found["pooler_output"] = rng.normal(size=(batch, 4))
    return {name: value.astype(np.float32) for name, value in found.items()}


def test_the_figures_of_a_small_case() -> None:
    baseline, patched = outputs(2, 6, 0), outputs(2, 8, 1)
    baseline["norms.1"] = np.array(
        [[99, 99, 4, 11, 5, 30], [99, 99, 3, 10, 2, 1]], np.float32
    )  # prefix tokens do not count, and 10 is not above 10
    patched["norms.1"] = np.array(
        [[99, 99, 4, 5, 6, 7, 40, 60], [99, 99, 3, 2, 10.5, 1, 20, 80]], np.float32
    )
    for name in ("norms.0", "norms.2"):  # other layers do not count
        baseline[name][:] = 1000
    meter = EffectMeter(MANIFEST)
    meter.update(baseline, patched)
    effect = meter.result()
    assert (effect.images, effect.patches) == (2, 8)
    assert (effect.detection_layer, effect.threshold) == (1, 10.0)
    before, after = effect.before, effect.after
    assert (before.outliers, before.median, before.largest) == (2, 4.5, 30)
    assert (after.outliers, after.median, after.largest) == (1, 4.5, 10.5)
    assert effect.removed == 0.5
    assert effect.register_norm == 50
    for i in range(3):
        share = patched[f"attentions.{i}"][:, :, 6:].sum(axis=2).mean()
        assert effect.register_attention[i] == pytest.approx(share, rel=1e-5)


def test_batches_add_up() -> None:
    baseline, patched = outputs(5, 6, 0), outputs(5, 8, 1)
    whole, parts = EffectMeter(MANIFEST), EffectMeter(MANIFEST)
    whole.update(baseline, patched)
    for part in (slice(0, 2), slice(2, 4), slice(4, 5)):
        cut = [{name: value[part] for name, value in side.items()} for side in (baseline, patched)]
        parts.update(*cut)
    one, two = whole.result(), parts.result()
    assert one.register_attention == pytest.approx(two.register_attention, rel=1e-5)
    assert replace(one, register_attention={}) == replace(two, register_attention={})


@pytest.mark.parametrize(
    ("kind", "class_token", "names"),
    [
        ("pooled", True, ["last_hidden_state", "pooler_output"]),
        ("cls", True, ["last_hidden_state"]),
        ("patches", False, ["last_hidden_state"]),
    ],
)
def test_what_the_cosines_compare(kind: str, class_token: bool, names: list[str]) -> None:
    manifest = replace(
        MANIFEST,
        tokens=replace(TOKENS, class_token=class_token),
        outputs=dict.fromkeys(names, ("batch",)),
    )
    baseline, patched = outputs(3, 6, 0), outputs(3, 8, 1)
    meter = EffectMeter(manifest)
    meter.update(baseline, patched)
    effect = meter.result()
    a, b = {
        "pooled": [side["pooler_output"] for side in (baseline, patched)],
        "cls": [side["last_hidden_state"][:, 0] for side in (baseline, patched)],
        "patches": [side["last_hidden_state"][:, 2:].mean(axis=1) for side in (baseline, patched)],
    }[kind]
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert effect.cosine_of == kind
    assert effect.cosine_median == pytest.approx(np.median(cosines), abs=1e-6)
    assert effect.cosine_smallest == pytest.approx(cosines.min(), abs=1e-6)


@pytest.mark.parametrize("created", [0, 3])
def test_without_outliers_before_no_share_is_removed(created: int) -> None:
    baseline, patched = outputs(2, 6, 0), outputs(2, 8, 1)
    patched["norms.1"][0, 2 : 2 + created] = 50
    meter = EffectMeter(MANIFEST)
    meter.update(baseline, patched)
    effect = meter.result()
    assert (effect.before.outliers, effect.after.outliers) == (0, created)
    assert effect.removed is None
    assert json.loads(json.dumps(effect.to_json()))["removed"] is None


def test_nan_is_no_normal_token_and_json_stays_json() -> None:
    baseline, patched = outputs(2, 6, 0), outputs(2, 8, 1)
    patched["norms.1"][0, 3] = np.nan
    patched["pooler_output"][1] = np.nan
    meter = EffectMeter(MANIFEST)
    meter.update(baseline, patched)
    effect = meter.result()
    assert effect.after.outliers == 1
    said = json.loads(json.dumps(effect.to_json(), allow_nan=False))
    assert said["after"] == {"outliers": 1, "median": None, "largest": None}
    # A vector with NaN agrees with nothing: its cosine counts as 0.
    first = cosine(baseline["pooler_output"][0], patched["pooler_output"][0])
    assert said["cosine_median"] == pytest.approx(first / 2, abs=1e-6)
    assert said["before"]["largest"] == pytest.approx(effect.before.largest)
