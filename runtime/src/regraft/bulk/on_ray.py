"""Shards spread over a Ray cluster, where one machine is not enough.

Ray Data runs two steps that it keeps apart because they book different resources: tasks on any core
of the cluster decode the images of a shard, and actors, one per GPU (per node without GPUs), open
the bundle once each, run the engine and write the shard where the command itself would. So folder,
schema and resuming are those of one machine, and Ray adds placement, back-pressure and the
retrying of what a lost node had in work.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from regraft.bulk.ray_plan import DECODING_CPUS, Plan, planned
from regraft.bulk.work import Opening, Task, Watcher, write
from regraft.bundle import Bundle, record
from regraft.errors import (
    BundleError,
    ImageError,
    InputError,
    RegraftError,
    how_to_install,
)
from regraft.features import Features
from regraft.images import decode
from regraft.manifest import NAME
from regraft.pipeline import Batch, Failure
from regraft.preprocessing import Preprocessing
from regraft.rows import in_order


@dataclass(frozen=True)
class RayCrew:
    """Computes shards in a cluster.

    Attributes:
        opening: how actors open their extractor, by an engine's name.
        plan: how many there are, and what they book.
    """

    opening: Opening
    plan: Plan

    @classmethod
    @contextmanager
    def connect(cls, opening: Opening, actors: int | None = None) -> Iterator[RayCrew]:
        """Connects to a cluster; leaves it at the end.

        Args:
            opening: how actors are to open their extractor.
            actors: how many; None for one per GPU, or one per node where the engine needs none.

        Raises:
            InputError: Ray is not installed, or the cluster cannot run that.
        """
        ray = _ray()
        opening = replace(opening, bundle=str(Path(opening.bundle).absolute()))
        own = not ray.is_initialized()
        try:
            if own:
                ray.init(log_to_driver=False, logging_level="error")
            plan = planned(ray.nodes(), opening.engine, actors)
            yield cls(replace(opening, engine=plan.engine), plan)
        finally:
            if own:
                ray.shutdown()

    def __call__(self, tasks: Sequence[Task], watcher: Watcher) -> None:
        """Returns once all shards are written.

        Raises:
            RegraftError: an actor's, as it was.
        """
        for told in self._dataset(tasks).iter_rows():
            if told["error"]:
                raise pickle.loads(told["error"])
            for name, message in pickle.loads(told["failed"]):
                watcher.failed(name, message)
            watcher.advance(told["images"])

    def _dataset(self, tasks: Sequence[Task]) -> Any:
        """One row, and one block, per shard; lazily, its iterator does the work."""
        import pyarrow as pa
        from ray.data import ActorPoolStrategy, DataContext, from_arrow

        context = DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        cpus, gpus = self.plan.booked
        manifest = record(Path(self.opening.bundle) / NAME).sha256
        source = from_arrow([pa.table({"task": [pickle.dumps(task)]}) for task in tasks])
        decoded = source.map_batches(
            _decode,
            fn_args=(self.opening,),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=DECODING_CPUS,
        )
        return decoded.map_batches(
            _Actor,
            fn_constructor_args=(self.opening, manifest),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=self.plan.actors),
            num_cpus=cpus,
            num_gpus=gpus,
        )


def _decode(table: Any, opening: Opening) -> Any:
    """Adds to a shard its pictures, uint8 as the model sees them before normalisation."""
    import pyarrow as pa

    task: Task = pickle.loads(table["task"][0].as_py())
    preprocessing = Bundle.open(opening.bundle, verify_hashes=False).manifest.preprocessing
    draft = preprocessing if opening.draft else None
    views, failures = [], []
    for index, path in enumerate(task.images):
        try:
            views.append(np.asarray(preprocessing.view(decode(path, draft_for=draft))).tobytes())
        except ImageError as error:
            failures.append(Failure(index, str(path), str(error)))
    pixels = pa.array([b"".join(views)], pa.large_binary())
    return pa.table({"task": table["task"], "pixels": pixels, "failures": [pickle.dumps(failures)]})


class _Actor:
    """Runs the engine on a shard's pictures and writes the shard."""

    def __init__(self, opening: Opening, manifest_sha256: str) -> None:
        self._opening, self._manifest = opening, manifest_sha256
        self._extractor: Any = None

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        told = _Told()
        error = b""
        try:
            self._compute(table, told)
        except RegraftError as reason:
            # Handed over rather than raised: Ray would wrap it, and repeat it where it restarts.
            error = pickle.dumps(reason)
        row = {"images": told.images, "failed": pickle.dumps(told.failures), "error": error}
        return pa.Table.from_pylist([row])

    def _compute(self, table: Any, told: _Told) -> None:
        if self._extractor is None:
            self._extractor = self._open()
        task: Task = pickle.loads(table["task"][0].as_py())
        preprocessing = self._extractor.bundle.manifest.preprocessing
        pixels = np.frombuffer(table["pixels"][0].as_buffer(), np.uint8)
        pixels = pixels.reshape(-1, *preprocessing.image_size, 3)
        failures = pickle.loads(table["failures"][0].as_py())

        def stream(on_error: Any) -> Iterator[Features]:
            for failure in failures:
                on_error(failure)
            bad = {failure.index for failure in failures}
            indices = [i for i in range(len(task.names)) if i not in bad]
            names = dict(enumerate(task.names))
            batches = _batches(pixels, indices, preprocessing, self._extractor.batch_size)
            features: Iterator[Features] = self._extractor.stream_batches(
                batches, names, ahead=True
            )
            return features

        write(self._extractor, task, in_order(stream, task.names), told)

    def _open(self) -> Any:
        path = Path(self._opening.bundle)
        if record(path / NAME).sha256 != self._manifest:
            raise BundleError(
                f"{path}: is another bundle on this node of the cluster than where `regraft "
                "extract` was started; copy it again"
            )
        return self._opening.open()


class _Told:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.images = 0
        self.failures: list[tuple[str, str]] = []

    def advance(self, images: int) -> None:
        self.images += images

    def failed(self, path: str, message: str) -> None:
        self.failures.append((path, message))


def _batches(
    pixels: Any, indices: Sequence[int], preprocessing: Preprocessing, batch_size: int
) -> Generator[Batch, None, None]:
    """Normalises uint8 (G, H, W, 3) batch by batch."""
    for start in range(0, len(pixels), batch_size):
        some = pixels[start : start + batch_size]
        batch = np.stack([preprocessing.normalise(view) for view in some])
        yield Batch(batch, tuple(indices[start : start + len(some)]))


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(
            f"--ray needs Ray, which is not installed ({error}); "
            f"here and on every node {how_to_install('regraft-runtime', 'ray')}"
        ) from None
    return ray
