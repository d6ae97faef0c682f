"""Tiny real models, the tolerances of the tests, and what they share to build a batch."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import nn

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""Relative error allowed, by the dtype that was computed in."""

STREAMS = pytest.mark.skipif(
    torch.__version__ < (2, 7) and not torch.accelerator.is_available(),
    reason="torch 2.6 shards by FSDP2, and diffusers offloads in groups on it, on accelerators only",
)


def distance(actual, expected):
    """Norm of the difference over the norm of what is expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def unet(**config):
    """Three channels, 8 x 8, conditioned on a class."""
    return UNet2DModel(
        **{
            "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
            "norm_num_groups": 4, "attention_head_dim": 8, "num_class_embeds": 10,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        } | config
    )  # fmt: skip


def conditional_unet(**config):
    """Four channels, 8 x 8, conditioned on a text of width 8."""
    return UNet2DConditionModel(
        **{
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
            "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        } | config
    )  # fmt: skip


def dit(**config):
    """Four channels, 8 x 8, conditioned on a class; it predicts a variance as well: eight channels out."""
    return DiTTransformer2DModel(
        **{
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3,
            "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 4,
        } | config
    )  # fmt: skip


class MLP(nn.Module):
    """Smooth, for samples (B, dim); `scale` and `shift` hold the time as a number from 0 to 1."""

    def __init__(self, dim=5, width=7):
        super().__init__()
        self.first = nn.Linear(dim + 1, width)
        self.middle = nn.Linear(width, width)
        self.last = nn.Linear(width, dim)

    def forward(self, x, t, shift=0.0):
        hidden = torch.tanh(self.first(torch.cat([x, t[:, None].to(x.dtype)], 1)) + shift)
        return self.last(torch.tanh(self.middle(hidden)))


class ConvNet(nn.Module):
    """Two convolutions for maps of any size; `norm` puts a BatchNorm between, `dropout` a dropout."""

    def __init__(self, channels=3, width=6, norm=False, dropout=0.0):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x, t):
        hidden = self.dropout(self.norm(self.stem(x))) + t.to(x.dtype).view(-1, 1, 1, 1)
        return self.head(torch.tanh(self.body(torch.tanh(hidden))))


class TwoStreams(nn.Module):
    """A picture and a sound, denoised together: {"image": (B, 3, H, W), "sound": (B, 4)} in and out."""

    def __init__(self):
        super().__init__()
        self.see = nn.Conv2d(3, 6, 3, padding=1)
        self.hear = nn.Linear(4, 6)
        self.join = nn.Linear(6, 6)
        self.draw = nn.Conv2d(6, 3, 3, padding=1)
        self.play = nn.Linear(6, 4)

    def forward(self, x, t):
        seen = torch.tanh(self.see(x["image"]))
        both = torch.tanh(self.join(seen.mean((2, 3)) + self.hear(x["sound"]) + t.to(seen.dtype)[:, None]))
        return {"image": self.draw(seen + both[:, :, None, None]), "sound": self.play(both)}
