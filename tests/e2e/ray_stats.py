"""Runs shards on the cluster of RAY_ADDRESS and prints what Ray tells of the steps.

python ray_stats.py BUNDLE OUT IMAGE...
"""

from __future__ import annotations

import sys
from pathlib import Path

from ray.data import DataContext

from regraft.bulk.folder import ShardFolder
from regraft.bulk.on_ray import RayCrew
from regraft.bulk.run import job_of
from regraft.bulk.work import Opening, Task
from regraft.bundle import Bundle


def main() -> None:
    bundle, out, *names = sys.argv[1:]
    # So little work would be done before the second actor has started.
    DataContext.get_current().wait_for_min_actors_s = 120
    with RayCrew.connect(Opening(bundle, "auto", threads=1)) as crew:
        job = job_of(Bundle.open(bundle), crew.opening, names, "float32", 2)
        with ShardFolder.open(out, job, names) as folder:
            tasks = [Task.of(job, Path(folder.place), i, names) for i in range(job.shards)]
            done = crew._dataset(tasks).materialize()
            print("actors", crew.actors)
            print(done.stats())


if __name__ == "__main__":
    main()
