"""Who computes the shards: this process, several of this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from regraft.bulk.on_ray import RayCrew
from regraft.bulk.processes import ProcessCrew
from regraft.bulk.run import Crew
from regraft.bulk.work import Opening, Task, Watcher, compute
from regraft.engines.cores import usable_cores
from regraft.extractor import Extractor
from regraft.pipeline import default_workers


@dataclass(frozen=True)
class LoneCrew:
    """Computes shards in this process.

    Attributes:
        extractor: opened.
    """

    extractor: Extractor

    def __call__(self, tasks: Sequence[Task], watcher: Watcher) -> None:
        """Returns once all shards are written.

        Raises:
            RegraftError: as :func:`regraft.bulk.work.compute`.
        """
        for task in tasks:
            compute(self.extractor, task, watcher)


@contextmanager
def gathered(
    opening: Opening, processes: int | None = None, *, ray: bool = False
) -> Iterator[tuple[Opening, int, Crew]]:
    """Yields how the bundle is opened (by which engine, named), how many share the work, and who.

    Args:
        opening: how each of them is to open the bundle; ``auto`` is tried here.
        processes: worker processes, None for this one alone; with ``ray``, actors, None for as
            many as fit.
        ray: whether a Ray cluster computes.

    Raises:
        BundleError, EngineError, InputError: as :meth:`regraft.Extractor.open`.
        InputError: Ray is not installed, or the cluster cannot run that.
    """
    if ray:
        with RayCrew.connect(opening, processes) as cluster:
            yield cluster.opening, cluster.plan.slots, cluster
        return
    with opening.open() as extractor:
        opening = replace(opening, engine=extractor.engine)
        if processes is None or processes == 1:
            yield opening, 1, LoneCrew(extractor)
            return
    share = replace(
        opening,
        threads=opening.threads or max(1, usable_cores() // processes),
        workers=opening.workers or max(1, default_workers() // processes),
    )
    yield opening, processes, ProcessCrew(share, processes)
