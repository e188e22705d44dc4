"""Rewrite: LayerScale goes into the weights of the product before it.

``gamma * (h W + b) = h (W * gamma) + gamma * b``, so the pass over (B, T, D) that multiplies falls
away. It is done before a graph is patched: the redirect then takes its rows from the new weight.

A product whose scaled weight cannot be held in the graph's precision (in fp16 a gamma of 1e-5 makes
subnormal numbers of it) keeps its LayerScale.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft_export.graph.document import Editor, consumers, maker, replace_uses

ROUNDING = 1e-3  # relative Frobenius error of a scaled weight; fp16 has 3e-4, bf16 2e-3
_LIMITS = {2: ROUNDING, 4: 1e-6}  # by bytes of the type
_BF16 = 4e-3


def fold_layer_scale(
    graph: gs.Graph, down: Mapping[int, NDArray[np.generic]]
) -> tuple[int, dict[int, NDArray[np.generic]]]:
    """Folds every LayerScale.

    Args:
        graph: a traced graph, changed in place.
        down: {layer: (hidden, D)}, weights of the down-projections.

    Returns:
        How many were folded, and the weights of the down-projections as they are now.
    """
    folded, now = 0, dict(down)
    for node in [n for n in graph.nodes if n.op == "Mul"]:
        found = _scaled_product(node)
        if found is None:
            continue
        product, add, gamma = found
        weight = product.inputs[1]
        scaled = _scaled(weight.values, gamma.values)
        if scaled is None:
            continue
        layers = [i for i, w in now.items() if w is not None and _same(w, weight.values)]
        editor = Editor(graph)
        product.inputs[1] = editor.constant(f"{product.name}.scaled", scaled)
        if add is not None:
            bias = next(t for t in add.inputs if isinstance(t, gs.Constant))
            values = np.asarray(bias.values, np.float64) * np.asarray(gamma.values, np.float64)
            constant = editor.constant(f"{add.name}.scaled", values.astype(bias.values.dtype))
            add.inputs = [constant if t is bias else t for t in add.inputs]
        inner = next(t for t in node.inputs if isinstance(t, gs.Variable))
        replace_uses(graph, node.outputs[0], inner)
        now |= dict.fromkeys(layers, scaled)
        folded += 1
    return folded, now


def _same(a: NDArray[np.generic], b: NDArray[np.generic]) -> bool:
    like = a.shape == b.shape and a.dtype == b.dtype
    return like and np.array_equal(a[:1], b[:1]) and np.array_equal(a, b)  # mostly settled early


def _scaled_product(node: gs.Node) -> tuple[gs.Node, gs.Node | None, gs.Constant] | None:
    """The product, the Add of its bias, and gamma (D,), where a Mul is a LayerScale."""
    gamma = next((t for t in node.inputs if isinstance(t, gs.Constant)), None)
    inner = next((t for t in node.inputs if isinstance(t, gs.Variable)), None)
    if gamma is None or inner is None or gamma.values.ndim != 1 or gamma.values.size == 1:
        return None
    add = None
    made_by = maker(inner) if len(consumers(inner)) == 1 else None
    if made_by is not None and made_by.op == "Add":
        add = made_by
        if not any(
            isinstance(t, gs.Constant) and t.values.shape == gamma.values.shape for t in add.inputs
        ):
            return None
        product = next((t for t in add.inputs if isinstance(t, gs.Variable)), None)
        if product is None or not product.inputs or len(consumers(product)) != 1:
            return None
        made_by = product.inputs[0]
    if made_by is None or made_by.op != "MatMul" or not isinstance(made_by.inputs[1], gs.Constant):
        return None
    weight = made_by.inputs[1].values
    fits = weight.ndim == 2 and weight.shape[1] == gamma.values.size
    return (made_by, add, gamma) if fits else None


def _scaled(weight: NDArray[np.generic], gamma: NDArray[np.generic]) -> NDArray[np.generic] | None:
    """The scaled weight; None if the type cannot hold it well."""
    exact = np.asarray(weight, np.float64) * np.asarray(gamma, np.float64)
    rounded = exact.astype(weight.dtype)
    limit = _BF16 if weight.dtype.name == "bfloat16" else _LIMITS[weight.dtype.itemsize]
    error = np.linalg.norm(np.asarray(rounded, np.float64) - exact)
    return rounded if error <= limit * np.linalg.norm(exact) else None
