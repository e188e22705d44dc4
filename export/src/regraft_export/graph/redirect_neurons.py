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
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.errors import InputError, NeuronsError
from regraft.neurons import RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft.tokens import TokenLayout
from regraft_export.graph.anchors import DownProjection
from regraft_export.graph.document import Editor
from regraft_export.graph.open_count import OpenCount, along


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
    site = _Site(Editor(graph), down, list(neurons), options, layout, open_count)
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


@dataclass(frozen=True)
class _Site:
    editor: Editor
    down: DownProjection
    neurons: list[RegisterNeuron]
    options: RedirectOptions
    layout: TokenLayout
    open_count: OpenCount | None

    @property
    def indices(self) -> list[int]:
        return [n.index for n in self.neurons]

    @property
    def dtype(self) -> np.dtype[np.generic]:
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


def _constant_values(site: _Site) -> NDArray[np.generic]:
    """The recorded values, (k,)."""
    for n in site.neurons:
        if n.value is None:
            raise NeuronsError(
                f"value = constant needs the `value` of every neuron; (layer {n.layer}, index "
                f"{n.index}) has none (written by hand?): run `regraft find`, or use "
                "value = per-neuron"
            )
    return _narrowed(site, np.array([n.value for n in site.neurons], dtype=np.float64))


def _narrowed(site: _Site, values: NDArray[np.float64]) -> NDArray[np.generic]:
    """Constants in the graph's precision, none of which becomes infinite."""
    with np.errstate(over="ignore"):  # said below
        narrow = values.astype(site.dtype)
    if not np.isfinite(narrow.astype(np.float64)).all():
        raise InputError(
            f"layer {site.neurons[0].layer}: value = constant writes numbers up to "
            f"{np.abs(values).max():.3g}, which {site.dtype} cannot hold; give a smaller --scale, "
            "or a wider precision"
        )
    return narrow


def _written(site: _Site) -> NDArray[np.float64]:
    """What recorded values write: value @ W[N], (D,); times no scale more than can be held."""
    written: NDArray[np.float64] = _constant_values(site).astype(np.float64) @ site.rows.astype(
        np.float64
    )
    _narrowed(site, np.outer(site.options.scale, written))
    return written


def _fold_into_bias(site: _Site, stem: str) -> None:
    """b (D,) becomes (T + R, D): the register's row carries value @ W[N]."""
    down, layout = site.down, site.layout
    written = _written(site)
    width = down.weight.shape[1]
    bias = np.zeros((layout.count + site.options.registers, width), dtype=np.float64)
    bias[layout.count :] = np.outer(site.options.scale, written)
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


def _add(site: _Site, stem: str, delta: gs.Tensor) -> None:
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


def _delta(site: _Site, stem: str) -> gs.Variable:
    """h'_N @ W[N], (B, T + R, D) or broadcastable to it."""
    ed, options = site.editor, site.options
    if options.value == "constant" and site.only_registers:
        row = ed.constant(f"{stem}.row", _written(site).astype(site.dtype)[None, None, :])
        return ed.node("Mul", f"{stem}.place", [row, site.on_registers()])
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
        written = ed.node(op, f"{stem}.write", [value, factor])
        return ed.node("Mul", f"{stem}.place", [written, site.on_registers()])
    kept = _kept(site, stem, columns)
    placed = ed.node("Mul", f"{stem}.place", [_signed(site, stem, value), site.on_registers()])
    new = ed.node("Add", f"{stem}.new", [kept, placed])
    return ed.node("MatMul", f"{stem}.write", [new, ed.constant(f"{stem}.rows", site.rows)])


def _value(site: _Site, stem: str, columns: gs.Variable) -> tuple[gs.Tensor, NDArray[np.generic]]:
    """What a register receives, (B, 1, k) or (B, 1, 1), and the rows of W that go with it.

    A negative sign turns the maximum into a minimum: columns and rows are multiplied by the sign.
    """
    ed = site.editor
    if site.options.value == "constant":
        return ed.constant(f"{stem}.value", _constant_values(site)[None, None, :]), site.rows
    if site.options.value == "per-layer":
        return _strongest(site, stem, columns), site.rows
    rows = site.rows
    if site.mixed:
        columns = ed.node(
            "Mul", f"{stem}.sign", [columns, ed.constant(f"{stem}.signs", site.signs)]
        )
        rows = np.multiply(rows, site.signs[:, None])
    return ed.reduce("ReduceMax", f"{stem}.max", columns, [site.axis]), rows


def _signed(site: _Site, stem: str, value: gs.Tensor) -> gs.Tensor:
    """The value with its own sign again, for rows of W that are not flipped."""
    if site.options.value != "per-neuron" or not site.mixed:
        return value
    return site.editor.node(
        "Mul", f"{stem}.unsign", [value, site.editor.constant(f"{stem}.signs", site.signs)]
    )


def _strongest(site: _Site, stem: str, columns: gs.Variable) -> gs.Variable:
    """The element of largest magnitude over neurons and tokens, with its sign: (B, 1, 1)."""
    ed = site.editor
    high = ed.reduce("ReduceMax", f"{stem}.max", columns, [site.axis, 2])
    low = ed.reduce("ReduceMin", f"{stem}.min", columns, [site.axis, 2])
    flipped = ed.node("Neg", f"{stem}.flip", [low])
    above = ed.node("GreaterOrEqual", f"{stem}.above", [high, flipped], dtype=np.bool_)
    return ed.node("Where", f"{stem}.strongest", [above, high, low], dtype=site.dtype)


def _kept(site: _Site, stem: str, columns: gs.Variable) -> gs.Variable:
    """What CLS and the patches keep of the neurons, zero elsewhere: (B, T + R, k)."""
    ed, options, layout = site.editor, site.options, site.layout
    registers = [0.0] * options.registers
    cls = 1.0 if options.cls == "keep" else 0.0
    patches = 1.0 if options.patches == "keep" else 0.0
    mask = site.per_token(cls, patches, registers)
    kept = ed.node("Mul", f"{stem}.kept", [columns, mask])
    if options.patches in ("zero", "keep"):
        return kept
    last = layout.count if site.open_count is None else -options.registers
    bounds = [np.array([n], dtype=np.int64) for n in (layout.prefix, last, site.axis)]
    start, end, axis = (ed.constant(f"{stem}.bound", b) for b in bounds)
    inner = ed.node("Slice", f"{stem}.patches", [columns, start, end, axis])
    mean = ed.reduce("ReduceMean", f"{stem}.mean", inner, [site.axis])
    if options.patches == "mean":
        spread = ed.node("Mul", f"{stem}.spread", [mean, site.per_token(0, 1, registers)])
    else:
        spread = _outliers_replaced(site, stem, inner, mean)
    return ed.node("Add", f"{stem}.keep", [kept, spread])


def _outliers_replaced(
    site: _Site, stem: str, inner: gs.Variable, mean: gs.Variable
) -> gs.Variable:
    """Patches above mean + 1 standard deviation become the mean; back at their places."""
    ed, layout = site.editor, site.layout
    off = ed.node("Sub", f"{stem}.off", [inner, mean])
    # Squares are taken in float32: in fp16 a deviation of 256 would overflow.
    wide = ed.node("Cast", f"{stem}.wide", [off], {"to": 1}, dtype=np.float32)
    square = ed.node("Mul", f"{stem}.square", [wide, wide])
    variance = ed.reduce("ReduceMean", f"{stem}.variance", square, [site.axis])
    root = ed.node("Sqrt", f"{stem}.root", [variance])
    kind = onnx.helper.np_dtype_to_tensor_dtype(site.dtype)
    deviation = ed.node("Cast", f"{stem}.deviation", [root], {"to": kind}, dtype=site.dtype)
    signs = ed.constant(f"{stem}.signs", site.signs)
    signed = ed.node("Mul", f"{stem}.signed_off", [off, signs])
    above = ed.node("Greater", f"{stem}.above_mean", [signed, deviation], dtype=np.bool_)
    replaced = ed.node("Where", f"{stem}.replaced", [above, mean, inner], dtype=site.dtype)
    pads = np.zeros((2, 3), dtype=np.int64)  # in front and behind, by axis
    pads[:, site.axis] = layout.prefix, site.options.registers
    return ed.node("Pad", f"{stem}.back", [replaced, ed.constant(f"{stem}.pads", pads.ravel())])
