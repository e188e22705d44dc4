"""Which node computes what from what, asked often and answered at once."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs


class Reach:
    """For every node the set of nodes before it, as the bits of one number.

    Args:
        nodes: in topological order.
    """

    def __init__(self, nodes: list[gs.Node]) -> None:
        self.nodes = nodes
        self.position = {id(node): i for i, node in enumerate(nodes)}
        self._before: list[int] = []
        for i, node in enumerate(nodes):
            mask = 1 << i
            for value in node.inputs:
                for source in value.inputs:
                    mask |= self._before[self.position[id(source)]]
            self._before.append(mask)

    def behind(self, value: gs.Tensor) -> int:
        """The nodes that compute a tensor, as bits."""
        mask = 0
        for node in value.inputs:
            mask |= self._before[self.position[id(node)]]
        return mask

    def computes(self, value: gs.Tensor, other: gs.Tensor) -> bool:
        """Whether ``other`` is computed from ``value``, which is no constant."""
        if value is other:
            return True
        if isinstance(value, gs.Constant):
            return False
        behind = self.behind(other)
        return any(
            behind >> self.position[id(n)] & 1 for n in value.outputs if id(n) in self.position
        )

    def between(self, start: gs.Tensor, end: gs.Tensor) -> list[gs.Node]:
        """The nodes on a way from ``start`` to ``end``, in topological order."""
        mask = self.behind(end) & ~self.behind(start)
        candidates = [node for i, node in enumerate(self.nodes) if mask >> i & 1]
        reached = {id(start)}
        found = []
        for node in candidates:
            if any(id(t) in reached for t in node.inputs):
                reached.update(id(t) for t in node.outputs)
                found.append(node)
        return found

    def nodes_of(self, mask: int) -> Iterable[gs.Node]:
        """The nodes of a set."""
        return (node for i, node in enumerate(self.nodes) if mask >> i & 1)
