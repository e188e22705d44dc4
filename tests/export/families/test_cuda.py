"""The graphs for ort-cuda in every family: equal to the portable ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.support import constants, graphs, models, pictures, traces
from tests.support.families import cases, planted_module, units_of
from tests.support.small_families import SMALL

from regraft.neurons import Neurons, RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft_export.graph.cuda.fuse import fuse, prepare, why_not_fused
from regraft_export.graph.patch import Patch, Wanted, build
from regraft_export.trace import trace
from regraft_export.vit.structure import from_module


@pytest.mark.parametrize("name", cases(SMALL))
def test_the_fused_graph_gives_the_same_features(name: str) -> None:
    family = SMALL[name]
    size = (family.size, family.size)
    vit = from_module(models.livened(family.visual(planted_module(family))).eval(), size)
    neurons = Neurons(tuple(RegisterNeuron(*unit) for unit in units_of(family)))
    traced = trace(vit, size)
    prepared = prepare(traced)
    pixels = {"pixel_values": pictures.pixels(2, size)}
    token = Patch(neurons, RedirectOptions())
    kv = replace(token, constants=constants.drawn(vit))
    for patch in (None, token, kv):
        fused = fuse(prepared, patch, Wanted())
        assert why_not_fused(fused, vit.layout.depth) == ""
        found = graphs.run_whole(fused.proto, pixels)
        right = graphs.run(build(traced, patch, Wanted()).proto, pixels)
        assert set(found) == set(right)
        for output, value in right.items():
            assert traces.error(found[output], value) < 1e-5, (patch, output)
