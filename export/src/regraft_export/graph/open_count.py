"""Numbers per token where T is open until run time; built once for the graph."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft_export.graph.document import Editor


def along(numbers: NDArray[np.generic], axis: int) -> NDArray[np.generic]:
    """One number per token, laid along the tokens: (1, T, 1), or (T, 1, 1) for axis 0."""
    return numbers[None, :, None] if axis == 1 else numbers[:, None, None]


class OpenCount:
    """What depends on T, computed from the tokens themselves.

    Args:
        tokens: (B, T + R, D) or (T + R, B, D), with the registers.
        axis: along which they lie there.
    """

    def __init__(self, tokens: gs.Variable, axis: int) -> None:
        self.tokens, self.axis = tokens, axis
        self._columns: dict[tuple[object, ...], gs.Variable] = {}
        self._counts: gs.Variable | None = None

    def count(self, editor: Editor) -> gs.Variable:
        """(1,) int64: T + R."""
        if self._counts is None:
            shape = editor.node("Shape", "regraft.tokens.shape", [self.tokens], dtype=np.int64)
            where = editor.constant("regraft.tokens.axis", np.array([self.axis], dtype=np.int64))
            self._counts = editor.node("Gather", "regraft.tokens.count", [shape, where])
        return self._counts

    def shape(self, editor: Editor, stem: str, last: int) -> gs.Variable:
        """(3,) int64: (-1, T + R, last)."""
        ends = [
            editor.constant(f"{stem}.{what}", np.array([n], dtype=np.int64))
            for what, n in (("images", -1), ("last", last))
        ]
        parts = [ends[0], self.count(editor), ends[1]]
        return editor.node("Concat", f"{stem}.shape", parts, {"axis": 0})

    def column(
        self,
        editor: Editor,
        axis: int,
        prefix: NDArray[np.generic],
        patches: float,
        registers: NDArray[np.generic],
    ) -> gs.Variable:
        """One number per token, laid along them.

        Args:
            editor: adds to the graph.
            axis: along which tokens lie where the column is used.
            prefix: (P,), by prefix token.
            patches: for every patch.
            registers: (R,), by register.
        """
        key = (axis, registers.dtype, prefix.tobytes(), patches, registers.tobytes())
        if key not in self._columns:
            stem = "regraft.per_token"
            rest = np.array([len(prefix) + len(registers)], dtype=np.int64)
            others = editor.constant(f"{stem}.rest", rest)
            inner = editor.node("Sub", f"{stem}.patches", [self.count(editor), others])
            one = editor.constant(f"{stem}.one", np.array([1], dtype=np.int64))
            order = [one, inner, one] if axis == 1 else [inner, one, one]
            target = editor.node("Concat", f"{stem}.shape", order, {"axis": 0})
            number = np.full((1, 1, 1), patches, dtype=registers.dtype)
            same = editor.constant(f"{stem}.number", number)
            parts: list[gs.Tensor] = [editor.node("Expand", f"{stem}.inner", [same, target])]
            if len(prefix):
                parts.insert(0, editor.constant(f"{stem}.prefix", along(prefix, axis)))
            parts.append(editor.constant(f"{stem}.registers", along(registers, axis)))
            self._columns[key] = editor.node("Concat", stem, parts, {"axis": axis})
        return self._columns[key]
