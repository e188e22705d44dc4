"""Runs shards on the cluster of RAY_ADDRESS and prints what Ray tells of the steps.

python ray_stats.py BUNDLE OUT IMAGE...
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.data import DataContext

from regraft.bulk import on_ray
from regraft.bulk.folder import ShardFolder
from regraft.bulk.on_ray import RayCrew
from regraft.bulk.run import job_of
from regraft.bulk.work import Opening, Task
from regraft.bundle import Bundle

_call = on_ray._Actor.__call__


def _slowly(self: on_ray._Actor, table: Any) -> Any:
    # The small ViT is done with a shard before Ray has the next one decoded, and one actor would do
    # it all.
    time.sleep(1)
    return _call(self, table)


def main() -> None:
    on_ray._Actor.__call__ = _slowly  # type: ignore[method-assign]
    cloudpickle.register_pickle_by_value(on_ray)
    bundle, out, *names = sys.argv[1:]
    # So little work would be done before the second actor has started.
    DataContext.get_current().wait_for_min_actors_s = 120
    with RayCrew.connect(Opening(bundle, "auto", threads=1)) as crew:
        job = job_of(Bundle.open(bundle), crew.opening, names, "float32", 15)
        with ShardFolder.open(out, job, names) as folder:
            tasks = [Task.of(job, Path(folder.place), i, names) for i in range(job.shards)]
            done = crew._dataset(tasks).materialize()
            print("actors", crew.plan.actors)
            print(done.stats())


if __name__ == "__main__":
    main()
