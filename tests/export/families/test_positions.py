"""An appended register leaves every other token at its position, or the model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers as tf
from tests.support.families import Family, cases, dead_neurons, planted_module
from tests.support.handmade_vit import Attention, HandmadeVit
from tests.support.models import livened
from tests.support.small_families import SMALL
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.errors import ModelError
from regraft_export.vit import hooks, positions
from regraft_export.vit.hooks import redirected
from regraft_export.vit.observe import observe
from regraft_export.vit.rotary import extended, is_rotary, tables_of
from regraft_export.vit.structure import VisionTransformer, from_module

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (32, 32)
ROTARY = [name for name, family in SMALL.items() if family.rotary]


def tower(name: str) -> tuple[VisionTransformer, Family]:
    family = SMALL[name]
    module = family.visual(planted_module(family))
    return from_module(module, (family.size, family.size)), family


@pytest.mark.parametrize("name", cases(SMALL))
def test_with_a_register_that_no_token_sees_nothing_changes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit, family = tower(name)
    T = vit.layout.count
    pixels = torch.randn(2, 3, family.size, family.size)
    with torch.no_grad():
        plain = observe(vit, pixels, layers=range(vit.layout.depth))
    fused = F.scaled_dot_product_attention

    def cut(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert k.shape[2] in (T, T + 1)  # a pooling head's keys are the tokens without register
        return fused(q, k[:, :, :T], v[:, :, :T], *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", cut)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), redirected(vit, dead_neurons()):
            more = observe(vit, pixels, layers=range(vit.layout.depth))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    for layer, tokens in plain.hidden.items():
        assert more.hidden[layer].shape[1] == T + 1
        torch.testing.assert_close(more.hidden[layer][:, :T], tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_tables_grow_by_rows_that_rotate_nothing(name: str) -> None:
    vit, family = tower(name)
    assert vit.rotary is not None
    patches = (family.size // family.patch) ** 2
    for value in vit.rotary.distinct():
        assert is_rotary(value, patches)
        grown = extended(value, 2)
        pairs = list(zip(tables_of(value), tables_of(grown), strict=True))
        for before, after in pairs:
            assert torch.equal(after[..., :patches, :], before)
        rows = [after[..., patches:, :] for _, after in pairs]
        if len(rows) == 1:  # timm: sines, then cosines
            rows = list(rows[0].chunk(2, dim=-1))[::-1]
        cos, sin = rows
        assert cos.shape[-2] == 2
        assert bool((cos == 1).all())
        assert bool((sin == 0).all())


@pytest.mark.parametrize("name", cases({n: f for n, f in SMALL.items() if not f.rotary}))
def test_models_without_rotary_positions_have_no_tables(name: str) -> None:
    assert tower(name)[0].rotary is None


def refusal(module: nn.Module, size: tuple[int, int] = SIZE) -> str:
    with pytest.raises(ModelError) as caught:
        from_module(livened(module), size)
    return str(caught.value)


REFUSED = (
    "models that give positions inside attention are taken where they hand their blocks tables of "
    "cosines and sines (rotary), and refused otherwise"
)


@pytest.mark.parametrize("name", ["hf_dinov3"])
def test_without_rows_for_the_register_every_patch_would_be_shifted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = SMALL[name]
    module = planted_module(family)
    monkeypatch.setattr(hooks, "extended", lambda value, registers: value)
    with pytest.raises(ModelError) as caught:
        from_module(module, (family.size, family.size))
    assert str(caught.value) == (
        "DINOv3ViTModel: with a register appended, block 0 gives its patches other positions (or "
        f"the model is not deterministic); {REFUSED}"
    )


def test_a_register_with_a_position_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = SMALL["hf_dinov3"]
    module = planted_module(family)

    def quarter(value: Any, registers: int) -> Any:
        cos, sin = extended(value, registers)
        cos[-registers:], sin[-registers:] = 0, 1
        return cos, sin

    monkeypatch.setattr(hooks, "extended", quarter)
    with pytest.raises(ModelError) as caught:
        from_module(module, (family.size, family.size))
    assert str(caught.value) == (
        "DINOv3ViTModel: block 0 gives an appended register a position of its own; " + REFUSED
    )


class CountsFromTheEnd(Attention):
    """Adds positions to queries and keys inside attention, without telling anybody."""

    def forward(self, x: Tensor) -> Tensor:
        T, D = x.shape[1:]
        place = torch.arange(T, 0, -1, dtype=x.dtype)[None, :, None] * torch.linspace(0, 1, D)
        return super().forward(x + 0.3 * torch.sin(place))


class FromTheLength(Attention):
    """Spreads positions over however many tokens there are."""

    def forward(self, x: Tensor) -> Tensor:
        place = torch.linspace(0, 3, x.shape[1])[None, :, None]
        return super().forward(x + torch.sin(place))


@pytest.mark.parametrize("kind", [CountsFromTheEnd, FromTheLength])
def test_positions_hidden_inside_attention_are_seen(kind: type[Attention]) -> None:
    module = HandmadeVit()
    for block in module.layers:
        block.attention = kind()
    assert refusal(module) == (
        "HandmadeVit: with a register appended, block 0 gives its patches other positions (or the "
        f"model is not deterministic); {REFUSED}"
    )


def test_a_model_that_shuffles_its_patches_is_refused() -> None:
    config = tf.ViTMAEConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        mask_ratio=0.0,
    )
    assert "(or the model is not deterministic)" in refusal(tf.ViTMAEModel(config))


BIAS = (
    "adds a bias to each pair of tokens inside attention (relative positions); there is no neutral "
    "value to give a register, because softmax ignores what is added to a whole row: any value "
    f"would be a guess; {REFUSED}"
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("beit_base_patch16_224", "Beit"),
        ("beitv2_base_patch16_224", "Beit"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
    ],
)
def test_a_relative_position_bias_is_refused(name: str, kind: str) -> None:
    module = timm.create_model(name, img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=0)
    assert refusal(module) == f"{kind}: block 0 {BIAS}"


@pytest.mark.parametrize("shared", [True, False])
def test_transformers_beit_is_refused(shared: bool) -> None:
    config = tf.BeitConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        use_relative_position_bias=not shared,
        use_shared_relative_position_bias=shared,
    )
    message = refusal(tf.BeitModel(config))
    if shared:
        assert message.startswith(
            "this model gives its blocks further tensors beside the tokens (attention_mask); "
            "expected none, or tables of cosines and sines with one row for each of the 16 patches"
        )
    else:
        assert message == f"BeitModel: block 0 {BIAS}"


def test_attention_that_is_not_seen_is_refused() -> None:
    class Own(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            weights = (q @ k.transpose(1, 2) / 7).exp()
            return self.out(weights / weights.sum(-1, keepdim=True) @ v)

    module = HandmadeVit()
    module.layers[2].attention = Own()
    assert refusal(module) == (
        "HandmadeVit: the attention of block 2 is not seen; expected "
        "scaled_dot_product_attention, nn.MultiheadAttention or a softmax over tokens, so that it "
        "can be proven that a register moves no patch"
    )


def test_a_softmax_of_the_models_own_is_seen() -> None:
    class Softmax(Attention):
        def forward(self, x: Tensor) -> Tensor:
            B, T, D = x.shape
            q, k, v = self.qkv(x).reshape(B, T, 3, 3, D // 3).permute(2, 0, 3, 1, 4)
            scores = q * 16**-0.5 @ k.transpose(-2, -1)
            return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, T, D))

    module = livened(HandmadeVit())
    with torch.no_grad():
        right = observe(from_module(module, SIZE), torch.ones(2, 3, *SIZE), attentions=[1])
    for block in module.layers:
        other = Softmax()
        other.load_state_dict(block.attention.state_dict())
        block.attention = other
    with torch.no_grad():
        seen = observe(from_module(module, SIZE), torch.ones(2, 3, *SIZE), attentions=[1])
    torch.testing.assert_close(seen.attention[1], right.attention[1])


def test_checking_leaves_no_hook_behind() -> None:
    vit, _ = tower("hf_dinov3")
    positions.check_positions(vit, (64, 64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.module.modules())
