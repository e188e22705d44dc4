"""The variant kv in models that give positions inside attention: graph and hooks agree."""

from __future__ import annotations

import onnx
import pytest
from tests.support import constants as support
from tests.support import graphs, models, pictures, traces
from tests.support.families import planted_module, units_of
from tests.support.small_families import SMALL

from regraft.neurons import Neurons, RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft_export.graph.patch import Patch, Wanted, build
from regraft_export.reference import PyTorchReference
from regraft_export.trace import trace
from regraft_export.vit.structure import from_module


@pytest.mark.parametrize("name", [name for name, family in SMALL.items() if family.rotary])
def test_a_rotary_model_with_constants_equals_pytorch(name: str) -> None:
    family = SMALL[name]
    size = (family.size, family.size)
    vit = from_module(models.livened(family.visual(planted_module(family))).eval(), size)
    neurons = Neurons(tuple(RegisterNeuron(*unit) for unit in units_of(family)))
    chosen = support.drawn(vit, first=1)
    traced = trace(vit, size)
    pixels = pictures.pixels(2, size)
    reference = PyTorchReference(vit, neurons, RedirectOptions(), chosen)
    for kind, wanted in (("model", Wanted()), ("probe", Wanted(probe=True))):
        built = build(traced, Patch(neurons, RedirectOptions(), chosen), wanted)
        onnx.checker.check_model(built.proto, full_check=True)
        found = graphs.run(built.proto, {"pixel_values": pixels})
        for output, value in reference.run(kind, pixels, list(found)).items():
            assert traces.error(found[output], value) < 1e-5, (kind, output)
