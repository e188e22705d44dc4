"""Which output of a file is the model's own for an image: what finding compares before and after.

The same as the PyTorch route takes: a pooled vector where the file gives one, else its class token,
else the mean of its patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.errors import InputError, ModelError
from regraft_export.foreign.survey import Survey

Kind = Literal["pooled", "class token", "mean patch"]
_POOLED = ("image_embeds", "pooler_output")  # by whose names a pooled vector is known
_TOKENS = "last_hidden_state"


@dataclass(frozen=True)
class OwnOutput:
    """One output of a file.

    Attributes:
        name: of the output.
        kind: how a vector comes out of it.
        prefix: tokens before the patches, where it has tokens.
    """

    name: str
    kind: Kind
    prefix: int = 0

    def vectors(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """(B, E) of what the file gives, (B, E) or (B, T, E)."""
        values = values.astype(np.float32)
        if self.kind == "class token":
            values = values[:, 0]
        elif self.kind == "mean patch":
            values = values[:, self.prefix :].mean(axis=1)
        return values


def own_output(found: Survey, name: str | None = None) -> OwnOutput:
    """Chooses it.

    Args:
        found: the file's places, unchanged.
        name: of an output; None to choose.

    Raises:
        InputError: the output of that name does not do.
        ModelError: none does, or several do.
    """
    fitting = {o.name: o for o in _fitting(found)}
    listed = _listed(found)
    if name is not None:
        if name in fitting:
            return fitting[name]
        raise InputError(
            f"{found.file.path}: --output is {name!r}; expected an output computed from the images "
            f"alone, behind the last block, one vector (batch, E) or all tokens (batch, T, D) of "
            f"each. Its outputs: {listed}"
        )
    pooled = [o for o in fitting.values() if o.kind == "pooled"]
    known = [o for known in _POOLED for o in pooled if o.name == known]
    tokens = [o for o in fitting.values() if o.kind != "pooled"]
    known += [] if pooled else [o for o in tokens if o.name == _TOKENS]
    choice = known[:1] or pooled or tokens
    if len(choice) == 1:
        return choice[0]
    which = (
        f"{len(choice)} outputs could be the model's own for an image "
        f"({', '.join(repr(o.name) for o in choice)})"
        if choice
        else "no output is a vector (batch, E) or all tokens (batch, T, D) of an image"
    )
    raise ModelError(
        f"{found.file.path}: {which}, by which finding judges how much a redirect changes; choose "
        f"one with --output. Its outputs: {listed}"
    )


def _fitting(found: Survey) -> Iterator[OwnOutput]:
    entry, batch = found.entry, found.image.batch
    prefix = entry.prefix or 0
    for value in found.view.graph.outputs:
        shape = found.shapes.of(value)
        if shape is None or shape[:1] != (batch,) or not found.reach.computes(found.last, value):
            continue
        if found.inputs_of(value) != {found.image.name}:
            continue
        if len(shape) == 2:
            yield OwnOutput(value.name, "pooled")
        elif len(shape) == 3 and shape[1] == entry.count:
            yield OwnOutput(value.name, "class token" if prefix else "mean patch", prefix)
        elif len(shape) == 3 and shape[1] == entry.count - prefix:
            yield OwnOutput(value.name, "mean patch")


def _listed(found: Survey) -> str:
    return ", ".join(f"{v.name!r} ({_size(found, v)})" for v in found.view.graph.outputs)


def _size(found: Survey, value: gs.Tensor) -> str:
    """An output's dimensions: numbers, and names where the file leaves them open."""
    declared = next(o for o in found.file.skeleton.graph.output if o.name == value.name)
    dims = [d.dim_value or d.dim_param for d in declared.type.tensor_type.shape.dim]
    measured = found.shapes.of(value)
    if measured is None:
        return " x ".join(str(d or "?") for d in dims) or "of unknown shape"
    if len(dims) != len(measured):
        dims = [""] * len(measured)
    # Where neither says, the size at which the graph was walked, but for the batch of that walk.
    walked = ["batch" if found.image.open_batch else measured[0], *measured[1:]]
    return " x ".join(str(d or n) for d, n in zip(dims, walked, strict=True))
