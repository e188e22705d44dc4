"""One down-projection whose register neurons are redirected, and what is constant about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.errors import InputError, NeuronsError
from regraft.neurons import RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft.tokens import TokenLayout
from regraft_export.graph.anchors import DownProjection
from regraft_export.graph.document import Editor
from regraft_export.graph.open_count import OpenCount, along


@dataclass(frozen=True)
class Site:
    """What the rewrite of one layer knows, and the columns of numbers it needs.

    Attributes:
        editor: of the graph.
        down: the layer's down-projection.
        neurons: of this layer, at least one.
        options: of the redirect.
        layout: token counts, with ``test_time_registers`` as appended.
        open_count: where T is open until run time.
    """

    editor: Editor
    down: DownProjection
    neurons: list[RegisterNeuron]
    options: RedirectOptions
    layout: TokenLayout
    open_count: OpenCount | None

    @property
    def indices(self) -> list[int]:
        """Of the neurons among the hidden units."""
        return [n.index for n in self.neurons]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the down-projection's weight: the graph's precision."""
        dtype: np.dtype[np.generic] = np.dtype(self.down.weight.dtype)
        return dtype

    @property
    def only_registers(self) -> bool:
        """Whether the neurons are zero on every token but the registers."""
        cls_kept = self.options.cls == "keep" and self.layout.class_token
        return not cls_kept and self.options.patches == "zero"

    @property
    def rows(self) -> NDArray[np.generic]:
        """W[N], (k, D)."""
        return np.asarray(self.down.weight.values[self.indices])

    @property
    def signs(self) -> NDArray[np.generic]:
        """1 or -1 of each neuron, (k,)."""
        return np.array([n.sign for n in self.neurons], dtype=self.dtype)

    @property
    def mixed(self) -> bool:
        """Whether a neuron acts through negative values."""
        return any(n.sign < 0 for n in self.neurons)

    @property
    def axis(self) -> int:
        """Along which the tokens lie, once rows have a token axis again."""
        return 1 if self.down.flat else self.down.axis

    def per_token(self, cls: float, patches: float, registers: Sequence[float]) -> gs.Tensor:
        """A column (1, T + R, 1) with one number per kind of token."""
        prefix = np.zeros(self.layout.prefix, dtype=self.dtype)
        if self.layout.class_token:
            prefix[0] = cls
        behind = np.array(registers, dtype=self.dtype)
        if self.open_count is not None:
            return self.open_count.column(self.editor, self.axis, prefix, patches, behind)
        inner = np.full(self.layout.patches, patches, dtype=self.dtype)
        return self.editor.constant(
            "regraft.per_token", self.column(np.concatenate([prefix, inner, behind]))
        )

    def column(self, numbers: NDArray[np.generic]) -> NDArray[np.generic]:
        """One number per token, laid along the tokens: (1, T, 1), or (T, 1, 1)."""
        return along(numbers, self.axis)

    def on_registers(self) -> gs.Tensor:
        """The scales in the registers' places, and zero elsewhere."""
        return self.per_token(0, 0, self.options.scale)

    def with_token_axis(self, stem: str, rows: gs.Variable, last: int) -> gs.Variable:
        """(B, T + R, last) of (B * (T + R), last); what has a token axis stays as it is."""
        if not self.down.flat:
            return rows
        if self.open_count is not None:
            target = self.open_count.shape(self.editor, stem, last)
        else:
            numbers = [-1, self.layout.count + self.options.registers, last]
            target = self.editor.constant(f"{stem}.shape", np.array(numbers, dtype=np.int64))
        return self.editor.node("Reshape", f"{stem}.tokens", [rows, target])


def constant_values(site: Site) -> NDArray[np.generic]:
    """The recorded values, (k,).

    Raises:
        NeuronsError: a neuron has none.
        InputError: one overflows the graph's precision.
    """
    for n in site.neurons:
        if n.value is None:
            raise NeuronsError(
                f"value = constant needs the `value` of every neuron; (layer {n.layer}, index "
                f"{n.index}) has none (written by hand?): run `regraft find`, or use "
                "value = per-neuron"
            )
    values = np.array([n.value for n in site.neurons], dtype=np.float64)
    return _narrowed(site, values, "recorded values are", "give a wider precision")


def written(site: Site) -> NDArray[np.float64]:
    """What recorded values write: value @ W[N], (D,); times no scale more than can be held.

    Raises:
        NeuronsError: a neuron has no value.
        InputError: what it writes overflows the graph's precision.
    """
    row: NDArray[np.float64] = constant_values(site).astype(np.float64) @ site.rows.astype(
        np.float64
    )
    numbers = np.outer(site.options.scale, row)
    _narrowed(site, numbers, "they write", "give a smaller --scale, or a wider precision")
    return row


def _narrowed(site: Site, values: NDArray[np.float64], what: str, mend: str) -> NDArray[np.generic]:
    """Constants in the graph's precision, none of which becomes infinite."""
    with np.errstate(over="ignore"):  # said below
        narrow = values.astype(site.dtype)
    if not np.isfinite(narrow.astype(np.float64)).all():
        raise InputError(
            f"layer {site.neurons[0].layer}, value = constant: {what} numbers up to "
            f"{np.abs(values).max():.3g}, which {site.dtype} cannot hold; {mend}"
        )
    return narrow
