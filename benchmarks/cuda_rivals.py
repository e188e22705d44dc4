"""The rivals of ``benchmarks.cuda_overhead``: regraft's graphs, and PyTorch; each is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import vits
from benchmarks.cuda_graphs import (
    BASELINE,
    CONSTANT,
    OUTPUT,
    PER_NEURON,
    Array,
    Form,
    check_error,
    enough_runs,
    open_cuda,
)
from benchmarks.cuda_rounds import Rival
from regraft.neurons import Neurons
from regraft_export.graph.cuda.choices import Choices
from regraft_export.register_constants import RegisterConstants
from regraft_export.trace import DTYPES
from regraft_export.vit.hooks import redirected, register_replaced
from regraft_export.vit.structure import VisionTransformer

KV, OWN_KV = "variant kv", "variant kv, operators"
OWN = Choices(operators=True)
OWN_BASELINE = "baseline, operators"
FORMS = {
    BASELINE: Form(None),
    "patched": Form(PER_NEURON),
    "constant": Form(CONSTANT),
    KV: Form(PER_NEURON, kv=True),
    OWN_BASELINE: Form(None, OWN),
    "patched, operators": Form(PER_NEURON, OWN),
    "constant, operators": Form(CONSTANT, OWN),
    OWN_KV: Form(PER_NEURON, OWN, kv=True),
}
LITERAL = "literal"
BASES = (BASELINE, OWN_BASELINE)  # what all others are compared with
HOOKS, EAGER, COMPILED = "PyTorch with hooks", "PyTorch unpatched", "torch.compile unpatched"
_SAME = {LITERAL: "patched", HOOKS: "patched", EAGER: BASELINE, COMPILED: BASELINE}  # in result
# What the aims are about, opened several times: see benchmarks.cuda_rounds.
OPENED = (OWN_BASELINE, "patched, operators", "constant, operators")


class Rivals:
    """What runs one batch of one model.

    Attributes:
        memory: name -> MiB of the card's memory that it took.
        errors: name -> relative Frobenius error against PyTorch with hooks in float32.
        details: of the engine.
        graphs: name -> a graph for ``ort-cuda``, as often as it is open.
    """

    def __init__(
        self,
        folder: Path,
        vit: VisionTransformer,
        neurons: Neurons,
        batch: int,
        precision: str,
        openings: int,
    ) -> None:
        self._folder, self._vit, self._neurons = folder, vit, neurons
        self._batch, self._precision, self._openings = batch, precision, openings
        drawn = np.random.default_rng(batch).normal(size=(batch, 3, *vits.image_size(vit)))
        self._pixels: Array = drawn.astype(np.float32)
        self._exact = torch.from_numpy(self._pixels).cuda()
        self._tensor = self._exact.to(DTYPES[precision])
        self._right: dict[Form, Array] = {}
        self.memory: dict[str, float] = {}
        self.errors: dict[str, float] = {}
        self.details: dict[str, str] = {}
        self.graphs: dict[str, list[Rival]] = {}

    def graph(self, stack: ExitStack, name: str) -> Rival:
        """One of the graphs for ``ort-cuda``, opened as often as it is to be."""
        with ExitStack() as opened:
            often = self._openings if name in OPENED else 1
            same = [self._opened(opened, name) for _ in range(often)]
            stack.enter_context(opened.pop_all())
        self.graphs[name] = same
        return same[0]

    def torch(self, stack: ExitStack, name: str) -> Rival:
        """PyTorch in the same precision: with hooks, unpatched, or unpatched but compiled."""
        tensor = self._tensor
        before = torch.cuda.memory_allocated()
        with ExitStack() as opened:
            vit = copy.deepcopy(self._vit)
            vit.module.to(tensor.dtype)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run = _forward(vit.module)
            if name == HOOKS:
                opened.enter_context(redirected(vit, self._neurons))
            if name == COMPILED:
                torch._dynamo.reset()
                run = torch.compile(run, mode="reduce-overhead")
            else:
                run = torch.inference_mode()(run)  # which torch.compile does not take everywhere
            for _ in range(3):
                features, _ = run(tensor)
            self.memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            self._check(name, features.float().cpu().numpy())
            stack.enter_context(opened.pop_all())
        return _on_card(run, tensor)

    def _opened(self, stack: ExitStack, name: str) -> Rival:
        with ExitStack() as opened:
            free = torch.cuda.mem_get_info()[0]
            engine = opened.enter_context(open_cuda(self._folder, name, self._precision))
            got = engine.run(self._pixels, [OUTPUT])[OUTPUT]
            engine.device_seconds(self._batch, 2)
            self.memory.setdefault(name, (free - torch.cuda.mem_get_info()[0]) / 2**20)
            self._check(name, got)
            self.details = self.details or engine.details()
            enough_runs(engine, self._batch)
            stack.enter_context(opened.pop_all())
        return partial(engine.device_seconds, self._batch)

    def _check(self, name: str, got: Array) -> None:
        error = check_error(name, got, self._right_of(name), self._precision)
        self.errors[name] = max(error, self.errors.get(name, 0.0))

    def _right_of(self, name: str) -> Array:
        """What it must yield, by PyTorch with hooks in float32 on the card."""
        form = FORMS[_SAME.get(name, name)]
        form = replace(form, choices=Choices())  # they change no result
        if form not in self._right:
            context: AbstractContextManager[None] = nullcontext()
            if form.kv:
                constants = constants_of(self._vit, self._neurons)
                context = register_replaced(self._vit, self._neurons.neurons, constants)
            elif form.redirect is not None:
                context = redirected(self._vit, self._neurons, form.redirect)
            with torch.inference_mode(), context:
                parts = [_features(self._vit.module, p) for p in torch.split(self._exact, 8)]
            self._right[form] = np.concatenate(parts)
        return self._right[form]


def base_of(name: str) -> str:
    """What a rival is compared with: an unpatched graph that has operators if it has."""
    return OWN_BASELINE if name.endswith(", operators") else BASELINE


def constants_of(vit: VisionTransformer, neurons: Neurons) -> RegisterConstants:
    """The kv variant's, drawn at random, from the block after the first touched one on."""
    return vits.some_constants(vit, min(neurons.layers) + 1)


def _features(module: Any, tensor: Tensor) -> Array:
    return np.asarray(module.forward_features(tensor).float().cpu().numpy())


def _forward(module: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The model's forward, which also returns the features: what is timed is what is checked."""

    def run(tensor: Tensor) -> tuple[Tensor, Tensor]:
        features = module.forward_features(tensor)
        return features, module.forward_head(features)

    return run


def _on_card(run: Callable[[Tensor], Any], tensor: Tensor) -> Rival:
    def seconds(runs: int) -> float:
        event: Any = torch.cuda.Event
        start, stop = (event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(runs):
            run(tensor)
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / runs

    return seconds
