"""An inference request and its answer, whatever transport they travel on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from regraft.serve.refusals import invalid

Parameter: TypeAlias = bool | int | float | str
_MAX_MICROSECONDS = 1 << 63


@dataclass(frozen=True)
class InputTensor:
    """One input as it came, checked against nothing but its own shape.

    Attributes:
        name: as the client calls it.
        datatype: one of :data:`regraft.serve.datatypes.NAMES`.
        shape: sizes from 0 on.
        data: an array of that shape for numbers, a flat list for BYTES.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: NDArray[Any] | list[bytes]


@dataclass(frozen=True)
class OutputRequest:
    """One output that is wanted; ``binary`` of None leaves it to the request."""

    name: str
    binary: bool | None = None


@dataclass(frozen=True)
class InferRequest:
    """An inference request.

    Attributes:
        inputs: at least none; the model says which it needs.
        outputs: those wanted; empty for all.
        id: to be echoed; None if there was none.
        parameters: of the request.
        raw: an image that came as the whole body, without a tensor around it.
    """

    inputs: tuple[InputTensor, ...] = ()
    outputs: tuple[OutputRequest, ...] = ()
    id: str | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    raw: bytes | None = None

    @property
    def half(self) -> bool:
        """Whether outputs are wanted as FP16 (``output_datatype``).

        Raises:
            Refusal: they are wanted as something else than FP32 or FP16.
        """
        asked = self.parameters.get("output_datatype", "FP32")
        if asked not in ("FP32", "FP16"):
            raise invalid(f"parameter 'output_datatype' is {asked!r}; expected FP32 or FP16")
        return asked == "FP16"

    def timeout(self) -> float | None:
        """Seconds the client is willing to wait in the queue (``timeout``, in microseconds).

        Raises:
            Refusal: it is no integer from 0 on.
        """
        value = self.parameters.get("timeout", 0)
        if type(value) is not int or not 0 <= value < _MAX_MICROSECONDS:
            raise invalid(f"parameter 'timeout' is {value!r}; expected microseconds, an integer")
        return value / 1e6 if value else None


@dataclass(frozen=True)
class InferResponse:
    """The answer to an inference request.

    Attributes:
        model: the name asked for.
        version: of the model that answered.
        id: the request's.
        outputs: name -> array, float32 or float16, in the order asked for.
    """

    model: str
    version: str
    id: str | None
    outputs: Mapping[str, NDArray[np.floating[Any]]]
