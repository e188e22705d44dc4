"""The features of a batch of images, cut out of a graph's outputs by the token layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from regraft.errors import InputError
from regraft.tokens import TokenLayout

Floats = NDArray[np.float32]

# Field of Features -> the graph output it is cut from; a trailing dot stands for one per layer.
SOURCES = {
    "cls": "last_hidden_state",
    "prefix": "last_hidden_state",
    "patches": "last_hidden_state",
    "pooled": "pooler_output",
    "hidden": "hidden.",
    "attention": "attentions.",
    "test_time_registers": "test_time_registers",
}


@dataclass(frozen=True)
class Features:
    """The features of B images.

    A field is None (a mapping is empty) if the model or the bundle does not give it, or if it was
    not asked for.

    Attributes:
        cls: the class token, (B, D).
        prefix: the other prefix tokens, (B, P - 1, D), or (B, P, D) without a class token.
        patches: patch tokens, (B, rows, cols, D).
        pooled: what the model's own forward returns, (B, E).
        hidden: layer -> raw block output, prefix tokens first, (B, P + patches, D).
        attention: layer -> attention of CLS to the patches, (B, heads, rows, cols).
        test_time_registers: the registers' own last hidden state, (B, R, D).
        indices: position of each row's image in what was handed in, (B,) int64; rows of images
            that could not be read are missing.
    """

    cls: Floats | None = None
    prefix: Floats | None = None
    patches: Floats | None = None
    pooled: Floats | None = None
    hidden: Mapping[int, Floats] = field(default_factory=dict)
    attention: Mapping[int, Floats] = field(default_factory=dict)
    test_time_registers: Floats | None = None
    indices: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        """B, the number of images."""
        return len(self.indices)

    @classmethod
    def from_outputs(
        cls,
        outputs: Mapping[str, Floats],
        layout: TokenLayout,
        indices: Sequence[int] | NDArray[np.int64],
        fields: Iterable[str] = tuple(SOURCES),
    ) -> Features:
        """Cuts features out of what an engine returned.

        Args:
            outputs: graph output name -> array; ``last_hidden_state`` is (B, P + patches, D).
            layout: the token layout of the graph.
            indices: position of each image in what was handed in, B of them.
            fields: the fields wanted, out of :data:`SOURCES`.
        """
        wanted = set(fields)
        arrays: dict[str, Floats] = {}
        if (last := outputs.get(SOURCES["patches"])) is not None:
            arrays |= _tokens(last, layout)
        if (pooled := outputs.get(SOURCES["pooled"])) is not None:
            arrays["pooled"] = pooled
        if (registers := outputs.get(SOURCES["test_time_registers"])) is not None:
            arrays["test_time_registers"] = registers
        return cls(
            **{name: array for name, array in arrays.items() if name in wanted},
            hidden=_by_layer(outputs, SOURCES["hidden"]) if "hidden" in wanted else {},
            attention=_by_layer(outputs, SOURCES["attention"]) if "attention" in wanted else {},
            indices=np.asarray(indices, np.int64),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Features]) -> Features:
        """Joins batches of the same fields, at least one, in order."""
        if len(parts) == 1:
            return parts[0]
        tables = [part.arrays() for part in parts]
        joined = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
        return cls(
            **{name: array for name, array in joined.items() if "." not in name},
            hidden=_by_layer(joined, "hidden."),
            attention=_by_layer(joined, "attention."),
            indices=np.concatenate([part.indices for part in parts]),
        )

    def arrays(self) -> dict[str, Floats]:
        """The fields that are there under the names they have in files.

        Returns:
            ``cls``, ``prefix``, ``patches``, ``pooled``, ``hidden.L``, ``attention.L``,
            ``test_time_registers`` -> array of B rows.
        """
        flat = {
            "cls": self.cls,
            "prefix": self.prefix,
            "patches": self.patches,
            "pooled": self.pooled,
            **{f"hidden.{layer}": array for layer, array in self.hidden.items()},
            **{f"attention.{layer}": array for layer, array in self.attention.items()},
            "test_time_registers": self.test_time_registers,
        }
        return {name: array for name, array in flat.items() if array is not None}


_HOW = {
    "hidden": "; export with --layers to have it",
    "attention": "; export with --attentions to have it",
}


def available_fields(outputs: Iterable[str], layout: TokenLayout) -> tuple[str, ...]:
    """The fields that a graph with these output names and this token layout gives."""
    names = list(outputs)
    absent = set() if layout.class_token else {"cls"}
    if layout.prefix == int(layout.class_token):
        absent.add("prefix")
    return tuple(
        name
        for name, source in SOURCES.items()
        if name not in absent and any(_matches(n, source) for n in names)
    )


def choose_outputs(
    fields: Iterable[str], outputs: Iterable[str], layout: TokenLayout
) -> tuple[str, ...]:
    """The graph outputs that the wanted fields are cut from.

    Args:
        fields: names out of :data:`SOURCES`.
        outputs: the graph's output names.
        layout: its token layout.

    Raises:
        InputError: there is no such field, or the bundle does not give it.
    """
    names, chosen = list(outputs), dict[str, None]()
    available = available_fields(names, layout)
    for name in fields:
        if name not in SOURCES:
            raise InputError(f"there is no output {name!r}; expected {', '.join(SOURCES)}")
        if name not in available:
            raise InputError(
                f"output {name!r} is not in this bundle, which gives {', '.join(available)}"
                f"{_HOW.get(name, '')}"
            )
        chosen |= dict.fromkeys(n for n in names if _matches(n, SOURCES[name]))
    return tuple(chosen)


def _matches(name: str, source: str) -> bool:
    return name.startswith(source) if source.endswith(".") else name == source


def _tokens(last: Floats, layout: TokenLayout) -> dict[str, Floats]:
    B, _, D = last.shape
    first = 1 if layout.class_token else 0
    arrays = {"patches": last[:, layout.prefix :].reshape(B, *layout.grid, D)}
    # Copies, because they are small and would otherwise keep all the patches in memory.
    if layout.class_token:
        arrays["cls"] = last[:, 0].copy()
    if layout.prefix > first:
        arrays["prefix"] = last[:, first : layout.prefix].copy()
    return arrays


def _by_layer(arrays: Mapping[str, Floats], start: str) -> dict[int, Floats]:
    layers = {
        int(name.removeprefix(start)): a for name, a in arrays.items() if _matches(name, start)
    }
    return dict(sorted(layers.items()))
