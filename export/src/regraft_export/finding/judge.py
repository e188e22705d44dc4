"""Runs redirects on the select part and says whether they remove the outlier tokens.

At least 99 % of the outlier tokens must be gone and the largest patch norm must come under twice
the median, both at the detection layer. The smallest set that just passes on a few images would
fail on others, so twice the median is first asked for with a tenth to spare, then exactly. Where
ordinary patches alone go beyond twice the median, no redirect can help that: then, last, the limit
is the largest norm that ordinary patches had before.

A set is judged on two images first, those with the largest norms, and given up as soon as it has
failed: most sets cost one short pass over these. In front of the first touched layer all sets are
alike, so what comes there is computed once for each such layer and kept, up to 1 GiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.errors import InputError, ModelError
from regraft.neurons import Neurons, RegisterNeuron
from regraft_export.finding.outliers import Detection
from regraft_export.finding.score import Scores
from regraft_export.finding.subject import Floats, Intervention, Subject

REMOVED = 0.99
TIMES_MEDIAN = 2.0
TO_SPARE = 0.9
_FIRST_IMAGES = 2
MAX_KEPT_BYTES = 1 << 30

Unit = tuple[int, int]
"""(layer, index)."""


def register_neurons(units: Sequence[Unit], scores: Scores) -> Neurons:
    """The units as register neurons, best first, with their scores and signs."""
    rows = [
        RegisterNeuron(
            layer=layer,
            index=index,
            score=float(scores.score[layer][index]),
            sign=-1 if scores.activation[layer][index] < 0 else 1,
        )
        for layer, index in units
    ]
    return Neurons(tuple(sorted(rows, key=lambda n: (-n.score, n.layer, n.index))))


@dataclass(frozen=True)
class Limits:
    """What a redirect must reach.

    Attributes:
        outliers: at most so many outlier tokens may be left.
        norm: below which the largest patch norm must come.
    """

    outliers: int
    norm: float


@dataclass(frozen=True)
class Outcome:
    """What a redirect reached; lower bounds if it was given up before the last image.

    Attributes:
        outliers: outlier tokens left.
        largest: largest patch norm.
        complete: whether all images were run.
    """

    outliers: int
    largest: float
    complete: bool

    def within(self, limits: Limits) -> bool:
        """Whether it reached ``limits`` as far as it was run."""
        return self.outliers <= limits.outliers and self.largest < limits.norm


class Judge:
    """Runs redirects on the select part and remembers what they reached.

    Attributes:
        before: outlier tokens without a redirect.
        median: median patch norm without one.
        largest_ordinary: largest norm of a patch that is no outlier, without one.
        runs: passes made so far, in images.
    """

    def __init__(
        self,
        subject: Subject,
        pixels: Floats,
        detection: Detection,
        scores: Scores,
        batch_size: int = 16,
    ) -> None:
        """Runs the model as it is.

        Args:
            subject: the model.
            pixels: (N, 3, H, W), the select part.
            detection: which tokens are outliers.
            scores: for the signs of the units.
            batch_size: images per pass.

        Raises:
            InputError: these images have no outlier tokens.
            ModelError: features are not finite.
        """
        self._subject, self._detection, self._scores = subject, detection, scores
        self.runs = 0
        norms = np.concatenate([self._plain(part) for part in in_batches(pixels, batch_size)])
        if bad := int((~np.isfinite(norms)).sum()):
            raise ModelError(
                f"layer {detection.layer}: {bad} of {norms.size} patch norms of the images for "
                "selection are NaN or infinite; expected finite features: check the weights and "
                "the preprocessing (mean, std)"
            )
        is_outlier = norms > detection.threshold
        self.before = int(is_outlier.sum())
        if self.before == 0:
            raise InputError(
                f"none of the {len(pixels)} images for selection has an outlier token (patch norm "
                f"above {detection.threshold:.4g} at layer {detection.layer}); expected some: "
                "give more images, or another --seed"
            )
        # The lower of the two middle ones.
        self.median = float(np.sort(norms, axis=None)[(norms.size - 1) // 2])
        self.largest_ordinary = float(np.where(is_outlier, 0, norms).max())
        order = np.argsort(-norms.max(axis=1), kind="stable")
        first, rest = order[:_FIRST_IMAGES], order[_FIRST_IMAGES:]
        batches = [first, *in_batches(rest, batch_size)]
        self._batches = [pixels[i] for i in batches if len(i)]
        self._seen: dict[frozenset[Unit], Outcome] = {}
        self._starts: dict[tuple[int, int], Any] = {}
        # Images of which one block's output is kept.
        self._room = MAX_KEPT_BYTES // subject.state_bytes

    def limits(self) -> list[Limits]:
        """From the strictest to the most lenient, see the module."""
        left = int((1 - REMOVED) * self.before + 1e-9)
        twice = TIMES_MEDIAN * self.median
        norms = [TO_SPARE * twice, twice]
        if self.largest_ordinary >= twice:
            # "Not above" what ordinary patches had, with room for rounding.
            norms.append(self.largest_ordinary * 1.01)
        return [Limits(left, norm) for norm in norms]

    def passes(self, units: Sequence[Unit], limits: Limits) -> bool:
        """Whether redirecting ``units`` reaches ``limits`` on all images."""
        if not units:
            return False
        known = self._seen.get(frozenset(units))
        if known is not None and (known.complete or not known.within(limits)):
            return known.within(limits)
        return self.run(units, limits).within(limits)

    def run(self, units: Sequence[Unit], limits: Limits | None = None) -> Outcome:
        """Redirects ``units``; with ``limits``, no further than to the first image that fails."""
        outliers, largest, done = 0, 0.0, 0
        first = min(layer for layer, _ in units)
        redirect = Intervention(True, register_neurons(units, self._scores))
        for index, batch in enumerate(self._batches):
            start = self._start(index, first)
            self.runs += len(batch)
            norms = self._subject.norms_at(batch, self._detection.layer, redirect, start)
            outliers += int((norms > self._detection.threshold).sum())
            largest = max(largest, float(norms.max()))
            done += 1
            # A comparison with NaN is false: features that are not finite fail at once.
            if limits and not Outcome(outliers, largest, False).within(limits):
                break
        outcome = Outcome(outliers, largest, done == len(self._batches))
        self._seen[frozenset(units)] = outcome
        return outcome

    def _start(self, index: int, layer: int) -> tuple[int, Any] | None:
        """Where passes over one batch begin: at ``layer``, where that much can be kept."""
        batch, key = self._batches[index], (index, layer)
        if layer == 0 or (key not in self._starts and len(batch) > self._room):
            return None
        if key not in self._starts:
            self._starts[key] = self._subject.state(batch, layer)
            self._room -= len(batch)
        return layer, self._starts[key]

    def _plain(self, pixels: Floats) -> Floats:
        self.runs += len(pixels)
        return self._subject.norms_at(pixels, self._detection.layer)


def in_batches(rows: NDArray[Any], size: int) -> list[NDArray[Any]]:
    """The rows, at most ``size`` at a time."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]
