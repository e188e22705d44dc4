"""PyTorch with hooks as the reference of a verification, float32, each image by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.bundle import Bundle
from regraft.errors import InputError
from regraft.neurons import Neurons
from regraft.redirect import RedirectOptions
from regraft_export.register_constants import RegisterConstants
from regraft_export.sources import load
from regraft_export.vit.hooks import redirected, register_replaced
from regraft_export.vit.observe import Observation, observe
from regraft_export.vit.structure import VisionTransformer, from_module


class PyTorchReference:
    """Yields what the graphs of a bundle must yield.

    Args:
        vit: the model, float32.
        neurons: the register neurons.
        options: of the redirect.
        constants: of the variant kv; without them the variant is token.
    """

    name = "PyTorch with hooks, float32"

    def __init__(
        self,
        vit: VisionTransformer,
        neurons: Neurons,
        options: RedirectOptions,
        constants: RegisterConstants | None = None,
    ) -> None:
        self.vit, self.neurons, self.options, self.constants = vit, neurons, options, constants

    def run(
        self, graph: str, pixels: NDArray[np.float32], outputs: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        """The named outputs of ``model``, ``baseline``, ``probe`` or ``probe_baseline``."""
        with torch.no_grad(), self._hooks(graph in ("model", "probe")):
            seen = observe(
                self.vit,
                torch.from_numpy(pixels).to(self.vit.device),
                layers=_layers(outputs, ("hidden", "norms")),
                attentions=_layers(outputs, ("attentions",)),
            )
        probe = graph.startswith("probe")
        return {name: self._output(seen, name, probe).cpu().numpy() for name in outputs}

    def _hooks(self, patched: bool) -> AbstractContextManager[None]:
        if not patched:
            return nullcontext()
        if self.constants is not None:
            return register_replaced(self.vit, self.neurons.neurons, self.constants)
        return redirected(self.vit, self.neurons, self.options)

    def _output(self, seen: Observation, name: str, probe: bool) -> Tensor:
        layout = self.vit.layout
        kind, _, layer = name.partition(".")
        if kind == "hidden":
            return seen.hidden[int(layer)][:, : layout.count]
        if kind == "norms":
            norms: Tensor = torch.linalg.vector_norm(seen.hidden[int(layer)], dim=-1)
            return norms
        if kind == "attentions":
            attention = seen.attention[int(layer)]
            if probe:
                return attention
            patches = attention[:, :, layout.prefix : layout.count]
            return patches.reshape(*patches.shape[:2], *layout.grid)
        if kind == "test_time_registers":
            return seen.registers
        if kind == "pooler_output":
            assert seen.pooled is not None  # the graph has this output because the model has it
            return seen.pooled
        return seen.last_hidden_state


def _layers(outputs: Sequence[str], kinds: tuple[str, ...]) -> set[int]:
    named = (name.partition(".") for name in outputs)
    return {int(layer) for kind, _, layer in named if kind in kinds}


@contextmanager
def open_reference(bundle: Bundle, model: str, weights: Path | None) -> Iterator[PyTorchReference]:
    """The reference of ``regraft verify BUNDLE --model MODEL``.

    Raises:
        ModelError: MODEL cannot be loaded.
        InputError: it is another model than the bundle's.
    """
    # The bundle's own preprocessing is what runs; the model need not bring any.
    loaded = load(model, weights=weights, preprocessing=bundle.manifest.preprocessing)
    made_from = bundle.manifest.model
    if loaded.weights_sha256 != made_from["weights_sha256"]:
        raise InputError(
            f"{model} has weights {loaded.weights_sha256[:12]}..., the bundle was made from "
            f"{made_from['source']} with weights {made_from['weights_sha256'][:12]}...; "
            "give the model the bundle was made from"
        )
    vit = from_module(loaded.module, bundle.manifest.image_size)
    kv = bundle.manifest.variant == "kv"
    constants = RegisterConstants.load(bundle.path) if kv else None
    yield PyTorchReference(vit, bundle.neurons(), bundle.manifest.redirect, constants)
