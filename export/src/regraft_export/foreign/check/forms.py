"""Along which axis tokens lie in a tensor, and running pieces on more tokens than the file has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.errors import RewriteError
from regraft_export.foreign.check.pieces import Arrays, Piece


@dataclass(frozen=True)
class Form:
    """How a tensor holds tokens.

    Attributes:
        axis: of the tokens; in a tensor of rows, once they are taken apart.
        flat: whether it has rows: (B * T, F), or (T * B, F) where ``axis`` is 0.
    """

    axis: int
    flat: bool = False

    def apart(self, values: NDArray[Any], count: int) -> NDArray[Any]:
        """Rows (B * T, F) as (B, T, F), or (T, B, F); anything else as it is."""
        if not self.flat:
            return values
        shape = (-1, count) if self.axis == 1 else (count, -1)
        return values.reshape(*shape, values.shape[-1])

    def together(self, values: NDArray[Any]) -> NDArray[Any]:
        """The tensor as the file has it."""
        return values.reshape(-1, values.shape[-1]) if self.flat else values

    def batch_first(self, values: NDArray[Any]) -> NDArray[Any]:
        """Tokens (B, T, F), from what :meth:`apart` gave."""
        return values if self.axis == 1 else values.swapaxes(0, 1)

    def as_file(self, tokens: NDArray[Any]) -> NDArray[Any]:
        """The reverse of :meth:`batch_first`."""
        return self.batch_first(tokens)


def form_of(name: str, shape: tuple[int, ...] | None, batch: int, count: int, first: bool) -> Form:
    """The form of tokens with one vector each.

    Args:
        name: of the tensor, for messages.
        shape: at the sizes where the survey walked the graph.
        batch: B there.
        count: T there.
        first: whether the tokens enter the network batch first, which decides the order of rows.

    Raises:
        RewriteError: it holds no such tokens.
    """
    if shape is not None and len(shape) == 3:
        if shape[:2] == (batch, count):
            return Form(1)
        if shape[:2] == (count, batch):
            return Form(0)
    if shape is not None and len(shape) == 2 and shape[0] == batch * count:
        return Form(1 if first else 0, flat=True)
    raise RewriteError(
        f"the check cannot follow the tensor {name!r} of shape {shape}; expected tokens "
        f"({batch}, {count}, features), or rows of them"
    )


def tokenwise(
    piece: Piece,
    inputs: Mapping[str, NDArray[Any]],
    forms: Mapping[str, Form],
    count: int,
    more: Mapping[str, NDArray[Any]],
) -> Arrays:
    """Runs a piece that treats each token by itself, on any number of tokens.

    Args:
        piece: of the file, which takes T tokens at a time.
        inputs: taken apart, any number of tokens along each one's axis.
        forms: of inputs and outputs.
        count: T.
        more: what else the piece may read, the images.

    Returns:
        The outputs, taken apart, of as many tokens.
    """
    total = next(inputs[n].shape[forms[n].axis] for n in inputs)
    parts: dict[str, list[NDArray[Any]]] = {}
    for start in range(0, total, count):
        # The last run is filled up with its last token.
        chosen = np.minimum(np.arange(start, start + count), total - 1)
        feeds = {
            name: forms[name].together(values.take(chosen, forms[name].axis))
            for name, values in inputs.items()
        }
        for name, values in piece.run({**more, **feeds}).items():
            parts.setdefault(name, []).append(
                forms[name].apart(values, count) if name in forms else values
            )
    result = {}
    for name, pieces in parts.items():
        if name in forms:
            whole = np.concatenate(pieces, axis=forms[name].axis)
            result[name] = whole.take(np.arange(total), axis=forms[name].axis)
        else:
            result[name] = pieces[0]
    return result
