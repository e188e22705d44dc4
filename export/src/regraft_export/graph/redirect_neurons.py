"""Rewrite: one down-projection's register neurons are redirected to the test-time registers.

With h (B, T + R, hidden) the activation, W the weight, b the bias and N the register neurons,
Algorithm 2 of arXiv 2506.08010 changes h in the columns N alone. So with h' the new columns,

    y' = h @ (W, rows N zeroed) + b + h'_N @ W[N]

and h itself is never rewritten. In the default form h'_N is zero but on the registers, which gives
five nodes::

    h -> Gather -> ReduceMax -> MatMul W[N] -> Mul onehot -> Add -> y'

With ``value = constant`` the sum of b and the register's row is a constant: no node at all.

Foreign files differ in two ways. A Gemm has its tokens in rows: what is gathered is given its token
axis, and y is, for the addition. And where the image size is open, so is T: then the one-hot is
built at run time, once for the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.neurons import RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft.tokens import TokenLayout
from regraft_export.graph.anchors import DownProjection
from regraft_export.graph.document import Editor
from regraft_export.graph.open_count import OpenCount
from regraft_export.graph.redirect_kept import kept_values
from regraft_export.graph.redirect_site import Site, constant_values, written


def redirect_neurons(
    graph: gs.Graph,
    down: DownProjection,
    neurons: Sequence[RegisterNeuron],
    options: RedirectOptions,
    layout: TokenLayout,
    open_count: OpenCount | None = None,
) -> int:
    """Redirects the neurons of one layer.

    Args:
        graph: the graph, with the registers already appended; changed in place.
        down: the layer's down-projection.
        neurons: of this layer, at least one.
        options: of the redirect.
        layout: token counts, with ``test_time_registers`` as appended.
        open_count: where T is open until run time; the same for all layers.

    Returns:
        How many nodes were added.

    Raises:
        NeuronsError: ``value = constant``, and a neuron has no value.
        InputError: ``value = constant``, and what it writes overflows the graph's precision.
    """
    site = Site(Editor(graph), down, list(neurons), options, layout, open_count)
    stem = f"regraft.redirect.{neurons[0].layer}"
    weight = down.weight.values.copy()
    weight[site.indices] = 0
    weight = weight.T if down.transposed else weight
    down.matmul.inputs[1] = site.editor.constant(f"{stem}.weight", weight)
    foldable = open_count is None and not down.flat
    if options.value == "constant" and site.only_registers and foldable:
        _fold_into_bias(site, stem)
    else:
        _add(site, stem, _delta(site, stem))
    return len(site.editor.added)


def _fold_into_bias(site: Site, stem: str) -> None:
    """b (D,) becomes (T + R, D): the register's row carries value @ W[N]."""
    down, layout = site.down, site.layout
    row = written(site)
    width = down.weight.shape[1]
    bias = np.zeros((layout.count + site.options.registers, width), dtype=np.float64)
    bias[layout.count :] = np.outer(site.options.scale, row)
    if down.bias is not None:
        bias += down.bias.values.astype(np.float64)
    values = bias.astype(site.dtype)
    values = values if down.axis == 1 else values[:, None]
    constant = site.editor.constant(f"{stem}.bias", values)
    if down.bias_add is not None:
        inputs = down.bias_add.inputs
        down.bias_add.inputs = [constant if t is down.bias else t for t in inputs]
    else:
        _add(site, stem, constant)


def _add(site: Site, stem: str, delta: gs.Tensor) -> None:
    # The sum takes the place of y, also where y leaves the block or the graph.
    y = site.down.output
    alone = gs.Variable(site.editor.names.new(f"{stem}.alone"), dtype=y.dtype)
    y.inputs[0].outputs = [alone]
    if site.down.flat:
        whole = site.with_token_axis(f"{stem}.whole", alone, site.down.weight.shape[1])
        total = site.editor.node("Add", f"{stem}.add", [whole, delta])
        rows = np.array([-1, site.down.weight.shape[1]], dtype=np.int64)
        site.editor.node("Reshape", f"{stem}.rows", [total, site.editor.constant(stem, rows)])
    else:
        site.editor.node("Add", f"{stem}.add", [alone, delta])
    site.editor.added[-1].outputs = [y]


def _delta(site: Site, stem: str) -> gs.Variable:
    """h'_N @ W[N], (B, T + R, D) or broadcastable to it."""
    ed, options = site.editor, site.options
    if options.value == "constant" and site.only_registers:
        constant = ed.constant(f"{stem}.row", written(site).astype(site.dtype)[None, None, :])
        return ed.node("Mul", f"{stem}.place", [constant, site.on_registers()])
    indices = np.array(site.indices, dtype=np.int64)
    columns = ed.node(
        "Gather",
        f"{stem}.columns",
        [site.down.activation, ed.constant(f"{stem}.indices", indices)],
        {"axis": 1 if site.down.flat else 2},
        dtype=site.dtype,
    )
    columns = site.with_token_axis(f"{stem}.columns", columns, len(indices))
    value, rows = _value(site, stem, columns)
    if site.only_registers:
        op = "MatMul" if options.value != "per-layer" else "Mul"
        weight = rows if options.value != "per-layer" else rows.sum(axis=0, dtype=np.float64)
        factor = ed.constant(f"{stem}.rows", weight.astype(site.dtype))
        row = ed.node(op, f"{stem}.write", [value, factor])
        return ed.node("Mul", f"{stem}.place", [row, site.on_registers()])
    kept = kept_values(site, stem, columns)
    placed = ed.node("Mul", f"{stem}.place", [_signed(site, stem, value), site.on_registers()])
    new = ed.node("Add", f"{stem}.new", [kept, placed])
    return ed.node("MatMul", f"{stem}.write", [new, ed.constant(f"{stem}.rows", site.rows)])


def _value(site: Site, stem: str, columns: gs.Variable) -> tuple[gs.Tensor, NDArray[np.generic]]:
    """What a register receives, (B, 1, k) or (B, 1, 1), and the rows of W that go with it.

    A negative sign turns the maximum into a minimum: columns and rows are multiplied by the sign.
    """
    ed = site.editor
    if site.options.value == "constant":
        return ed.constant(f"{stem}.value", constant_values(site)[None, None, :]), site.rows
    if site.options.value == "per-layer":
        return _strongest(site, stem, columns), site.rows
    rows = site.rows
    if site.mixed:
        columns = ed.node(
            "Mul", f"{stem}.sign", [columns, ed.constant(f"{stem}.signs", site.signs)]
        )
        rows = np.multiply(rows, site.signs[:, None])
    return ed.reduce("ReduceMax", f"{stem}.max", columns, [site.axis]), rows


def _signed(site: Site, stem: str, value: gs.Tensor) -> gs.Tensor:
    """The value with its own sign again, for rows of W that are not flipped."""
    if site.options.value != "per-neuron" or not site.mixed:
        return value
    return site.editor.node(
        "Mul", f"{stem}.unsign", [value, site.editor.constant(f"{stem}.signs", site.signs)]
    )


def _strongest(site: Site, stem: str, columns: gs.Variable) -> gs.Variable:
    """The element of largest magnitude over neurons and tokens, with its sign: (B, 1, 1)."""
    ed = site.editor
    high = ed.reduce("ReduceMax", f"{stem}.max", columns, [site.axis, 2])
    low = ed.reduce("ReduceMin", f"{stem}.min", columns, [site.axis, 2])
    flipped = ed.node("Neg", f"{stem}.flip", [low])
    above = ed.node("GreaterOrEqual", f"{stem}.above", [high, flipped], dtype=np.bool_)
    return ed.node("Where", f"{stem}.strongest", [above, high, low], dtype=site.dtype)
