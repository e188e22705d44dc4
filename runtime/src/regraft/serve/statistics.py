"""What a model has done so far, counted as Triton counts it, and written under Triton's names.

All of it happens in the event loop's thread, so that nothing is locked. Durations are nanoseconds
in the statistics and microseconds in the metrics, as there.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from regraft.serve.refusals import Kind

CANCELED = "CANCELED"
REASONS = ("OTHER", "REJECTED", "BACKEND", CANCELED)


@dataclass
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """One more."""
        self.count += 1
        self.ns += ns

    def to_json(self) -> dict[str, int]:
        """As the statistics extension says it."""
        return {"count": self.count, "ns": self.ns}


@dataclass(frozen=True)
class Timing:
    """The stages of one answered request, in nanoseconds.

    Attributes:
        total: from the request's arrival to its encoded answer.
        queue: waiting for the engine.
        compute_input: checking, decoding and preprocessing, and putting the batch together.
        compute_infer: the run of the engine.
        compute_output: encoding the answer.
    """

    total: int
    queue: int
    compute_input: int
    compute_infer: int
    compute_output: int


STAGES = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass
class Statistics:
    """Of one version of one name.

    Attributes:
        inferences: images answered.
        executions: runs of the engine.
        last_ms: when the last request was answered, in milliseconds since 1970.
        success: answered requests.
        fail: refused and failed ones.
        stages: stage -> duration of answered requests.
        batches: size of a run -> stage -> duration.
        failures: reason -> how many.
    """

    inferences: int = 0
    executions: int = 0
    last_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    stages: dict[str, Duration] = field(default_factory=lambda: defaultdict(Duration))
    batches: dict[int, dict[str, Duration]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))

    def answered(self, images: int, timing: Timing, batch: int, first: bool) -> None:
        """Counts an answered request.

        Args:
            images: in the request.
            timing: its stages.
            batch: images in the run that it was part of.
            first: whether the run is to be counted with it.
        """
        self.inferences += images
        self.last_ms = time.time_ns() // 1_000_000
        self.success.add(timing.total)
        for stage in STAGES:
            self.stages[stage].add(getattr(timing, stage))
        if first:
            self.executions += 1
            sizes = self.batches.setdefault(batch, defaultdict(Duration))
            for stage in STAGES[1:]:
                sizes[stage].add(getattr(timing, stage))

    def failed(self, reason: str, ns: int) -> None:
        """Counts a request that was not answered as asked."""
        self.fail.add(ns)
        self.failures[reason] += 1

    def to_json(self, name: str, version: str) -> dict[str, Any]:
        """As the statistics extension says it."""
        stages = {stage: self.stages[stage].to_json() for stage in STAGES}
        none = Duration().to_json()
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.inferences,
            "execution_count": self.executions,
            "inference_stats": {
                "success": self.success.to_json(),
                "fail": self.fail.to_json(),
                **stages,
                "cache_hit": none,
                "cache_miss": none,
            },
            "batch_stats": [
                {"batch_size": size, **{s: stages[s].to_json() for s in STAGES[1:]}}
                for size, stages in sorted(self.batches.items())
            ],
        }


def reason_of(kind: Kind) -> str:
    """The label under which a refusal is counted."""
    return kind.reason


Labelled = tuple[str, str, Statistics, int]  # name, version, statistics, requests in the queue


def prometheus(models: Iterable[Labelled]) -> Iterator[str]:
    """The lines of ``/metrics``."""
    rows = list(models)
    for name, kind, text, value in _FAMILIES:
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} {kind}"
        for model, version, statistics, waiting in rows:
            labels = f'model="{model}",version="{version}"'
            if name == "nv_inference_request_failure":
                for reason in REASONS:
                    count = statistics.failures[reason]
                    yield f'{name}{{model="{model}",reason="{reason}",version="{version}"}} {count}'
            elif name == "nv_inference_pending_request_count":
                yield f"{name}{{{labels}}} {waiting}"
            else:
                yield f"{name}{{{labels}}} {value(statistics)}"


def _us(stage: str) -> Any:
    return lambda s: s.stages[stage].ns // 1000


_FAMILIES: tuple[tuple[str, str, str, Any], ...] = (
    ("nv_inference_request_success", "counter", "Requests answered", lambda s: s.success.count),
    ("nv_inference_request_failure", "counter", "Requests refused or failed", None),
    ("nv_inference_count", "counter", "Images answered", lambda s: s.inferences),
    ("nv_inference_exec_count", "counter", "Runs of the engine", lambda s: s.executions),
    (
        *("nv_inference_request_duration_us", "counter"),
        *("Time of answered requests, in microseconds", lambda s: s.success.ns // 1000),
    ),
    (
        *("nv_inference_queue_duration_us", "counter"),
        *("Time waiting for the engine, in microseconds", _us("queue")),
    ),
    (
        *("nv_inference_compute_input_duration_us", "counter"),
        *("Time decoding and preparing, in microseconds", _us("compute_input")),
    ),
    (
        *("nv_inference_compute_infer_duration_us", "counter"),
        *("Time in the engine, in microseconds", _us("compute_infer")),
    ),
    (
        *("nv_inference_compute_output_duration_us", "counter"),
        *("Time encoding answers, in microseconds", _us("compute_output")),
    ),
    ("nv_inference_pending_request_count", "gauge", "Requests waiting for the engine", None),
)
