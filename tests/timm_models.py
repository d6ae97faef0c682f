"""A DiT and a SiT written with timm's layers, as their papers have them: adaLN-zero, a class, sinusoidal time.

The two differ in what they are trained for. The DiT takes an integer t from 0 to 999 and gives ε and a variance, twice
the channels of its input. The SiT takes t in [0, 1] with the data at t = 1 and gives the velocity data - noise.
"""

import math

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import nn


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, 1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Head(nn.Module):
    """A token to the pixels of its patch."""

    def __init__(self, width, out):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, out)

    def forward(self, x, c):
        return self.linear(modulate(self.norm(x), *self.modulation(c).chunk(2, 1)))


class Time(nn.Module):
    """Sines and cosines of t, then an MLP."""

    def __init__(self, width, frequencies=16):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        rates = torch.exp(-math.log(10_000) * torch.arange(frequencies) / frequencies)
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, t):
        angles = t[:, None].to(self.rates) * self.rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


class Transformer(nn.Module):
    """Patches, blocks, pixels; `out` channels."""

    def __init__(self, size=8, patch=2, channels=4, out=4, width=16, depth=4, heads=2, classes=10):
        super().__init__()
        self.patch, self.out = patch, out
        self.x_embedder = PatchEmbed(size, patch, channels, width)
        self.t_embedder = Time(width)
        self.y_embedder = nn.Embedding(classes + 1, width)  # the last is "no class"
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = Head(width, patch * patch * out)
        for layer in (
            *(block.modulation[1] for block in self.blocks),
            self.final_layer.modulation[1],
            self.final_layer.linear,
        ):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def run(self, x, t, y):
        (height, width), p = x.shape[2:], self.patch
        c = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, c)
        pixels = self.final_layer(tokens, c).reshape(len(x), height // p, width // p, p, p, self.out)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out, height, width)


class DiT(Transformer):
    """ε and a variance, (B, 2C, H, W); t is an integer from 0 (clean) to 999."""

    def __init__(self, channels=4, **config):
        super().__init__(channels=channels, out=2 * channels, **config)

    def forward(self, x, t, y):
        return self.run(x, t, y)


class SiT(Transformer):
    """The velocity data - noise, (B, C, H, W); t is from 0 (noise) to 1 (data)."""

    def __init__(self, channels=4, **config):
        super().__init__(channels=channels, out=channels, **config)

    def forward(self, x, t, y):
        return self.run(x, 1000 * t, y)


def awake(model, seed=0):
    """Fill what adaLN-zero leaves at zero, as training would: before that no block does anything."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def dit(**config):
    return awake(DiT(**config))


def sit(**config):
    return awake(SiT(**config))
