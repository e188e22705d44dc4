"""What the maps of one image at one layer show: values, colours, outlines and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from regraft.report.colours import MAGMA, VIRIDIS, ColourScale
from regraft.report.measurement import Measurement, State
from regraft.report.scales import log_scale
from regraft.report.wording import looked_at, percent, short, stand_in, tick_percent

When: TypeAlias = Literal["before", "after"]

# Attention below this part of the largest share is drawn as if it were this, lest a few patches
# that get next to nothing take most of the colours.
_FAINTEST = 1 / 1000


@dataclass(frozen=True)
class MapScales:
    """The two colour scales, each common to all images, before and after."""

    norms: ColourScale
    attention: ColourScale


def map_scales(found: Measurement, layer: int) -> MapScales:
    """Scales that hold every patch of both states at a layer."""
    states = (found.before, found.after)
    norms = np.concatenate([s.norms[:, layer, found.patches].ravel() for s in states])
    shares = np.concatenate([s.attention[:, layer, found.patches].ravel() for s in states])
    shares = np.maximum(shares, shares.max() * _FAINTEST)
    what = looked_at(found.manifest.tokens.class_token)
    return MapScales(
        ColourScale(
            "viridis",
            VIRIDIS,
            log_scale(norms),
            f"L2 norm of a patch, output of layer {layer} (logarithmic)",
            short,
        ),
        ColourScale(
            "magma",
            MAGMA,
            log_scale(shares),
            f"Share of {what} on a patch, layer {layer} (logarithmic)",
            tick_percent,
        ),
    )


@dataclass(frozen=True)
class LayerMaps:
    """One image at one layer.

    Attributes:
        found: where the numbers are.
        i: which image.
        layer: which layer.
    """

    found: Measurement
    i: int
    layer: int

    def norms(self, when: When) -> NDArray[np.float32]:
        """Norms of the patches: (rows, cols)."""
        return self._grid(self._state(when).norms, self.layer)

    def attention(self, when: When) -> NDArray[np.float32]:
        """Shares of the attention on the patches: (rows, cols)."""
        return self._grid(self._state(when).attention, self.layer)

    def outliers(self, when: When) -> NDArray[np.bool_]:
        """The outlier tokens, which are those of the detection layer: (rows, cols)."""
        norms = self._grid(self._state(when).norms, self.found.manifest.detection_layer)
        return np.asarray(norms > self.found.manifest.threshold)

    def register_share(self) -> float:
        """Share of the attention on the registers or the constants in their place, after."""
        return self.found.samples[self.i].effect.register_attention[self.layer]

    def norms_note(self, when: When) -> str:
        """The figures of a norm map."""
        norms = self.norms(when)
        return _note(
            ("largest", short(float(norms.max()))), ("median", short(float(np.median(norms))))
        )

    def attention_note(self, when: When) -> str:
        """The figures of an attention map."""
        shares = self.attention(when)
        if when == "before":
            other = ("outliers", float(shares[self.outliers(when)].sum()))
        else:
            other = (stand_in(self.found.manifest.variant), self.register_share())
        return _note(("patches", percent(float(shares.sum()))), (other[0], percent(other[1])))

    def _state(self, when: When) -> State:
        return self.found.before if when == "before" else self.found.after

    def _grid(self, values: NDArray[np.float32], layer: int) -> NDArray[np.float32]:
        patches = values[self.i, layer, self.found.patches]
        return patches.reshape(self.found.manifest.tokens.grid)


def outline(marked: NDArray[np.bool_]) -> str:
    """The borders between marked patches and others, as the ``d`` of an SVG path.

    Args:
        marked: (rows, cols).
    """
    path = []
    padded = np.pad(marked, 1)
    for row, col in np.argwhere(marked).tolist():
        around = padded[row : row + 3, col : col + 3]
        sides = {
            f"M{col},{row}h1": around[0, 1],
            f"M{col},{row + 1}h1": around[2, 1],
            f"M{col},{row}v1": around[1, 0],
            f"M{col + 1},{row}v1": around[1, 2],
        }
        path += [side for side, neighbour in sides.items() if not neighbour]
    return "".join(path)


def numbers_of(values: NDArray[np.float32]) -> str:
    """The values of a map in row order, for a script that reads them out."""
    return " ".join(f"{value:.4g}" for value in values.ravel())


def _note(*figures: tuple[str, str]) -> str:
    # A line breaks between two figures, not between a figure and its name.
    return ", ".join(f"{name}\u00a0{number}" for name, number in figures)
