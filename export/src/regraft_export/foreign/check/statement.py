"""The network with registers, on the unpatched file's own pieces, block after block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.errors import RewriteError
from regraft.neurons import Neurons
from regraft.redirect import RedirectOptions
from regraft_export.foreign.check.blocks import (
    Block,
    prove_tokenwise,
    token_form,
)
from regraft_export.foreign.check.forms import tokenwise
from regraft_export.foreign.check.method import redirect
from regraft_export.foreign.check.pieces import ASKS_SHAPE, Arrays, Cutter
from regraft_export.foreign.survey import Survey


@dataclass(frozen=True)
class Stated:
    """What the method gives for one batch of images.

    Attributes:
        outputs: of the file, by name.
        tokens: {layer: (B, T + R, D)}, what each touched block gives, registers last.
    """

    outputs: Arrays
    tokens: dict[int, NDArray[Any]]


def ask_shapes(cutter: Cutter, image: str, pixels: NDArray[Any]) -> None:
    """Asks the whole unpatched graph what its Shape and Size nodes give at this batch size."""
    names = [
        node.output[0]
        for node in cutter.file.skeleton.graph.node
        if node.op_type in ASKS_SHAPE and cutter.span(node.output).inputs <= {image}
    ]
    if names:
        with cutter.cut(names) as piece:
            cutter.shapes = piece.run({image: pixels})


def state(
    found: Survey,
    cutter: Cutter,
    neurons: Neurons,
    options: RedirectOptions,
    batches: Sequence[NDArray[Any]],
    outputs: Sequence[str],
    on_block: Callable[[], None],
) -> list[Stated]:
    """Runs the method.

    Args:
        found: the unpatched file's places.
        cutter: of the unpatched file.
        neurons: register neurons.
        options: of the redirect.
        batches: pixels, all of one shape.
        outputs: which outputs of the file.
        on_block: called after each block.

    Returns:
        One for each batch.

    Raises:
        RewriteError: the file has a form the check does not understand.
        EngineError: ONNX Runtime cannot run a piece.
    """
    image, touched = found.image.name, neurons.layers
    ask_shapes(cutter, image, batches[0])
    blocks = [Block(found, cutter, layer) for layer in range(found.stack.depth)]
    tail = cutter.cut(outputs, [name for block in blocks for name in _leaving(block)])
    x = _entered(found, cutter, options.registers, batches)
    T, last = found.entry.count, [Arrays() for _ in batches]
    tokens = [dict[int, NDArray[Any]]() for _ in batches]
    for block in blocks:
        maps = block.attention.weights in tail.span.met
        change = _redirect(found, neurons, options, block.layer)
        with block:
            form = block.forms[block.input]
            block.prove(x[0].take(np.arange(T), form.axis), {image: batches[0]})
            for i, pixels in enumerate(batches):
                values = block.run(x[i], {image: pixels}, change, maps=maps)
                x[i] = values[block.output]
                if block.layer in touched:
                    tokens[i][block.layer] = block.forms[block.output].batch_first(x[i])
                last[i] |= _without_registers(block, values, tail.span.met, len(pixels))
        on_block()
    with tail:
        ends = [tail.run({image: p, **kept}) for p, kept in zip(batches, last, strict=True)]
    return [Stated(end, kept) for end, kept in zip(ends, tokens, strict=True)]


def _leaving(block: Block) -> list[str]:
    """Tensors that outputs of the file may be computed from."""
    names = [block.output, block.activation, block.stream, block.attention.result]
    if block.attention.weights is not None:
        names.append(block.attention.weights)
    return [name for name in names if name != block.input or block.layer]


def _entered(
    found: Survey, cutter: Cutter, registers: int, batches: Sequence[NDArray[Any]]
) -> list[NDArray[Any]]:
    """What enters the first block, zero rows appended, taken apart."""
    image, T, start = found.image.name, found.entry.count, found.stack.start
    tokens = found.entry.tokens
    forms = {t.name: token_form(found, t.name, found.shapes.of(t)) for t in (tokens, start)}
    axis = forms[tokens.name].axis
    result = []
    with cutter.cut([tokens.name]) as embed, cutter.cut([start.name], [tokens.name]) as norm:
        for i, pixels in enumerate(batches):
            more = {image: pixels}
            values = forms[tokens.name].apart(embed.run(more)[tokens.name], T)
            if values.shape[axis] != T:
                raise RewriteError(
                    f"the tokens {tokens.name!r} have shape {values.shape}; expected {T} tokens"
                )
            if i == 0 and norm.span.nodes:
                given = {tokens.name: values}
                plain = tokenwise(norm, given, forms, T, more)
                prove_tokenwise(norm, given | plain, forms, T, more)
            zeros = np.zeros_like(values.take(np.zeros(registers, np.int64), axis))
            appended = {tokens.name: np.concatenate([values, zeros], axis)}
            result.append(tokenwise(norm, appended, forms, T, more)[start.name])
    return result


def _redirect(found: Survey, neurons: Neurons, options: RedirectOptions, layer: int) -> Any:
    chosen, entry = neurons.of(layer), found.entry
    if not chosen:
        return None
    prefix = entry.prefix or 0

    def change(h: NDArray[Any]) -> NDArray[Any]:
        return redirect(h, chosen, options, entry.count - prefix, prefix > 0)

    return change


def _without_registers(block: Block, values: Arrays, wanted: Collection[str], batch: int) -> Arrays:
    """The wanted tensors of a block as the file has them, of T tokens."""
    kept, T = Arrays(), block.count
    for name in _leaving(block):
        if name not in wanted or name not in values:
            continue
        if name == block.attention.weights:
            shape = block.attention.weights_shape
            lead = (batch, -1) if len(shape) == 4 else (-1,)
            kept[name] = values[name][:, :T, :T].reshape(*lead, T, T)
        else:
            form = block.forms[name]
            kept[name] = form.together(values[name].take(np.arange(T), form.axis))
    return kept
