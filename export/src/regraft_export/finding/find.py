"""From a model and images to its register neurons: detection, scoring, selection, report, gate."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from regraft.errors import InputError
from regraft.neurons import Neurons, RegisterNeuron
from regraft.progress import Progress
from regraft_export.finding.fingerprint import fingerprint
from regraft_export.finding.outliers import Detection, detect
from regraft_export.finding.parts import Images, Parts, gathered, split
from regraft_export.finding.report import Report, make_report
from regraft_export.finding.score import Score, Scores, gather_norms, score_neurons
from regraft_export.finding.selection import Selection, select
from regraft_export.finding.subject import Floats, Subject

_DIGITS = 6  # significant digits of the figures in neurons.json

StartProgress = Callable[[int | None, str, str], Progress]
"""(total, unit, label) to a progress bar."""


@dataclass(frozen=True)
class FindOptions:
    """How register neurons are found.

    Attributes:
        seed: of the split and of the random control.
        score: ``contribution`` or, as in the paper, ``activation``.
        threshold: patch norm above which a token is an outlier; None to choose it.
        detection_layer: at whose raw output; None to choose it.
        max_layer: last layer to score; None for the detection layer.
        max_neurons: at most so many are selected.
        batch_size: images per pass in selection and report.
    """

    seed: int = 0
    score: Score = "contribution"
    threshold: float | None = None
    detection_layer: int | None = None
    max_layer: int | None = None
    max_neurons: int = 512
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.score not in ("contribution", "activation"):
            raise InputError(f"score is {self.score!r}; expected contribution or activation")
        for name, least in (("seed", 0), ("max_neurons", 1), ("batch_size", 1)):
            got = getattr(self, name)
            if got < least:
                raise InputError(f"{name} is {got}; expected at least {least}")


@dataclass(frozen=True)
class Found:
    """What finding gave.

    Attributes:
        neurons: for ``neurons.json``; the same for the same seed, images and machine.
        report: the figures, which ``neurons`` has too.
        seconds: what each stage took; selection and report run on at most 32 images each.
        runs: images that selection passed through the model.
    """

    neurons: Neurons
    report: Report
    seconds: Mapping[str, float]
    runs: int


@dataclass
class _Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def silent(total: int | None, unit: str, label: str) -> Progress:
    """A progress bar that draws nothing."""
    return Progress(total, unit, label, stream=io.StringIO())


def find_neurons(
    subject: Subject,
    images: Images,
    options: FindOptions | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    progress: StartProgress = silent,
) -> Found:
    """Finds the register neurons of a model.

    Args:
        subject: the model.
        images: at least six, better 100 or more.
        options: seed, score, overrides.
        about: what the caller knows of the model, put in front of the facts recorded here:
            ``model``, ``architecture``, ``weights_sha256``, ``preprocessing``.
        progress: starts a progress bar for each stage.

    Raises:
        InputError: too few images, or an option out of range.
        ModelError: no outlier tokens, or features that are not finite.
        GateError: nothing removes the outlier tokens, or the selection fails on the report part.
    """
    options = options or FindOptions()
    clock = _Clock()
    parts = split(len(images), options.seed)
    with clock.stage("detection"):
        batches = _watched(images.batches(parts.score), len(parts.score), "detecting", progress)
        detection = detect(
            gather_norms(subject, batches),
            threshold=options.threshold,
            layer=options.detection_layer,
        )
    with clock.stage("scoring"):
        batches = _watched(images.batches(parts.score), len(parts.score), "scoring", progress)
        scores = score_neurons(
            subject, batches, detection, kind=options.score, max_layer=options.max_layer
        )
    with clock.stage("selection"), progress(None, "images", "selecting") as bar:
        pixels = gathered(images, parts.select, "select")
        selection = select(
            subject,
            pixels,
            detection,
            scores,
            max_neurons=options.max_neurons,
            batch_size=options.batch_size,
            advance=bar.advance,
        )
        used = {"score": scores.images, "select": len(pixels)}
    with clock.stage("report"), progress(None, "images", "reporting") as bar:
        pixels = gathered(images, parts.report, "report")
        report = make_report(
            subject,
            pixels,
            detection,
            scores,
            selection.neurons,
            seed=options.seed,
            batch_size=options.batch_size,
        )
        bar.advance(len(pixels))
    report.check()
    facts = _facts(subject, detection, scores, selection, report, options)
    facts["images"] = _image_counts(parts, {**used, "report": report.images})
    neurons = Neurons(
        tuple(_rounded_neuron(n) for n in selection.neurons.neurons),
        {**(about or {}), **rounded(facts)},
    )
    return Found(neurons, report, clock.seconds, selection.runs)


def _watched(
    batches: Iterable[Floats], total: int, label: str, progress: StartProgress
) -> Iterator[Floats]:
    with progress(total, "images", label) as bar:
        for pixels in batches:
            yield pixels
            bar.advance(len(pixels))


def _facts(
    subject: Subject,
    detection: Detection,
    scores: Scores,
    selection: Selection,
    report: Report,
    options: FindOptions,
) -> dict[str, Any]:
    return {
        "fingerprints": {str(i): fingerprint(*subject.down(i)) for i in selection.neurons.layers},
        "threshold": detection.threshold,
        "detection_layer": detection.layer,
        "score": options.score,
        "seed": options.seed,
        "scoring": {
            "outlier_tokens": scores.outliers,
            "images_with_outliers": scores.images_with_outliers,
            "layers": len(scores.score),
        },
        "selection": {
            "outlier_tokens_before": selection.before,
            "outlier_tokens_after": selection.outcome.outliers,
            "largest_over_median": selection.outcome.largest / selection.median,
            "limit_over_median": selection.limits.norm / selection.median,
        },
        "report": report.to_json(),
        "versions": dict(subject.versions),
    }


def _image_counts(parts: Parts, used: Mapping[str, int]) -> dict[str, int]:
    given = len(parts.score) + len(parts.select) + len(parts.report)
    return {"given": given, **used, "skipped": given - sum(used.values())}


def rounded(value: Any) -> Any:
    """``value`` with every float in it cut to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return value


def _rounded_neuron(neuron: RegisterNeuron) -> RegisterNeuron:
    value = None if neuron.value is None else rounded(neuron.value)
    return RegisterNeuron(neuron.layer, neuron.index, rounded(neuron.score), neuron.sign, value)
