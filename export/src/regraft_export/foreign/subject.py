"""An ONNX file as finding sees it: parts of three graphs, run by ONNX Runtime on the CPU.

Memory: the weights once, once more in float32 for the down-projections that are scored, and the
activations of one pass; sessions are made when they are first needed and share the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from regraft.errors import ModelError
from regraft.neurons import Neurons
from regraft_export.finding.contributions import contributions
from regraft_export.finding.subject import (
    PLAIN,
    Contributions,
    Doubles,
    Floats,
    Intervention,
    Seen,
)
from regraft_export.foreign.instrument import Kind, Place, instrument, sign_of
from regraft_export.foreign.own_output import OwnOutput
from regraft_export.foreign.survey import Survey
from regraft_export.onnx_file.session import Session, Weights
from regraft_export.onnx_file.subgraph import subgraph
from regraft_export.versions import versions_of

MAX_TOKENS_BYTES = 1 << 30  # of all blocks' outputs that one pass returns


@dataclass(frozen=True)
class _Part:
    """A part of one graph: where it begins (None: at the images) and what it gives."""

    graph: Kind
    start: int | None
    outputs: tuple[str, ...]


class OnnxSubject:
    """See :class:`~regraft_export.finding.subject.Subject`.

    Args:
        found: the file's places, walked at the image size that will be run. It is used up.
        output: the model's own output for an image.

    Raises:
        ModelError: which tokens are patches, or what a unit writes, cannot be told.
        RewriteError: a register cannot be appended.
    """

    def __init__(self, found: Survey, output: OwnOutput) -> None:
        entry, mlps = found.entry, found.stack.mlps
        if entry.grid is None or entry.prefix is None:
            raise ModelError(
                f"{found.file.path}: the graph does not show which of its {entry.count} tokens are "
                "patches, whose norms finding looks at; expected a convolution that cuts them, and "
                "prefix tokens put in front by a Concat"
            )
        self.versions = versions_of(("onnxruntime", "onnx", "onnx-graphsurgeon", "numpy", "pillow"))
        self.hidden = tuple(m.hidden for m in mlps)
        self.patches = entry.grid[0] * entry.grid[1]
        self._prefix, self._count, self._width = entry.prefix, entry.count, mlps[0].width
        self._gammas = [m.gamma() for m in mlps]
        self._found, self._output = found, output
        self._image, self._batch = found.image.name, found.image.shape[0]
        self._graphs = instrument(found)
        self._weights = Weights(found.file, wide=True)
        self._sessions: dict[_Part, Session] = {}
        self._writes: dict[int, Floats] = {}
        first = self._graphs["plain"].neurons[0].kind
        self._itemsize = np.dtype(helper.tensor_dtype_to_np_dtype(first)).itemsize
        self.state_bytes = (self._count + 1) * self._width * self._itemsize

    def activation_bytes(self, layers: int) -> int:
        """What the activations of the first ``layers`` layers of one image take."""
        return self._count * sum(self.hidden[:layers]) * self._itemsize

    def norms(self, pixels: Floats) -> Floats:
        """Patch norms of every layer, (L, B, patches)."""
        return self._all_norms(pixels, PLAIN)[0][..., : self.patches]

    def contributions(
        self, pixels: Floats, layer: int, threshold: float, layers: int
    ) -> Contributions | None:
        """The sums of one batch."""
        graph = self._graphs["plain"]
        places = [graph.blocks[layer], *graph.neurons[:layers]]
        tokens, *hidden = self._run("plain", None, places, pixels)
        patches = slice(self._prefix, self._count)
        writes = {i: self._write(i) for i in range(layers)}
        return contributions(
            tokens.astype(np.float32, copy=False),
            dict(enumerate(hidden)),
            writes,
            patches,
            threshold,
        )

    def state(self, pixels: Floats, layer: int) -> Floats:
        """What enters block ``layer`` with a register appended, (B, T + 1, D)."""
        place = self._graphs["redirected"].blocks[layer - 1]
        return self._run("redirected", None, [place], pixels)[0]

    def norms_at(
        self,
        pixels: Floats,
        layer: int,
        done: Intervention = PLAIN,
        start: tuple[int, Any] | None = None,
    ) -> Floats:
        """Patch norms at one block's output, (B, patches)."""
        name = _graph_of(done)
        place = self._graphs[name].blocks[layer]
        tokens = self._run(name, start, [place], pixels, done.neurons)[0]
        return _norms(tokens[:, self._prefix : self._count])

    def received(self, pixels: Floats, neurons: Neurons) -> Mapping[int, Doubles]:
        """What the register receives, {layer: (m,)}, summed over images."""
        places = [self._graphs["redirected"].neurons[layer] for layer in neurons.layers]
        arrays = self._run("redirected", None, places, pixels, neurons)
        return {
            layer: h[:, self._count].astype(np.float64).sum(axis=0)
            for layer, h in zip(neurons.layers, arrays, strict=True)
        }

    def observe(self, pixels: Floats, done: Intervention) -> Seen:
        """Norms of every layer and the model's own output."""
        norms, values = self._all_norms(pixels, done, self._output.name)
        return Seen(norms, self._output.vectors(values), self._output.kind)

    def down(self, layer: int) -> tuple[Floats, Floats | None]:
        """A down-projection (m, D) and its bias."""
        weight, bias = self._found.weights(layer)
        return np.asarray(weight, np.float32), None if bias is None else np.asarray(
            bias, np.float32
        )

    def _write(self, layer: int) -> Floats:
        """What each unit adds to the stream, (m, D)."""
        if layer not in self._writes:
            weight, gamma = self.down(layer)[0], self._gammas[layer]
            self._writes[layer] = weight if gamma is None else weight * gamma
        return self._writes[layer]

    def _all_norms(
        self, pixels: Floats, done: Intervention, output: str | None = None
    ) -> tuple[Floats, NDArray[Any]]:
        """Norms behind the prefix at every block (L, B, patches + R), and one output as it is."""
        name = _graph_of(done)
        graph = self._graphs[name]
        per_image = len(graph.blocks) * graph.count * self._width * self._itemsize
        size = max(1, MAX_TOKENS_BYTES // per_image)
        norms, values = [], []
        for first in range(0, len(pixels), size):
            part = pixels[first : first + size]
            places: list[Place | str] = [*graph.blocks, *([] if output is None else [output])]
            arrays = self._run(name, None, places, part, done.neurons)
            blocks = arrays[: len(graph.blocks)]
            norms.append(np.stack([_norms(tokens[:, self._prefix :]) for tokens in blocks]))
            values += arrays[len(graph.blocks) :]
        return np.concatenate(norms, axis=1), np.concatenate(values or [np.empty(0)])

    def _run(
        self,
        graph: Kind,
        start: tuple[int, Floats] | None,
        wanted: Sequence[Place | str],
        pixels: Floats,
        neurons: Neurons | None = None,
    ) -> list[NDArray[Any]]:
        """Tensors of one graph: of places (B, T, n), of outputs (named) as they are."""
        names = tuple(w.name if isinstance(w, Place) else w for w in wanted)
        session = self._session(_Part(graph, None if start is None else start[0], names))
        count = self._graphs[graph].count
        given = dict(self._signs(neurons, session))
        rows = []
        for first, last in self._chunks(len(pixels)):
            fed = given | {self._image: _padded(pixels[first:last], self._batch)}
            if start is not None:
                place = self._graphs[graph].blocks[start[0] - 1]
                fed[place.name] = place.as_stored(_padded(start[1][first:last], self._batch))
            arrays = session.run(names, fed)
            rows.append(
                [
                    (w.by_image(a, count) if isinstance(w, Place) else a)[: last - first]
                    for a, w in zip(arrays, wanted, strict=True)
                ]
            )
        if len(rows) == 1:
            return rows[0]
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

    def _chunks(self, images: int) -> Iterator[tuple[int, int]]:
        """Runs of images: all at once, or as many as the file's fixed batch takes."""
        size = self._batch or images
        return ((i, min(i + size, images)) for i in range(0, images, size))

    def _signs(self, neurons: Neurons | None, session: Session) -> Iterator[tuple[str, Any]]:
        for layer, hidden in enumerate(self.hidden):
            if sign_of(layer) in session.inputs:
                sign = np.zeros(hidden, np.float32)
                for n in () if neurons is None else neurons.of(layer):
                    sign[n.index] = n.sign
                yield sign_of(layer), sign

    def _session(self, part: _Part) -> Session:
        if part not in self._sessions:
            graph = self._graphs[part.graph]
            given = {}
            if part.start is not None:
                place = graph.blocks[part.start - 1]
                given[place.name] = (place.kind, 2 if place.along.flat else 3)
            model = subgraph(graph.model, given, part.outputs)
            self._sessions[part] = Session(model, self._weights, self._found.file.path)
        return self._sessions[part]


def _graph_of(done: Intervention) -> Kind:
    if done.register:
        return "redirected"
    return "plain" if done.neurons is None else "silenced"


def _norms(tokens: NDArray[Any]) -> Floats:
    return np.asarray(np.linalg.norm(tokens.astype(np.float32, copy=False), axis=-1), np.float32)


def _padded(rows: NDArray[Any], batch: int | None) -> NDArray[Any]:
    """As many rows as the file's batch has; the last one stands in for what is missing."""
    if batch is None or len(rows) == batch:
        return rows
    return np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])
