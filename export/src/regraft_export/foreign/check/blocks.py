"""One block as pieces of the unpatched file and numpy between them.

Piece A goes from the block's input to queries, keys and values; numpy attends. Piece B goes from
there to the MLP's activation; numpy redirects. Piece C goes on to the block's output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from regraft.errors import RewriteError
from regraft.parity import LIMITS
from regraft_export.foreign.check.attention import find_attention
from regraft_export.foreign.check.forms import Form, form_of, tokenwise
from regraft_export.foreign.check.pieces import Arrays, Cutter, Piece
from regraft_export.foreign.survey import Survey

Redirect = Callable[[NDArray[Any]], NDArray[Any]]
# Both sides are float32 in another order of summation.
TOLERANCE = LIMITS["fp32"].relative_error


class Block:
    """One block, on any number of tokens.

    Args:
        found: the unpatched file's places.
        cutter: of the unpatched file, its shapes asked.
        layer: which block.

    Raises:
        RewriteError: its attention, or what it reads, is not understood.
    """

    def __init__(self, found: Survey, cutter: Cutter, layer: int) -> None:
        mlp = found.stack.mlps[layer]
        self.cutter, self.layer, self.count = cutter, layer, found.entry.count
        self.input, self.output = boundaries(found)[layer : layer + 2]
        self.attention = find_attention(found.attentions[layer], found.shapes)
        self.activation, self.stream = mlp.activation.name, mlp.stream.name
        self.forms = dict(self.attention.forms)
        start = found.stack.start if layer == 0 else found.stack.mlps[layer - 1].out
        for value in (start, mlp.activation, mlp.stream, mlp.out):
            self.forms[value.name] = token_form(found, value.name, found.shapes.of(value))
        every = boundaries(found)
        attended = self.attention.result
        self.before = self._cut(self.attention.reads, {self.input}, every)
        self.middle = self._cut(
            [self.activation, self.stream], {self.input, attended}, [*every, attended]
        )
        inner = {self.input, attended, self.activation, self.stream}
        self.after = self._cut([self.output], inner, [*every, *inner])

    def _cut(self, outputs: list[str], allowed: Collection[str], given: Collection[str]) -> Piece:
        # An output of this piece is no stop of it, unless it is handed in.
        stops = [name for name in given if name not in outputs or name in allowed]
        piece = self.cutter.cut(list(dict.fromkeys(outputs)), stops)
        stray = sorted(piece.span.met - set(allowed))
        if stray:
            raise RewriteError(
                f"layer {self.layer}: the check cannot cut the block, because {piece} read "
                f"{stray[0]!r} of another block"
            )
        return piece

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        for piece in (self.before, self.middle, self.after):
            self._stack.enter_context(piece)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(
        self, x: NDArray[Any], more: Arrays, redirect: Redirect | None = None, *, maps: bool = False
    ) -> Arrays:
        """Every tensor between the pieces, taken apart, by name.

        Args:
            x: the block's input, taken apart, any number of tokens.
            more: the images.
            redirect: of the activation, (B, tokens, hidden).
            maps: whether to give the attention maps too.
        """
        values: Arrays = {self.input: x}
        values |= self._run(self.before, values, more)
        values |= self.attention.attend(values, weights=maps)
        values |= self._run(self.middle, values, more)
        if redirect is not None:
            form = self.forms[self.activation]
            h = form.batch_first(values[self.activation])
            values[self.activation] = form.as_file(redirect(h))
        return values | self._run(self.after, values, more)

    def _run(self, piece: Piece, values: Arrays, more: Arrays) -> Arrays:
        inputs = {name: values[name] for name in piece.span.met}
        return tokenwise(piece, inputs, self.forms, self.count, more)

    def prove(self, x: NDArray[Any], more: Arrays) -> None:
        """Proves the cuts on the unpatched file.

        Args:
            x: the block's input, taken apart, T tokens.
            more: the images.

        Raises:
            RewriteError: put together they give something else than the file's block, or a token's
                position matters inside a piece.
        """
        values = self.run(x, more)
        for piece in (self.before, self.middle, self.after):
            prove_tokenwise(piece, values, self.forms, self.count, more)
        form = self.forms[self.input]
        with self._cut([self.output], {self.input}, [self.input]) as whole:
            given = whole.run({**more, self.input: form.together(x)})[self.output]
        mine = self.forms[self.output].together(values[self.output])
        apart = difference(mine, given)
        if not apart <= TOLERANCE:
            raise RewriteError(
                f"layer {self.layer}: the check does not understand the block: with the attention "
                f"at {self.attention.node!r} as softmax(f * Q K^T) V it gives another output than "
                f"the file's own nodes (relative error {apart:.1e})"
            )


def boundaries(found: Survey) -> list[str]:
    """The tensors between blocks, depth + 1 of them."""
    return [found.stack.start.name, *(m.out.name for m in found.stack.mlps)]


def token_form(found: Survey, name: str, shape: tuple[int, ...] | None) -> Form:
    """The form of a tensor of tokens."""
    entry, image = found.entry, found.image
    return form_of(name, shape, image.batch, entry.count, entry.axis == 1)


def prove_tokenwise(
    piece: Piece, values: Arrays, forms: dict[str, Form], count: int, more: Arrays
) -> None:
    """Proves that a piece treats each token by itself, wherever it stands: tokens are shifted.

    Raises:
        RewriteError: it does not.
    """
    inputs = {name: np.roll(values[name], 1, forms[name].axis) for name in sorted(piece.span.met)}
    if not inputs:
        return
    for name, got in tokenwise(piece, inputs, forms, count, more).items():
        if name not in forms:
            continue
        apart = difference(got, np.roll(values[name], 1, forms[name].axis))
        if not apart <= TOLERANCE:
            raise RewriteError(
                f"the check cannot send a register through {piece}: shifted tokens do not give a "
                f"shifted {name!r} (relative error {apart:.1e}), so positions matter there"
            )


def difference(values: NDArray[Any], reference: NDArray[Any]) -> float:
    """Relative Frobenius error; infinity for other shapes."""
    if values.shape != reference.shape:
        return float("inf")
    a, b = values.astype(np.float64), reference.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-100))
