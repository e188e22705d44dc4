from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support import algorithm2, models, pictures
from torch import Tensor, nn

from regraft.errors import ModelError, NeuronsError
from regraft.neurons import Neurons, RegisterNeuron
from regraft.redirect import RedirectOptions
from regraft_export.vit.hooks import redirected, registers_appended, silenced
from regraft_export.vit.observe import observe
from regraft_export.vit.structure import VisionTransformer, from_module

OPTIONS = [
    RedirectOptions(value, cls, patches, registers, (1.0, -0.5)[:registers])
    for value, cls, patches, registers in itertools.product(
        ("per-neuron", "per-layer", "constant"),
        ("zero", "keep"),
        ("zero", "mean", "only-outliers", "keep"),
        (1, 2),
    )
]
OTHERS = ("timm_without_class_token", "timm_trained_registers", "timm_swiglu", "hf_clip")
# Every option on one family, a seventh of the combinations on each of the others.
CASES = [("timm", options) for options in OPTIONS]
CASES += [(name, options) for i, name in enumerate(OTHERS) for options in OPTIONS[i::7]]


def named(options: RedirectOptions) -> str:
    return f"{options.value}, {options.cls}, {options.patches}, {options.registers}"


def pictured(name: str, count: int = 5) -> Tensor:
    return torch.from_numpy(pictures.pixels(count, models.FAMILIES[name].size))


@contextmanager
def activations(vit: VisionTransformer, layers: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """What the down-projections read, under whatever hooks are there already."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> object:
        def hook(m: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[layer] = args[0].detach().clone()

        return hook

    handles = [vit.blocks[i].down.register_forward_pre_hook(keep(i)) for i in layers]
    yield seen
    for handle in handles:
        handle.remove()


def far(a: NDArray[np.floating] | Tensor, b: NDArray[np.floating] | Tensor) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else named(v)
)
def test_the_hooks_are_algorithm_2(name: str, options: RedirectOptions) -> None:
    vit = models.vit(name)
    neurons, layout = models.neurons(vit), vit.layout
    every = (0, 1, 2)
    with (
        activations(vit, every) as before,
        redirected(vit, neurons, options),
        activations(vit, every) as after,
    ):
        vit.module(pictured(name, 3))
    assert before[1].shape[1] == layout.count + options.registers
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)  # an untouched layer
    for layer in (0, 2):
        expected = algorithm2.redirect(
            before[layer].numpy(),
            neurons.of(layer),
            options,
            prefix=layout.prefix,
            patches=layout.patches,
            class_token=layout.class_token,
        )
        assert far(after[layer], expected) < 1e-6
        assert far(after[layer], before[layer]) > 1e-3  # the options do something


def test_algorithm_2_by_hand() -> None:
    # CLS, two patches, a register; two units, of which the first is redirected.
    h = np.array([[[1.0, 9], [2, 9], [5, 9], [3, 9]]])
    neuron = [RegisterNeuron(0, 0)]
    layout = {"prefix": 1, "patches": 2, "class_token": True}
    result = algorithm2.redirect(h, neuron, RedirectOptions(), **layout)
    assert result.tolist() == [[[0, 9], [0, 9], [0, 9], [5, 9]]]
    negative = [RegisterNeuron(0, 0, sign=-1)]
    result = algorithm2.redirect(h, negative, RedirectOptions(cls="keep"), **layout)
    assert result.tolist() == [[[1, 9], [0, 9], [0, 9], [1, 9]]]


@pytest.mark.parametrize("name", ["timm", "timm_siglip", "hf_dinov2_registers"])
@pytest.mark.parametrize(
    "options",
    [
        RedirectOptions(),
        RedirectOptions("per-layer", "keep", "only-outliers", 2, (1.0, 0.5)),
        RedirectOptions("constant", patches="mean"),
    ],
    ids=named,
)
def test_a_batch_of_different_images_equals_the_singles(
    name: str, options: RedirectOptions
) -> None:
    vit, pixels = models.vit(name), pictured(name)
    depth = range(vit.layout.depth)
    with redirected(vit, models.neurons(vit), options):
        batch = observe(vit, pixels, layers=depth, attentions=depth)
        singles = [observe(vit, image[None], layers=depth, attentions=depth) for image in pixels]
    values = [s.last_hidden_state for s in singles]
    assert far(batch.last_hidden_state, torch.cat(values)) < 1e-5
    assert far(batch.registers, torch.cat([s.registers for s in singles])) < 1e-5
    assert far(batch.pooled, torch.cat([s.pooled for s in singles])) < 1e-5
    for i in depth:
        assert far(batch.hidden[i], torch.cat([s.hidden[i] for s in singles])) < 1e-5
        assert far(batch.attention[i], torch.cat([s.attention[i] for s in singles])) < 1e-5
    assert far(values[0], values[1]) > 0.01  # the images do differ


@pytest.mark.parametrize("name", models.FAMILIES)
def test_registers_enter_as_zeros_and_are_gone_before_anything_pools(name: str) -> None:
    vit, pixels = models.vit(name), pictured(name, 2)
    count = vit.layout.count
    seen: list[Tensor] = []

    def look(m: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values())))

    with registers_appended(vit, 3):
        handle = vit.entry.register_forward_pre_hook(look, with_kwargs=True)
        patched = observe(vit, pixels)
        handle.remove()
    baseline = observe(vit, pixels)
    assert seen[0].shape[1] == count + 3
    assert not seen[0][:, count:].any()
    assert seen[0][:, :count].any()
    assert patched.registers.shape == (2, 3, 48)
    assert patched.last_hidden_state.shape == baseline.last_hidden_state.shape
    assert patched.pooled.shape == baseline.pooled.shape
    assert baseline.registers.shape == (2, 0, 48)
    # What pools is the same function of the tokens that leave the network.
    assert not torch.equal(patched.last_hidden_state, baseline.last_hidden_state)


def test_average_pooling_does_not_see_the_register() -> None:
    vit, pixels = models.vit("timm_average_pool"), pictured("timm_average_pool")
    with redirected(vit, models.neurons(vit)):
        seen = observe(vit, pixels)
    pooled = vit.module.forward_head(seen.last_hidden_state)
    torch.testing.assert_close(seen.pooled, pooled)


def test_attention_goes_from_cls_to_every_token() -> None:
    vit, pixels = models.vit("timm"), pictured("timm", 2)
    with registers_appended(vit, 2):
        seen = observe(vit, pixels, layers=[0], attentions=[1])
    attention = vit.blocks[1].module.attn
    x = vit.blocks[1].module.norm1(seen.hidden[0])
    q, k, _ = attention.qkv(x).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    expected = (q[:, :, :1] @ k.transpose(2, 3) / 4).softmax(dim=-1)[:, :, 0]
    assert seen.attention[1].shape == (2, 3, vit.layout.count + 2)
    torch.testing.assert_close(seen.attention[1], expected, rtol=1e-4, atol=1e-6)


def test_without_a_class_token_the_mean_attention_of_the_patches_is_taken() -> None:
    vit, pixels = models.vit("timm_siglip"), pictured("timm_siglip", 2)
    with registers_appended(vit, 1):
        seen = observe(vit, pixels, layers=[0], attentions=[1])
    attention = vit.blocks[1].module.attn
    x = vit.blocks[1].module.norm1(seen.hidden[0])
    q, k, _ = attention.qkv(x).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    every = (q @ k.transpose(2, 3) / 4).softmax(dim=-1)
    expected = every[:, :, : vit.layout.count].mean(dim=2)  # registers do not ask
    torch.testing.assert_close(seen.attention[1], expected, rtol=1e-4, atol=1e-6)


def unfused(name: str) -> VisionTransformer:
    """The model with its attention written out in plain products and a softmax."""
    module = copy.deepcopy(models.vit(name).module)
    if name.startswith("hf"):
        module.set_attn_implementation("eager")
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return from_module(module, models.FAMILIES[name].size)


@pytest.mark.parametrize("name", ["timm", "timm_siglip", "hf_dinov2", "hf_clip"])
def test_attention_that_is_not_fused_is_seen_too(name: str) -> None:
    pixels, found = pictured(name, 2), []
    for vit in (models.vit(name), unfused(name)):
        with registers_appended(vit, 1):
            found.append(observe(vit, pixels, attentions=range(3)).attention)
    fused, plain = found
    assert fused.keys() == plain.keys() == {0, 1, 2}
    for layer, attention in fused.items():
        torch.testing.assert_close(attention, plain[layer], rtol=1e-4, atol=1e-6)


def test_attention_that_is_not_seen_is_an_error() -> None:
    vit = unfused("timm")

    def forward(x: Tensor, **other: object) -> Tensor:
        return x

    vit.blocks[2].module.attn.forward = forward
    with pytest.raises(
        ModelError,
        match=r"^block 2 \(Block\): its attention was not seen; expected a call of "
        r"scaled_dot_product_attention or nn\.MultiheadAttention, or a softmax of shape "
        r"\(B, heads, tokens, tokens\)$",
    ):
        observe(vit, pictured("timm", 1), attentions=[0, 2])


def hook_count(vit: VisionTransformer) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vit.module.modules())


@pytest.mark.parametrize("name", ["timm", "hf_clip"])
def test_hooks_are_gone_afterwards(name: str) -> None:
    vit, pixels = models.vit(name), pictured(name, 1)
    neurons = models.neurons(vit)
    before = observe(vit, pixels)
    with redirected(vit, neurons):
        assert hook_count(vit) == 4  # entry, final and two layers
    with silenced(vit, neurons.neurons):
        assert hook_count(vit) == 2
    with pytest.raises(ZeroDivisionError), redirected(vit, neurons):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), silenced(vit, neurons.neurons):
        raise ZeroDivisionError
    with pytest.raises((AssertionError, ValueError)):
        observe(vit, torch.zeros(1, 3, 7, 7), layers=[0], attentions=[0])
    assert hook_count(vit) == 0
    after = observe(vit, pixels)
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)


def test_hooks_are_gone_when_a_layer_cannot_be_hooked() -> None:
    vit = models.vit("timm")
    neurons = Neurons((RegisterNeuron(0, 1, value=1.0), RegisterNeuron(2, 1)))
    with pytest.raises(NeuronsError), redirected(vit, neurons, RedirectOptions("constant")):
        pass
    assert hook_count(vit) == 0


def test_a_constant_value_needs_recorded_values() -> None:
    vit = models.vit("timm")
    neurons = Neurons((RegisterNeuron(2, 1),))
    with (
        pytest.raises(NeuronsError) as caught,
        redirected(vit, neurons, RedirectOptions("constant")),
    ):
        pass
    assert str(caught.value) == (
        "value = constant needs the `value` of every neuron; this list has none for layer 2 "
        "(written by hand?): run `regraft find`, or use value = per-neuron"
    )


def test_silenced_neurons_are_zero_and_no_register_exists() -> None:
    vit, pixels = models.vit("timm"), pictured("timm", 2)
    chosen = models.neurons(vit).neurons
    with (
        activations(vit, (0, 2)) as before,
        silenced(vit, chosen),
        activations(vit, (0, 2)) as after,
    ):
        observed = observe(vit, pixels)
    assert observed.registers.shape[1] == 0
    for layer in (0, 2):
        indices = [n.index for n in chosen if n.layer == layer]
        expected = before[layer].clone()
        assert expected[:, :, indices].abs().sum() > 0
        expected[:, :, indices] = 0
        assert torch.equal(after[layer], expected)


def test_the_inputs_of_the_model_are_not_written_to() -> None:
    vit, pixels = models.vit("timm"), pictured("timm", 2)
    copy = pixels.clone()
    with redirected(vit, models.neurons(vit)):
        first = observe(vit, pixels).last_hidden_state
        second = observe(vit, pixels).last_hidden_state
    assert torch.equal(pixels, copy)
    assert torch.equal(first, second)
