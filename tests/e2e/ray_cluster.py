"""Two nodes of a Ray cluster on this machine; says their address, runs until stdin ends."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

CPUS = 1


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS})
    cluster.add_node(num_cpus=CPUS)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
