"""What the page shows of a measured image, as JSON: texts, pictures and numbers, ready to place.

All that is computed, coloured or worded is what `regraft report` computes, colours and words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.report.colours import ColourScale
from regraft.report.figures import attention, profile
from regraft.report.layer_maps import LayerMaps, When, map_scales, numbers_of, outline
from regraft.report.markup import Markup, png_uri
from regraft.report.measurement import Measurement
from regraft.report.tables import by_layer
from regraft.report.wording import (
    COSINE_OF,
    cosine,
    count,
    counted,
    headline,
    looked_at,
    percent,
    short,
    stand_in,
)
from regraft.timing import Times

STATES: tuple[When, When] = ("before", "after")


def maps(found: Measurement) -> dict[str, Any]:
    """Everything but the latency of the first image of a measurement."""
    manifest, sample = found.manifest, found.samples[0]
    at_detection = LayerMaps(found, 0, manifest.detection_layer)
    return {
        "headline": headline(sample.effect),
        "picture": png_uri(sample.picture),
        "grid": list(manifest.tokens.grid),
        "detection_layer": manifest.detection_layer,
        "outlines": {when: outline(at_detection.outliers(when)) for when in STATES},
        "attention_of": looked_at(manifest.tokens.class_token),
        "figures": _figures(found),
        "layers": [_layer(found, layer) for layer in range(manifest.tokens.depth)],
        "charts": [profile(found), attention(found)],
        "table": by_layer(found),
        "aside": _aside(manifest.variant),
        "engine": found.engine,
    }


def latency(times: dict[str, Times], engine: str) -> dict[str, Any]:
    """The two times, and what they are."""
    runs = len(times["baseline"].seconds)
    before, after = (_milliseconds(times[name].median) for name in ("baseline", "patched"))
    return {
        "value": f"{before} → {after}",
        "note": f"one image; median of {counted(runs, 'run')} each, in turn, on {engine}",
        "seconds": {name: t.median for name, t in times.items()},
        "runs": runs,
    }


def _figures(found: Measurement) -> dict[str, Any]:
    """Those that do not depend on the layer that is shown."""
    effect = found.samples[0].effect
    return {
        "outliers": {
            "value": f"{count(effect.before.outliers)} → {count(effect.after.outliers)}",
            "note": f"of {counted(effect.patches, 'patch', 'patches')}: norm above "
            f"{short(effect.threshold)} in layer {effect.detection_layer}",
        },
        "cosine": {
            "value": cosine(effect.cosine_median),
            "note": f"{COSINE_OF[effect.cosine_of]}, patched to baseline",
        },
    }


def _layer(found: Measurement, layer: int) -> dict[str, Any]:
    one, scales, manifest = LayerMaps(found, 0, layer), map_scales(found, layer), found.manifest
    ratios = [_over_median(one.norms(when)) for when in STATES]
    largest = [short(float(one.norms(when).max())) for when in STATES]
    what = looked_at(manifest.tokens.class_token)
    marks = [
        *(["detection layer"] if layer == manifest.detection_layer else []),
        *(["has register neurons"] if layer in manifest.layers else []),
    ]
    return {
        "name": ", ".join([f"Layer {layer}", *marks]),
        "touched": layer in manifest.layers,
        "ratio": {
            "value": f"{ratios[0]:.2f} → {ratios[1]:.2f}",
            "note": f"layer {layer}: largest {largest[0]} → {largest[1]}",
        },
        "register": {
            "name": f"{what[0].upper()}{what[1:]} on the {stand_in(manifest.variant)}",
            "value": percent(one.register_share()),
            "note": f"layer {layer}, patched; evenly spread: {percent(1 / manifest.tokens.count)}",
        },
        "bars": {
            "norm": _bar(scales.norms, "norms", _threshold(found, layer)),
            "attention": _bar(
                scales.attention, "shares", [(1 / manifest.tokens.count, "evenly spread")]
            ),
        },
        "maps": {
            when: {
                "norm": {
                    "image": png_uri(scales.norms.image(one.norms(when), 0)),
                    "note": one.norms_note(when),
                    "values": numbers_of(one.norms(when)),
                },
                "attention": {
                    "image": png_uri(scales.attention.image(one.attention(when), 0)),
                    "note": one.attention_note(when),
                    "values": numbers_of(one.attention(when)),
                },
            }
            for when in STATES
        },
    }


def _threshold(found: Measurement, layer: int) -> list[tuple[float, str]]:
    threshold = found.manifest.threshold
    here = layer == found.manifest.detection_layer
    return [(threshold, f"threshold {short(threshold)}")] if here else []


def _bar(colours: ColourScale, ident: str, marks: list[tuple[float, str]]) -> Markup:
    inside = (m for m in marks if colours.scale.lo < m[0] < colours.scale.hi)
    return colours.bar(ident, tuple(inside))


def _over_median(norms: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    median = float(np.median(norms))
    return float(norms.max()) / median if median else 0.0


def _aside(variant: str) -> str:
    if variant == "token":
        return (
            "The register is not a patch and not on the maps; its share of the attention stands "
            "beside them."
        )
    return (
        "This bundle is of the variant kv, without a register: the constants that stand in for it "
        "are no token and not on the maps; their share of the attention stands beside them."
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"
