"""What the rewrites did to a bundle's graphs, counted: sections of the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from regraft.json_values import integer, truth


@dataclass(frozen=True)
class Sites:
    """What the rewrite touched, counted: the proof that it happened.

    Attributes:
        token: where the register is appended (1; 0 in the variant kv).
        redirect: touched down-projections, one per touched layer.
        output: places where the register is removed (none in the variant kv).
        mended: baked token counts that became T + R, as ``node: before -> after``.
        attention: attentions that see constants (none in the variant token).
    """

    token: int
    redirect: int
    output: int
    mended: tuple[str, ...] = ()
    attention: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "mended": list(self.mended)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sites:
        """Reads what :meth:`to_json` wrote.

        Raises:
            KeyError: a field is missing (but ``attention``, which schema 1 does not have).
            ValueError: a field is malformed; the message names it.
        """
        return cls(
            token=integer("sites.token", data["token"]),
            redirect=integer("sites.redirect", data["redirect"]),
            output=integer("sites.output", data["output"]),
            mended=tuple(str(line) for line in data["mended"]),
            attention=integer("sites.attention", data.get("attention", 0)),
        )


@dataclass(frozen=True)
class CudaFusions:
    """What the graph of ``ort-cuda`` has fused, counted.

    Attributes:
        attentions: MultiHeadAttention nodes; one for each block.
        norms: residual sums and norms in one.
        gelus: biases and GELUs in one.
        key_biases: dropped.
        value_biases: moved behind the output projection.
        layer_scales: folded into weights.
        patches: whether the patch embedding is one matrix product.
        tokens: whether the token entry is one Pad and one constant.
        redirects: touched layers whose register row does without a Mul over all tokens.
        constants: attentions that see constant keys and values (variant kv).
        shape_nodes: Shape nodes left, which ONNX Runtime runs on the CPU.
        operators: nodes of regraft's own, see :mod:`regraft.engines.ort_cuda.operators`.
    """

    attentions: int = 0
    norms: int = 0
    gelus: int = 0
    key_biases: int = 0
    value_biases: int = 0
    layer_scales: int = 0
    patches: bool = False
    tokens: bool = False
    redirects: int = 0
    constants: int = 0
    shape_nodes: int = 0
    operators: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CudaFusions:
        """Reads what :meth:`to_json` wrote.

        Raises:
            KeyError: a field is missing (but those that were counted later than others).
            ValueError: a field is malformed; the message names it.
        """
        found: dict[str, Any] = {}
        for f in fields(cls):
            read = truth if isinstance(f.default, bool) else integer
            value = data.get(f.name, 0) if f.name in _COUNTED_LATER else data[f.name]
            found[f.name] = read(f"cuda.{f.name}", value)
        return cls(**found)


_COUNTED_LATER = ("operators", "constants")  # bundles of schema 2 were written without, at first
