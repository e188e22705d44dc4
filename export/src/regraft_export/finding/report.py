"""What a selection does on images used neither for scoring nor for selection, and the gate.

Beside the redirect, the same figures for three controls: as many units drawn at random from the
same layers, redirected alike; a plain zero token appended and nothing else; the register neurons
zeroed without a register. On the models of arXiv 2506.08010 the first two leave the outliers where
they are and the third costs accuracy (zero-shot 70.4 falls to 55.6); on a model that was merely
trained to write outliers, zeroing can do as well as the redirect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.errors import GateError, InputError, ModelError
from regraft.neurons import Neurons
from regraft.wording import counted
from regraft_export.finding.judge import in_batches, register_neurons
from regraft_export.finding.outliers import Detection
from regraft_export.finding.score import Scores
from regraft_export.finding.subject import PLAIN, Floats, Intervention, Subject

MIN_REMOVED = 0.90
MIN_COSINE = 0.95


@dataclass(frozen=True)
class Run:
    """One condition, run over the report part.

    Attributes:
        norms: (L, N, patches) patch norms at every block's output.
        outputs: (N, E), the model's own output.
        output: what that is: ``pooled``, ``class token`` or ``mean patch``.
        registers: (L, N, R) norms of the registers there; R = 0 without any.
    """

    norms: Floats
    outputs: Floats
    output: str
    registers: Floats


@dataclass(frozen=True)
class Report:
    """The figures, as plain JSON values in :meth:`to_json`.

    Attributes:
        before: the model as it is.
        after: with the redirect.
        controls: the same figures, by name.
        layers: the profile of norms, by layer.
        output: which output the cosines compare.
        images: how many.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    controls: Mapping[str, Mapping[str, Any]]
    layers: tuple[Mapping[str, Any], ...]
    output: str
    images: int

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``neurons.json``."""
        return {
            "images": self.images,
            "output": self.output,
            "before": dict(self.before),
            "after": dict(self.after),
            "controls": {name: dict(figures) for name, figures in self.controls.items()},
            "layers": [dict(entry) for entry in self.layers],
        }

    def check(self) -> None:
        """The gate.

        Raises:
            GateError: too few outlier tokens are gone, or the output has changed too much.
        """
        failed = []
        if self.after["removed"] < MIN_REMOVED:
            failed.append(
                f"{self.after['removed']:.1%} of {self.before['outlier_tokens']} outlier tokens "
                f"are gone, expected at least {MIN_REMOVED:.0%}"
            )
        if self.after["output_cosine_median"] < MIN_COSINE:
            failed.append(
                f"the median cosine of the model's output ({self.output}) to the unpatched one is "
                f"{self.after['output_cosine_median']:.4f}, expected at least {MIN_COSINE}"
            )
        if failed:
            raise GateError(
                f"the selection fails on {counted(self.images, 'image')} used neither for scoring "
                f"nor for selection: {'; and '.join(failed)}; nothing was written: give more "
                "images, or set --detection-layer or --threshold by hand"
            )

    def left_later(self, detection_layer: int) -> list[int]:
        """Layers after the detection layer where a tenth of their outlier tokens or more is left.

        Later units can write outliers anew once the first ones are gone.
        """
        return [
            entry["layer"]
            for entry in self.layers[detection_layer + 1 :]
            if entry["outliers_after"] > (1 - MIN_REMOVED) * entry["outliers_before"]
        ]


def make_report(
    subject: Subject,
    pixels: Floats,
    detection: Detection,
    scores: Scores,
    neurons: Neurons,
    *,
    seed: int = 0,
    batch_size: int = 16,
) -> Report:
    """Runs the model as it is, with the redirect, and the controls.

    Args:
        subject: the model.
        pixels: (N, 3, H, W), images used for nothing else.
        detection: which tokens are outliers.
        scores: for the signs of the random units.
        neurons: the selection.
        seed: of the random units.
        batch_size: images per pass.

    Raises:
        InputError: these images have no outlier tokens.
        ModelError: outputs are not finite.
    """

    def run(done: Intervention) -> Run:
        return _run(subject, pixels, done, batch_size)

    before = run(PLAIN)
    if not (before.norms[detection.layer] > detection.threshold).any():
        raise InputError(
            f"none of the {len(pixels)} images for the report has an outlier token (patch norm "
            f"above {detection.threshold:.4g} at layer {detection.layer}); expected some: give "
            "more images, or another --seed"
        )
    after = run(Intervention(True, neurons))
    others = random_neurons(neurons, scores, seed)
    controls = {
        "random_neurons": run(Intervention(True, others)),
        "zero_token": run(Intervention(True)),
        "zeroed_without_register": run(Intervention(False, neurons)),
    }
    return Report(
        before=_figures(before, None, detection),
        after=_figures(after, before, detection),
        controls={name: _figures(r, before, detection) for name, r in controls.items()},
        layers=tuple(_profile(before, after, detection)),
        output=before.output,
        images=len(pixels),
    )


def random_neurons(neurons: Neurons, scores: Scores, seed: int) -> Neurons:
    """As many units of the same layers, none of them selected, drawn by ``seed``."""
    draw = np.random.default_rng([seed, 1])
    units = []
    for layer in neurons.layers:
        taken = {n.index for n in neurons.of(layer)}
        free = np.array([i for i in range(len(scores.score[layer])) if i not in taken])
        chosen = draw.choice(free, min(len(taken), len(free)), replace=False)
        units += [(layer, int(index)) for index in chosen]
    return register_neurons(units, scores)


def _run(subject: Subject, pixels: Floats, done: Intervention, batch_size: int) -> Run:
    seen = [subject.observe(part, done) for part in in_batches(pixels, batch_size)]
    output = seen[0].output
    outputs = np.concatenate([s.outputs for s in seen])
    norms = np.concatenate([s.norms for s in seen], axis=1)
    finite = np.isfinite(outputs).all(axis=1) & np.isfinite(norms).all(axis=(0, 2))
    if not finite.all():
        raise ModelError(
            f"the model's features or output ({output}) have NaN or infinite values on "
            f"{int((~finite).sum())} of {counted(len(pixels), 'image')}; expected finite features: "
            "check the weights and the preprocessing (mean, std)"
        )
    patches = subject.patches
    return Run(norms[..., :patches], outputs, output, norms[..., patches:])


def _cosines(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Of rows, (N,); 0 where one is all zeros."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosines: NDArray[np.float64] = (x * y).sum(axis=1) / np.maximum(lengths, 1e-30)
    return cosines.clip(-1, 1)


def _figures(run: Run, before: Run | None, detection: Detection) -> dict[str, Any]:
    norms = run.norms[detection.layer]
    outliers = norms > detection.threshold
    median = float(np.median(norms))
    figures: dict[str, Any] = {
        "outlier_tokens": int(outliers.sum()),
        "outlier_share": float(outliers.mean()),
        "images_with_outliers": int(outliers.any(axis=1).sum()),
        "median_norm": median,
        "largest_norm": float(norms.max()),
        "largest_over_median": float(norms.max()) / median,
    }
    if before is not None:
        had = int((before.norms[detection.layer] > detection.threshold).sum())
        cosine = _cosines(run.outputs, before.outputs)
        figures["removed"] = 1 - figures["outlier_tokens"] / had
        figures["output_cosine_median"] = float(np.median(cosine))
        figures["output_cosine_smallest"] = float(cosine.min())
    if run.registers.size:
        figures["register_norm"] = float(run.registers[detection.layer].mean())
    return figures


def _profile(before: Run, after: Run, detection: Detection) -> list[dict[str, Any]]:
    """Per layer: norms before and after, and outliers by the layer's own threshold."""
    rows = []
    for entry in detection.profile:
        b, a = before.norms[entry.layer], after.norms[entry.layer]
        rows.append(
            {
                "layer": entry.layer,
                "median_before": float(np.median(b)),
                "largest_before": float(b.max()),
                "median_after": float(np.median(a)),
                "largest_after": float(a.max()),
                "outliers_before": int((b > entry.threshold).sum()) if entry.shown else 0,
                "outliers_after": int((a > entry.threshold).sum()) if entry.shown else 0,
            }
        )
    return rows
