"""The smallest set of units whose redirect removes the outlier tokens, as register neurons.

Judged (see ``judge.py``) on at most 32 images that were not used for scoring, and searched for as
``search.py`` describes: first among the units that each contribute a hundredth of the outliers'
norm or more (notable ones), then, if these do not pass, among all with a positive score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regraft.errors import GateError, InputError
from regraft.neurons import Neurons, RegisterNeuron
from regraft_export.finding.judge import (
    REMOVED,
    TIMES_MEDIAN,
    Judge,
    Limits,
    Outcome,
    Unit,
    in_batches,
    register_neurons,
)
from regraft_export.finding.outliers import Detection
from regraft_export.finding.score import Scores
from regraft_export.finding.search import Search, sizes
from regraft_export.finding.subject import Doubles, Floats, Subject

NOTABLE = 0.01


@dataclass(frozen=True)
class Selection:
    """The chosen register neurons and how they were judged.

    Attributes:
        neurons: best first, each with its ``value``.
        limits: what they reached.
        before: outlier tokens without a redirect.
        outcome: what was left with it.
        median: median patch norm without it.
        runs: images passed through the model during the search.
    """

    neurons: Neurons
    limits: Limits
    before: int
    outcome: Outcome
    median: float
    runs: int


def select(
    subject: Subject,
    pixels: Floats,
    detection: Detection,
    scores: Scores,
    *,
    max_neurons: int = 512,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda images: None,
) -> Selection:
    """Chooses register neurons.

    Args:
        subject: the model.
        pixels: (N, 3, H, W), images not used for scoring.
        detection: which tokens are outliers.
        scores: of all units up to the detection layer.
        max_neurons: at most so many are chosen.
        batch_size: images per pass.
        advance: told how many images were run, for a progress bar.

    Raises:
        InputError: the images have no outlier tokens, or ``max_neurons`` is below 1.
        GateError: no set of units reaches the limits; the message has the best figures.
    """
    if max_neurons < 1:
        raise InputError(f"max neurons is {max_neurons}; expected at least 1")
    judge = Judge(subject, pixels, detection, scores, batch_size)
    ranking = scores.ranking()[:max_neurons]
    notable = _notable(ranking, scores, detection)
    for among in notable, ranking:
        search = Search(judge, scores, among, notable, advance)
        for limits in judge.limits():
            units = search.smallest(limits)
            if not units:
                continue
            neurons = _with_values(subject, pixels, register_neurons(units, scores), batch_size)
            outcome = judge.run(units)
            return Selection(neurons, limits, judge.before, outcome, judge.median, judge.runs)
    raise GateError(_not_removed(judge, ranking, detection.layer))


def _notable(ranking: Sequence[Unit], scores: Scores, detection: Detection) -> Sequence[Unit]:
    """The units that contribute a notable part of the outliers' norm; none for other scores."""
    if scores.kind != "contribution":
        return []
    least = NOTABLE * detection.found.typical
    return [(layer, index) for layer, index in ranking if scores.score[layer][index] >= least]


def _not_removed(judge: Judge, ranking: Sequence[Unit], layer: int) -> str:
    if not ranking:
        return "no unit has a positive score, so nothing can be selected; try the other --score"
    tried = {size: judge.run(ranking[:size]) for size in sizes(len(ranking))}
    size, best = min(tried.items(), key=lambda item: (item[1].outliers, item[1].largest))
    removed = 1 - best.outliers / judge.before
    return (
        f"no set of at most {len(ranking)} units removes the outlier tokens at layer {layer}: the "
        f"best {size} remove {removed:.1%} of {judge.before} and leave the largest patch norm at "
        f"{best.largest / judge.median:.2f} times the median; expected {REMOVED:.0%} and "
        f"{TIMES_MEDIAN:g} times: try a larger --max-neurons, another --detection-layer, or more "
        "images"
    )


def _with_values(subject: Subject, pixels: Floats, neurons: Neurons, batch_size: int) -> Neurons:
    """The neurons with ``value``: what the register receives, averaged over images."""
    sums: dict[int, Doubles] = {}
    for part in in_batches(pixels, batch_size):
        for layer, received in subject.received(part, neurons).items():
            sums[layer] = sums.get(layer, np.zeros_like(received)) + received
    return Neurons(tuple(_valued(n, sums, len(pixels)) for n in neurons.neurons))


def _valued(neuron: RegisterNeuron, sums: Mapping[int, Doubles], images: int) -> RegisterNeuron:
    value = float(sums[neuron.layer][neuron.index]) / images
    return RegisterNeuron(neuron.layer, neuron.index, neuron.score, neuron.sign, value)
