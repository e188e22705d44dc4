"""What TensorRT made of a graph: types and attention, from the network and from the engine.

The network tells what was asked for and can be looked at anywhere. Only the engine tells which
kernels were chosen, and only the card it was built for can open it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# How TensorRT's kernels for fused attention are called, in the layer's name or its tactic's.
_FUSED = re.compile(r"mha|flash_?att|fused_?att|sdpa", re.IGNORECASE)
# 10.x writes "Row major linear FP16 format", 11 a field of its own.
_TYPES = {
    "FLOAT": "FP32", "HALF": "FP16", "BFLOAT16": "BF16", "INT64": "INT64", "INT32": "INT32",
    "BOOL": "BOOL", "FP32": "FP32", "FP16": "FP16", "BF16": "BF16",
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    """What the parser made of a graph.

    Attributes:
        layers: how many.
        types: type -> how many matrix products, convolutions and attentions give it: the
            arithmetic that takes the time. Shape computations are left out.
        attentions: ``Attention`` nodes, plus softmaxes between two matrix products, which TensorRT
            may fuse.
    """

    layers: int
    types: Mapping[str, int]
    attentions: int

    def to_json(self) -> dict[str, Any]:
        """As the build's report keeps it."""
        return {**vars(self), "types": dict(self.types)}


@dataclass(frozen=True)
class Kernels:
    """What the engine's inspector says.

    Attributes:
        layers: how many; each is a kernel or a group of kernels.
        types: type -> how many layers give it.
        fused_attentions: layers whose name or tactic is one of fused attention.
    """

    layers: int
    types: Mapping[str, int]
    fused_attentions: int

    def to_json(self) -> dict[str, Any]:
        """As the build's report keeps it."""
        return {**vars(self), "types": dict(self.types)}


def look_at_network(network: Any) -> Network:
    """Counts types and attentions in a parsed network."""
    import tensorrt as trt

    kinds = trt.LayerType
    heavy = {kinds.MATRIX_MULTIPLY, kinds.CONVOLUTION, getattr(kinds, "ATTENTION_OUTPUT", None)}
    types: Counter[str] = Counter()
    attentions = 0
    matmuls = _Matmuls()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in heavy:
            types[_type(layer.get_output(0).dtype.name)] += 1
        attentions += layer.type == getattr(kinds, "ATTENTION_INPUT", None)
        attentions += matmuls.add(layer, kinds)
    return Network(network.num_layers, dict(sorted(types.items())), attentions)


class _Matmuls:
    """Finds softmaxes between two matrix products, in a network in topological order."""

    # What may stand between the products: a scale, a mask, a cast, a change of shape.
    _BETWEEN = ("ELEMENTWISE", "CAST", "SHUFFLE", "IDENTITY", "SELECT")

    def __init__(self) -> None:
        self._scores: set[str] = set()  # tensors that descend from a product through _BETWEEN
        self._shares: set[str] = set()  # ... and a softmax

    def add(self, layer: Any, kinds: Any) -> int:
        """Takes the next layer; returns 1 if it is the second product of an attention."""
        inputs = {t.name for t in (layer.get_input(i) for i in range(layer.num_inputs)) if t}
        output = layer.get_output(0).name if layer.num_outputs else ""
        between = [getattr(kinds, name, None) for name in self._BETWEEN]
        if layer.type == kinds.MATRIX_MULTIPLY:
            self._scores.add(output)
            return int(bool(inputs & self._shares))
        if layer.type == kinds.SOFTMAX and inputs & self._scores:
            self._shares.add(output)
        elif layer.type in between:
            for known in (self._scores, self._shares):
                if inputs & known:
                    known.add(output)
        return 0


def look_at_engine(engine: Any) -> Kernels:
    """Counts types and fused attentions in an engine, which needs its card."""
    import tensorrt as trt

    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return read_inspector(json.loads(text))


def read_inspector(found: Mapping[str, Any]) -> Kernels:
    """Reads the inspector's JSON, of 10.x or 11.

    A layer is an object, or only its name where the engine was built without details.
    """
    layers = list(found.get("Layers", ()))
    types: Counter[str] = Counter()
    fused = 0
    for layer in layers:
        described = layer if isinstance(layer, Mapping) else {"Name": str(layer)}
        words = (str(described.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
        fused += any(_FUSED.search(word) for word in words)
        types.update(_output_types(described))
    return Kernels(len(layers), dict(sorted(types.items())), fused)


def _output_types(layer: Mapping[str, Any]) -> Iterator[str]:
    for output in layer.get("Outputs", ()):
        if isinstance(output, Mapping):
            text = str(output.get("DataType") or output.get("Datatype") or "")
            yield _type(text or str(output.get("Format/Datatype", "")))


def _type(text: str) -> str:
    words = re.findall(r"[A-Z0-9]+", text.upper())
    return next((_TYPES[word] for word in words if word in _TYPES), text or "unknown")
