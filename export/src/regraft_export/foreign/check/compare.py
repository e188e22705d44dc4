"""The patched file held to the method, output by output and token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from regraft.errors import ModelError, RewriteError
from regraft.neurons import Neurons
from regraft.parity import LIMITS, Meter
from regraft.redirect import RedirectOptions
from regraft_export.foreign.check.blocks import token_form
from regraft_export.foreign.check.checked import Checked
from regraft_export.foreign.check.pieces import Cutter
from regraft_export.foreign.check.statement import Stated, state
from regraft_export.foreign.survey import Survey
from regraft_export.onnx_file.read import OnnxFile

_BATCH = 2  # two images show whether each is treated by itself
_TWIN = "patched, as float32"


def check(
    found: Survey,
    patched: OnnxFile,
    neurons: Neurons,
    options: RedirectOptions,
    pixels: NDArray[np.float32],
    on_block: Callable[[], None] = lambda: None,
) -> Checked:
    """Compares a patched file with the method on images.

    Args:
        found: a survey of the unpatched file, not used up.
        patched: the patched file.
        neurons: what was redirected.
        options: of the redirect.
        pixels: (N, 3, H, W), of the survey's image size, N at least 1.
        on_block: called after each block, for a progress bar.

    Raises:
        RewriteError: the check does not understand a node; the message names it.
        EngineError: ONNX Runtime is missing, or cannot run a part.
        ModelError: no output of the file is computed from images alone.
    """
    widen = found.precision in ("fp16", "bf16")
    cutter = Cutter(found.file, widen=widen)
    outputs, left_out = _outputs(found, cutter)
    size = found.image.shape[0] or min(_BATCH, len(pixels))
    batches = _batches(pixels, size)
    kind = _input_type(found)
    exact = [b.astype(kind).astype(np.float32 if widen else kind) for b in batches]
    stated = state(found, cutter, neurons, options, exact, outputs, on_block)
    meters = _Meters(found, neurons, options.registers, len(pixels), size)
    taps = _taps(found, neurons, cutter.outputs)
    meters.compare("unpatched", _run(found.file, widen, found, exact, outputs, taps), stated)
    graph = _TWIN if widen else "patched"
    meters.compare(graph, _run(patched, widen, found, exact, outputs, taps), stated)
    if found.precision == "fp16":
        narrow = [b.astype(kind) for b in batches]
        meters.compare("patched", _run(patched, False, found, narrow, outputs, taps), stated)
    return meters.result(found, left_out)


def _outputs(found: Survey, cutter: Cutter) -> tuple[list[str], dict[str, list[str]]]:
    """The outputs that images alone decide, and the others with what they read."""
    reads = {name: cutter.span([name]).inputs for name in cutter.outputs}
    left_out = {n: sorted(r - {found.image.name}) for n, r in reads.items()}
    left_out = {n: more for n, more in left_out.items() if more}
    outputs = [n for n, r in reads.items() if found.image.name in r and n not in left_out]
    if not outputs:
        listed = ", ".join(f"{n} reads {', '.join(r)}" for n, r in left_out.items())
        raise ModelError(
            f"{found.file.path}: no output can be checked, because none is computed from images "
            f"alone ({listed})"
        )
    return outputs, left_out


def _batches(pixels: NDArray[np.float32], size: int) -> list[NDArray[np.float32]]:
    """Batches of one size; the last is filled up with the first images."""
    places = np.resize(np.arange(len(pixels)), -(-len(pixels) // size) * size)
    return [pixels[places[i : i + size]] for i in range(0, len(places), size)]


def _input_type(found: Survey) -> np.dtype[Any]:
    name = found.image.name
    value = next(i for i in found.file.skeleton.graph.input if i.name == name)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
    if dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise ModelError(
            f"{found.file.path}: its input {name!r} is {dtype}, so it prepares pictures in a way "
            "of its own; --check feeds normalised floating-point pixels"
        )
    return dtype


def _taps(found: Survey, neurons: Neurons, outputs: Collection[str]) -> dict[int, str]:
    """{touched layer: the tensor of its output}, but for those that are outputs of the file."""
    names = {layer: found.stack.mlps[layer].out.name for layer in neurons.layers}
    return {layer: name for layer, name in names.items() if name not in outputs}


def _run(
    file: OnnxFile,
    widen: bool,
    found: Survey,
    batches: Sequence[NDArray[Any]],
    outputs: Sequence[str],
    taps: dict[int, str],
) -> list[Stated]:
    """What a file gives, whole."""
    cutter = Cutter(file, widen=widen)
    lost = [n for n in (*outputs, *taps.values()) if n not in cutter.maker]
    if lost:
        raise RewriteError(f"the patched graph has no tensor {lost[0]!r}")
    # Registers add to the tokens, and the form is the unpatched one's.
    forms = {
        layer: token_form(found, name, found.shapes.of(found.stack.mlps[layer].out))
        for layer, name in taps.items()
    }
    results = []
    with cutter.cut([*outputs, *taps.values()]) as piece:
        for pixels in batches:
            values = piece.run({found.image.name: pixels})
            tokens = {}
            for layer, name in taps.items():
                rows, form = values[name], forms[layer]
                count = rows.shape[0] // len(pixels) if form.flat else 0
                tokens[layer] = form.batch_first(form.apart(rows, count))
            results.append(Stated({n: values[n] for n in outputs}, tokens))
    return results


class _Meters:
    """Accumulates comparisons over batches; what fills up the last batch is left out."""

    def __init__(
        self, found: Survey, neurons: Neurons, registers: int, images: int, size: int
    ) -> None:
        self.found, self.registers, self.images, self.size = found, registers, images, size
        self.meters: dict[tuple[str, str], Meter] = {}

    def compare(self, graph: str, got: Sequence[Stated], stated: Sequence[Stated]) -> None:
        """Adds all batches of a graph."""
        for i, (mine, right) in enumerate(zip(got, stated, strict=True)):
            count = min(self.size, self.images - i * self.size)
            for name, values in mine.outputs.items():
                self._update(graph, name, right.outputs[name], values, count)
            for layer, values in mine.tokens.items():
                reference = right.tokens[layer]
                if graph == "unpatched":  # it has no registers
                    reference = reference[:, : values.shape[1]]
                self._update(graph, f"block {layer}", reference, values, count)

    def _update(
        self,
        graph: str,
        name: str,
        reference: NDArray[Any],
        values: NDArray[Any],
        count: int,
    ) -> None:
        if reference.ndim and len(reference) == self.size and reference.shape == values.shape:
            reference, values = reference[:count], values[:count]
        else:
            reference, values = reference[None], values[None]
        kind = self._kind(reference)
        first = kind == "tokens" and bool(self.found.entry.prefix)
        key = graph, name
        if key not in self.meters:
            self.meters[key] = Meter(graph, name, first, kind=kind)
        self.meters[key].update(reference, values)

    def _kind(self, values: NDArray[Any]) -> Any:
        entry = self.found.entry
        counts = {entry.count, entry.count + self.registers, entry.count - (entry.prefix or 0)}
        if values.ndim == 3 and values.shape[1] in counts:
            return "tokens"
        return "vectors" if values.ndim == 2 and values.shape[1] > 1 else "numbers"

    def result(self, found: Survey, left_out: dict[str, list[str]]) -> Checked:
        """Every comparison, held to the limits of the arithmetic it was run in."""
        parity, changes = [], {}
        for (graph, name), meter in self.meters.items():
            if graph == "unpatched":
                changes[name] = meter.result(LIMITS["fp32"]).relative_error
                continue
            arithmetic = "fp32" if graph == _TWIN else found.precision
            parity.append(meter.result(LIMITS[arithmetic]))
        return Checked(
            self.images,
            found.image.size,
            self.size,
            found.precision,
            tuple(parity),
            changes,
            left_out,
        )
