"""Outputs that are parts of one tensor: the tokens without registers, and the registers.

Cutting registers off costs a pass over (B, T, D) on the device. A graph may leave it to the copy
back, which can take part of every image as well as all of it: then its output is the whole, and its
metadata says what the parts are called::

    {"last_hidden_state": ["regraft.whole", 0, 197], "test_time_registers": [..., 197, 198]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.engines.options import Shape
from regraft.errors import EngineError

METADATA = "regraft.parts"
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """Tokens ``start`` to ``stop`` of the output ``whole`` (B, T, D)."""

    whole: str
    start: int
    stop: int


def parts_of(metadata: Mapping[str, str], outputs: Mapping[str, Shape]) -> dict[str, Part]:
    """Part's name -> part, as a graph's metadata has it.

    Args:
        metadata: of the graph.
        outputs: of the graph, name -> shape.

    Raises:
        EngineError: the metadata does not fit the outputs.
    """
    text = metadata.get(METADATA)
    if text is None:
        return {}
    try:
        parts = {str(name): Part(*value) for name, value in json.loads(text).items()}
        for part in parts.values():
            length = outputs[part.whole][1]
            if not (isinstance(length, int) and 0 <= part.start < part.stop <= length):
                raise ValueError(f"{part} of {length} tokens")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise EngineError(
            f"the graph's metadata {METADATA} does not fit its outputs ({error}); export again"
        ) from error
    return parts


def shapes_of(outputs: Mapping[str, Shape], parts: Mapping[str, Part]) -> dict[str, Shape]:
    """Output name -> shape, parts in place of the wholes that they are cut from."""
    shapes: dict[str, Shape] = {}
    for name, part in parts.items():
        batch, _, *inner = outputs[part.whole]
        shapes[name] = (batch, part.stop - part.start, *inner)
    wholes = {part.whole for part in parts.values()}
    return shapes | {name: shape for name, shape in outputs.items() if name not in wholes}


def needed(names: Iterable[str], parts: Mapping[str, Part]) -> list[str]:
    """The graph's own outputs that hold the named ones, each once."""
    return list(dict.fromkeys(parts[name].whole if name in parts else name for name in names))


def cut(name: str, values: Mapping[str, Array], parts: Mapping[str, Part]) -> Array:
    """A named output, of the graph's own; a copy where it is a part."""
    if name not in parts:
        return values[name]
    part = parts[name]
    return np.ascontiguousarray(values[part.whole][:, part.start : part.stop])
