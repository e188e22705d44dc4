"""Rewrite: everything that joins the patches on their way in is one Pad and one Add.

Class token, trained registers, position embedding, the bias of the patch embedding and the
test-time registers are constants: tokens = patches moved to their place, plus one constant
(T + R, D). What the constant is, is computed, not matched::

    patches -> Add b -> Concat (Expand (cls), .) -> Add pos -> Pad     (and the Shape for Expand)
    patches -> Pad -> Add constant

No Shape node is left, which ONNX Runtime would put on the CPU, and the Add fuses with the norm.
Left alone where tokens are anything else than patches at their places plus a constant.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft_export.graph.cuda.drop_key_bias import biased_product
from regraft_export.graph.cuda.layout import BATCH, compute, scalar_factor
from regraft_export.graph.document import Editor, ancestors, dtype_of, replace_uses

_JOINS = (
    *("Concat", "Expand", "Add", "Pad", "Shape", "Reshape", "Slice", "Cast"),
    *("Squeeze", "Unsqueeze", "Identity", "Gather"),
)


def embed_tokens(
    graph: gs.Graph, patches: gs.Variable, tokens: gs.Variable, grid: tuple[int, int]
) -> bool:
    """Rewrites the token entry; returns whether it had the form.

    Args:
        graph: changed in place.
        patches: (B, N, D), what :func:`patch_matmul` returned.
        tokens: (B, T + R, D), where the first block, or a norm before it, reads.
        grid: (N, D).
    """
    graph.toposort()
    found = biased_product(patches)
    source = patches if found is None else found[0]
    affine = _affine(graph, source, tokens, grid)
    if affine is None:
        return False
    start, constant = affine
    dtype = dtype_of(patches)
    before, after = start, len(constant) - start - grid[0]
    editor, stem = Editor(graph), "regraft.cuda.tokens"
    pads = editor.constant(f"{stem}.pads", np.array([0, before, 0, 0, after, 0], dtype=np.int64))
    placed = source
    if before or after:
        placed = editor.node("Pad", f"{stem}.place", [source, pads], {"mode": "constant"})
    placed.shape = ["batch", *constant.shape]
    added = editor.constant(f"{stem}.constant", constant[None].astype(dtype))
    joined = editor.node("Add", stem, [placed, added])
    joined.shape = ["batch", *constant.shape]
    replace_uses(graph, tokens, joined)
    return True


def _affine(
    graph: gs.Graph, source: gs.Variable, tokens: gs.Variable, grid: tuple[int, int]
) -> tuple[int, NDArray[np.float64]] | None:
    """Row of the first patch, and the constant (T + R, D); None unless that is all there is."""
    nodes = ancestors(tokens, stop=[source])
    if any(n.op not in _JOINS or n.domain or scalar_factor(n) for n in nodes):
        return None
    rng = np.random.default_rng(0)
    shape = (BATCH, *grid)

    def at(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
        result = compute(graph, nodes, tokens, {source.name: values.astype(np.float32)})
        return None if result is None else np.asarray(result, np.float64)

    zero = at(np.zeros(shape))
    if zero is None or zero.ndim != 3 or not np.array_equal(zero[0], zero[1]):
        return None
    drawn = rng.integers(-8, 9, shape).astype(np.float64)
    moved = at(drawn)
    if moved is None:
        return None
    moved = moved - zero
    # Rounding hides nothing: what was drawn are small integers.
    rows = np.flatnonzero(np.abs(moved).max(axis=(0, 2)) > 0.5)
    start = int(rows[0]) if len(rows) else 0
    expected = np.zeros_like(moved)
    expected[:, start : start + grid[0]] = drawn
    return (start, zero[0]) if np.allclose(moved, expected, atol=1e-2) else None
