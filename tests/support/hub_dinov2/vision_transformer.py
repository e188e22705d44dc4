"""DINOv2's Vision Transformer as its torch.hub models are structured."""

import torch
from torch import nn
from torch.nn import functional as F


class PatchEmbed(nn.Module):
    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.norm = nn.Identity()

    def forward(self, pixels):
        return self.norm(self.proj(pixels).flatten(2).transpose(1, 2))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads).unbind(2)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        return self.proj(mixed.transpose(1, 2).contiguous().view(B, T, D))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        hidden = (hidden * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width, heads, swiglu):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = (SwiGLU if swiglu else Mlp)(width, 4 * width)
        self.ls2 = LayerScale(width)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoVisionTransformer(nn.Module):
    """Returns the normalised class token."""

    def __init__(
        self,
        width,
        depth,
        heads,
        *,
        image_size=518,
        patch_size=14,
        swiglu=False,
        registers=0,
        antialias=None,
    ):
        super().__init__()
        self.patch_size, self.num_register_tokens = patch_size, registers
        # The models with registers resample their positions otherwise than those without.
        self.antialias = registers > 0 if antialias is None else antialias
        self.patch_embed = PatchEmbed(patch_size, width)
        side = image_size // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.blocks = nn.ModuleList(Block(width, heads, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, width))

    def interpolate_pos_encoding(self, tokens, height, width):
        known = self.pos_embed.shape[1] - 1
        if tokens.shape[1] - 1 == known and height == width:
            return self.pos_embed
        side = round(known**0.5)
        rows, cols = height // self.patch_size, width // self.patch_size
        how = {"size": (rows, cols)}
        if not self.antialias:
            how = {"scale_factor": ((rows + 0.1) / side, (cols + 0.1) / side)}
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, mode="bicubic", antialias=self.antialias, **how)
        grid = grid.permute(0, 2, 3, 1).reshape(1, rows * cols, -1)
        return torch.cat([self.pos_embed[:, :1], grid], dim=1)

    def forward_features(self, pixels):
        height, width = pixels.shape[2:]
        x = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.interpolate_pos_encoding(x, height, width)
        if self.register_tokens is not None:
            own = self.register_tokens.expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :1], own, x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        x_norm = self.norm(x)
        first = 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": x_norm[:, 0],
            "x_norm_regtokens": x_norm[:, 1:first],
            "x_norm_patchtokens": x_norm[:, first:],
            "x_prenorm": x,
        }

    def forward(self, pixels):
        return self.head(self.forward_features(pixels)["x_norm_clstoken"])
