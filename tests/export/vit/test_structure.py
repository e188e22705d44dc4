from __future__ import annotations

import re

import pytest
import timm
import torch
import transformers as tf
from tests.support.handmade_vit import CONFIG, WIDTH, Block, HandmadeVit, not_a_vit
from tests.support.models import FAMILIES, vit
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft_export.vit.structure import from_module, pooled_of

SIZE = (32, 32)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_of_every_family_are_found(name: str) -> None:
    family, found = FAMILIES[name], vit(name)
    names = {module: name for name, module in found.module.named_modules()}
    layout = found.layout
    assert (layout.grid, layout.prefix, layout.class_token) == (
        family.grid,
        family.prefix,
        family.class_token,
    )
    assert (layout.width, layout.depth, layout.heads) == (48, len(found.blocks), 3)
    assert layout.test_time_registers == 0
    assert names[found.entry].endswith(family.entry)
    assert names[found.final].endswith(family.final)
    for block in found.blocks:
        assert (block.down.in_features, block.down.out_features) == (family.hidden, 48)
        assert (block.scale is not None) == family.scaled
        gamma = 1 if block.scale is None else block.scale
        torch.testing.assert_close(block.write, block.down.weight.T * gamma)
    pooled = pooled_of(found.module(torch.zeros(2, 3, *family.size)))
    assert (None if pooled is None else tuple(pooled.shape[1:])) == family.pooled


@pytest.mark.parametrize("name", ["timm_layer_scale", "timm_swiglu", "hf_dinov2_swiglu"])
def test_the_scale_is_the_one_after_the_mlp(name: str) -> None:
    # Each block has two; a unit's contribution to the residual stream tells them apart.
    found = vit(name)
    block = found.blocks[1]
    x = torch.randn(1, found.layout.count, 48, generator=torch.Generator().manual_seed(3))

    def output(more: float) -> Tensor:
        def push(m: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            h = args[0].clone()
            h[:, :, 5] += more
            return (h,)

        handle = block.down.register_forward_pre_hook(push)
        result = block.module(x)
        handle.remove()
        return result[0] if isinstance(result, tuple) else result

    written = (output(1.0) - output(0.0))[0, 2]
    torch.testing.assert_close(written, block.write[5], rtol=1e-3, atol=1e-5)


def test_blocks_are_in_the_order_they_run() -> None:
    found = vit("timm")
    order: list[int] = []
    handles = [
        block.module.register_forward_hook(lambda *_, i=i: order.append(i))
        for i, block in enumerate(found.blocks)
    ]
    found.module(torch.zeros(1, 3, *FAMILIES["timm"].size))
    for handle in handles:
        handle.remove()
    assert order == [0, 1, 2]


def test_looking_leaves_no_hook_behind() -> None:
    found = vit("timm_clip")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.module.modules())


def test_a_grid_that_is_not_square_is_rows_by_columns() -> None:
    module = timm.create_model(
        "vit_tiny_patch16_224", img_size=(64, 32), patch_size=(8, 16), depth=2
    ).eval()
    assert from_module(module, (64, 32)).layout.grid == (8, 2)


def refusal(module: nn.Module, size: tuple[int, int] = SIZE) -> str:
    with pytest.raises(ModelError) as caught:
        from_module(module.eval(), size)
    return str(caught.value)


def test_a_convolutional_network_is_refused() -> None:
    message = refusal(timm.create_model("resnet18", num_classes=0))
    assert message == (
        "ResNet: no stack of equal transformer blocks was found; looked for a ModuleList or "
        "Sequential of at least two blocks of one class, each with an MLP whose last Linear maps "
        "more hidden units to the width"
    )


def test_a_single_block_is_no_stack() -> None:
    module = HandmadeVit()
    module.layers = module.layers[:1]
    assert "no stack of equal transformer blocks was found" in refusal(module)


def test_a_text_and_a_vision_tower_together_are_refused() -> None:
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    small |= {"intermediate_size": 96}
    config = tf.CLIPConfig(
        text_config=tf.CLIPTextConfig(**small).to_dict(),
        vision_config=tf.CLIPVisionConfig(**small, image_size=32, patch_size=8).to_dict(),
    )
    message = refusal(tf.CLIPModel(config))
    assert message.startswith("CLIPModel: 2 stacks of transformer blocks ('text_model.")
    assert "'vision_model." in message
    assert "; expected one: hand in a single vision tower" in message


def test_a_swin_is_refused() -> None:
    module = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7)
    message = refusal(module, (56, 56))
    assert message.startswith(
        "SwinTransformer: 5 stacks of transformer blocks ('layers', 'layers.0"
    )


def test_further_tensors_beside_the_tokens_are_refused() -> None:
    class Biased(HandmadeVit):
        def forward(self, pixels: Tensor) -> Tensor:
            x = self.cut(pixels).flatten(2).transpose(1, 2)
            for layer in self.layers:
                x = layer(x, torch.zeros(16, 16))
            return x

    class Taking(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return self.block(x)

    module = Biased()
    module.layers = nn.ModuleList(Taking(block) for block in module.layers)
    assert refusal(module) == (
        "this model gives its blocks further tensors beside the tokens (argument 2); expected "
        "none, or tables of cosines and sines with one row for each of the 16 patches (rotary "
        "positions): an appended register would lack an entry in anything else, and a relative "
        "position bias has no neutral value to give it"
    )


def test_a_norm_after_the_residual_sum_is_refused() -> None:
    class PostNorm(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.before_mlp(super().forward(x))

    module = HandmadeVit()
    module.layers = nn.ModuleList(PostNorm() for _ in module.layers)
    assert refusal(module) == (
        "block 0 (PostNorm): what its MLP writes is changed by more than one factor per channel "
        "before it reaches the next block (a norm after the residual sum?); expected "
        "x + gamma * MLP(norm(x))"
    )


def test_a_scale_that_is_a_bare_parameter_of_the_block_is_found() -> None:
    class Scaled(Block):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.rand(WIDTH))
            self.second = nn.Parameter(torch.rand(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first * self.attention(self.before_attention(x))
            written = self.narrow(nn.functional.gelu(self.widen(self.before_mlp(x))))
            return x + written.mul_(self.second)

    module = HandmadeVit()
    module.layers = nn.ModuleList(Scaled() for _ in module.layers)
    for block, own in zip(from_module(module.eval(), SIZE).blocks, module.layers, strict=True):
        assert block.scale is not None
        torch.testing.assert_close(block.scale, own.second)


def test_two_narrowing_layers_in_a_block_are_refused() -> None:
    module = HandmadeVit()
    for block in module.layers:
        block.second = nn.Linear(96, 48)
    assert refusal(module) == (
        "block 0 (Block): 2 Linear layers map more inputs to the width 48; expected exactly one, "
        "the MLP's down-projection"
    )


def test_a_narrowing_layer_to_another_width_is_no_down_projection() -> None:
    module = HandmadeVit()
    for block in module.layers:
        block.side = nn.Linear(96, 8)
    assert from_module(module.eval(), SIZE).blocks[0].down is module.layers[0].narrow


def test_a_model_without_a_patch_convolution_is_refused() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3 * 64, 48)
            self.layers = HandmadeVit().layers

        def forward(self, pixels: Tensor) -> Tensor:
            x = nn.functional.pixel_unshuffle(pixels, 8).flatten(2).transpose(1, 2)
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x)
            return x

    assert refusal(Linear()) == (
        "no convolution cuts the image into at most 16 patches (grids seen: none); expected a "
        "patch embedding in front of the blocks"
    )


def test_blocks_that_run_twice_are_refused() -> None:
    class Twice(HandmadeVit):
        def forward(self, pixels: Tensor) -> Tensor:
            super().forward(pixels)
            return super().forward(pixels)

    assert refusal(Twice()) == (
        "Twice: its 4 blocks ran 8 times in one forward pass; expected each once"
    )


def test_blocks_that_change_the_token_count_are_refused() -> None:
    class Shrinking(HandmadeVit):
        def forward(self, pixels: Tensor) -> Tensor:
            x = self.cut(pixels).flatten(2).transpose(1, 2)
            for layer in self.layers:
                x = layer(x)[:, 1:]
            return x

    # The last block sees three tokens fewer than the first.
    assert refusal(Shrinking()) == (
        "Shrinking: its blocks map (1, 16, 48) to (1, 13, 48); expected tokens (B, T, D) throughout"
    )


def test_a_model_that_crashes_is_refused_with_its_own_words() -> None:
    class Broken(HandmadeVit):
        def forward(self, pixels: Tensor) -> Tensor:
            raise KeyError("no such thing")

    assert refusal(Broken(), (32, 40)) == (
        "Broken: does not run on a batch of shape (1, 3, 32, 40): 'no such thing'; is it made for "
        "another --image-size?"
    )


def test_a_model_for_another_image_size_is_refused() -> None:
    message = refusal(HandmadeVit(), (48, 48))
    assert re.match(r"HandmadeVit: does not run on a batch of shape \(1, 3, 48, 48\): ", message)


def test_attention_that_does_not_tell_its_heads_is_refused() -> None:
    module = HandmadeVit()
    for block in module.layers:
        del block.attention.num_heads
    assert refusal(module) == (
        "Block: no module of the block has num_heads or num_attention_heads; expected its "
        "attention to say how many heads it has"
    )


def test_something_without_blocks_is_refused() -> None:
    assert "no stack of equal transformer blocks" in refusal(not_a_vit()[0])


def test_the_handmade_config_is_complete() -> None:
    names = {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    assert set(CONFIG) == names


def test_what_a_forward_returns_for_an_image() -> None:
    embedding, tokens = torch.zeros(2, 8), torch.zeros(2, 5, 8)
    assert pooled_of(embedding) is embedding
    assert pooled_of((embedding, tokens)) is embedding
    assert pooled_of(tokens) is None
    assert pooled_of([embedding]) is None
    output = tf.modeling_outputs.BaseModelOutputWithPooling(tokens, embedding)
    assert pooled_of(output) is embedding
    assert pooled_of(tf.modeling_outputs.BaseModelOutput(tokens)) is None
