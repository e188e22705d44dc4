"""``neurons.json``: the register neurons of one model, and what is known of them.

Layers and indices count from 0. A file with only ``schema`` and ``neurons`` is legal (a hand-made
list); then ``about`` is empty and the neurons' identity cannot be checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.errors import NeuronsError
from regraft.json_values import read_json
from regraft.neurons_about import check_about

SCHEMA = 1


@dataclass(frozen=True, order=True)
class RegisterNeuron:
    """One MLP hidden unit that writes outlier tokens.

    Attributes:
        layer: block, from 0.
        index: hidden unit, from 0: the column of the down-projection's input.
        score: contribution to the outliers' norm (or the paper's mean activation).
        sign: +1 or -1, the sign of its mean activation at outlier tokens.
        value: mean over images of the register's activation with the redirect active; None in
            hand-made lists, which then cannot be exported with ``value = constant``.
    """

    layer: int
    index: int
    score: float = 0.0
    sign: int = 1
    value: float | None = None


@dataclass(frozen=True)
class Neurons:
    """Register neurons, best first, and the facts recorded beside them.

    Attributes:
        neurons: at least one, no duplicates.
        about: everything else in the file: ``model`` (MODEL as given), ``weights_sha256``,
            ``fingerprints`` ({layer: numbers of its down-projection}), ``image_size`` [H, W],
            ``preprocessing``, ``threshold``, ``detection_layer``, ``report``, ``images``, ``seed``,
            ``versions``.
        origin: the file they were read from, for messages.
    """

    neurons: tuple[RegisterNeuron, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    origin: str = field(default="the neurons file", compare=False)

    def __post_init__(self) -> None:
        if not self.neurons:
            raise NeuronsError("the list of register neurons is empty; expected at least one")
        seen: set[tuple[int, int]] = set()
        for n in self.neurons:
            if (n.layer, n.index) in seen:
                raise NeuronsError(f"neuron (layer {n.layer}, index {n.index}) is listed twice")
            seen.add((n.layer, n.index))

    @property
    def layers(self) -> tuple[int, ...]:
        """The touched layers, ascending."""
        return tuple(sorted({n.layer for n in self.neurons}))

    def of(self, layer: int) -> tuple[RegisterNeuron, ...]:
        """The neurons of one layer, by index."""
        return tuple(sorted((n for n in self.neurons if n.layer == layer), key=lambda n: n.index))

    def check_against(self, depth: int, hidden: Mapping[int, int] | int) -> None:
        """Raises NeuronsError if a layer or index is outside a model's.

        Args:
            depth: number of blocks.
            hidden: MLP hidden size, of all layers or by layer.
        """
        for n in self.neurons:
            if n.layer >= depth:
                raise NeuronsError(
                    f"neuron (layer {n.layer}, index {n.index}): the model has {depth} blocks, "
                    f"so layers run from 0 to {depth - 1}"
                )
            size = hidden if isinstance(hidden, int) else hidden[n.layer]
            if n.index >= size:
                raise NeuronsError(
                    f"neuron (layer {n.layer}, index {n.index}): layer {n.layer} has {size} hidden "
                    f"units, so indices run from 0 to {size - 1}"
                )

    def to_json(self) -> dict[str, Any]:
        """The file's content as plain JSON values."""
        rows = [
            {"layer": n.layer, "index": n.index, "score": n.score, "sign": n.sign}
            | ({} if n.value is None else {"value": n.value})
            for n in self.neurons
        ]
        return {"schema": SCHEMA, "neurons": rows, **self.about}

    @classmethod
    def from_json(cls, data: Any, origin: str = "neurons") -> Neurons:
        """Reads what :meth:`to_json` wrote.

        Args:
            data: parsed JSON.
            origin: the file's name, for messages.

        Raises:
            NeuronsError: it is not a legal neurons file; the message names the entry or the key.
        """
        if not isinstance(data, dict) or not isinstance(data.get("neurons"), list):
            raise NeuronsError(
                f'{origin}: expected a JSON object with "schema": {SCHEMA} and a list "neurons"'
            )
        schema = data.get("schema")
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise NeuronsError(f'{origin}: "schema" is {schema!r}; expected {SCHEMA}')
        if schema > SCHEMA:
            raise NeuronsError(
                f"{origin}: schema {schema} is newer than {SCHEMA}, the newest this version reads; "
                "upgrade regraft"
            )
        try:
            neurons = tuple(_neuron(row, i) for i, row in enumerate(data["neurons"]))
            about = {k: v for k, v in data.items() if k not in ("schema", "neurons")}
            found = cls(neurons, about, origin)
        except NeuronsError as error:
            raise NeuronsError(f"{origin}: {error}") from None
        check_about(about, origin)
        return found

    @classmethod
    def load(cls, path: str | Path) -> Neurons:
        """Reads a neurons file.

        Raises:
            NeuronsError: it is missing, not JSON, or not a legal neurons file.
        """
        path = Path(path)
        expected = "expected the file that `regraft find` wrote"
        data = read_json(path, NeuronsError, missing=expected, broken=expected)
        return cls.from_json(data, str(path))


def _neuron(row: Any, position: int) -> RegisterNeuron:
    where = f"neurons[{position}]"
    if not isinstance(row, dict):
        raise NeuronsError(f'{where} is {row!r}; expected an object with "layer" and "index"')
    for key in ("layer", "index"):
        got = row.get(key)
        if not isinstance(got, int) or isinstance(got, bool) or got < 0:
            raise NeuronsError(f"{where}: {key} is {got!r}; expected an integer from 0")
    if row.get("sign", 1) not in (1, -1):
        raise NeuronsError(f"{where}: sign is {row['sign']!r}; expected 1 or -1")
    for key in ("score", "value"):
        got = row.get(key, 0.0)
        if isinstance(got, bool) or not isinstance(got, int | float) or not math.isfinite(got):
            raise NeuronsError(f"{where}: {key} is {got!r}; expected a finite number")
    value = row.get("value")
    return RegisterNeuron(
        layer=row["layer"],
        index=row["index"],
        score=float(row.get("score", 0.0)),
        sign=int(row.get("sign", 1)),
        value=None if value is None else float(value),
    )
