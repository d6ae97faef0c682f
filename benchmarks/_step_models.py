"""The models of `step_cost.py`: published configurations, built on fake tensors, and small ones of the same shapes."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from perceptual_diffusion import schedules

CROSS_DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
CROSS_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
SD = {"down_block_types": CROSS_DOWN, "up_block_types": CROSS_UP, "layers_per_block": 2}
XL_TIME = {
    "addition_embed_type": "text_time",
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
}
DDPM = {
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    "layers_per_block": 2, "downsample_padding": 0, "norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1,
    "attention_head_dim": None,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and its batches.

    Attributes:
        name: what it is called in the tables.
        resolution: pixels along a side.
        make: builds the model with a configuration.
        config: that of its release.
        sample: shape of one sample, by the resolution.
        cond: shapes of one sample's conditions, nested; an int is the number of classes.
        loose: shapes of conditions without a batch dimension.
        flow: whether it is trained on the straight path; else on a discrete schedule with v-prediction.
        latent: channels of the VAE's latent; 0 for a model of pixels.
        tiny: the configuration of a small model, with its resolution, which is really run.
    """

    name: str
    resolution: int
    make: Callable[..., nn.Module]
    config: dict[str, Any]
    sample: Callable[[int], tuple[int, ...]]
    cond: dict[str, Any] = field(default_factory=dict)
    loose: Callable[[int], dict[str, tuple[int, ...]]] = lambda size: {}
    flow: bool = False
    latent: int = 4

    @property
    def schedule(self) -> schedules.Schedule:
        return schedules.Linear() if self.flow else schedules.Discrete.scaled_linear()

    @property
    def prediction(self) -> str:
        return "flow_prediction" if self.flow else "v_prediction"


@dataclass(kw_only=True)
class Batch:
    """Clean samples, their noise, two times each, and conditions."""

    clean: Tensor
    noise: Tensor
    t: Tensor
    t_prime: Tensor
    cond: dict[str, Any]


def build(
    case: Case, *, fake: bool, alter: Callable[[nn.Module], object] = lambda model: None, seed: int = 0
) -> tuple[nn.Module, Any]:
    """Build the model of a case in train mode, altered, and the mode in which its tensors are made."""
    torch.manual_seed(seed)
    with torch.device("meta" if fake else "cpu"):
        model = case.make(**case.config)
        alter(model)
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    if fake:
        with mode:
            model.to_empty(device="cpu")
    return model.train(), mode


def batch(case: Case, mode: Any, size: int, resolution: int | None = None) -> Batch:
    """Draw a batch; the times are real tensors always, since a schedule looks at them."""
    resolution = resolution or case.resolution
    with mode:
        clean, noise = torch.randn(2, size, *case.sample(resolution))
        cond = _conditions(case.cond, size) | {k: torch.zeros(s) for k, s in case.loose(resolution).items()}
    t, t_prime = torch.rand(2, size)
    if not case.flow:
        t, t_prime = (t * 1000).long(), (t_prime * 1000).long()
    return Batch(clean=clean.clone(), noise=noise.clone(), t=t, t_prime=t_prime, cond=cond)


def _conditions(shapes: dict[str, Any], size: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, shape in shapes.items():
        if isinstance(shape, dict):
            made[name] = _conditions(shape, size)
        else:
            made[name] = torch.randint(shape, (size,)) if isinstance(shape, int) else torch.randn(size, *shape)
    return made


def _latents(channels: int) -> Callable[[int], tuple[int, ...]]:
    return lambda pixels: (channels, pixels // 8, pixels // 8)


def _flux(pixels: int, text: int = 512) -> dict[str, tuple[int, ...]]:
    return {"img_ids": ((pixels // 16) ** 2, 3), "txt_ids": (text, 3)}


CASES = [
    Case(
        name="SD1.5", resolution=512, make=UNet2DConditionModel, sample=_latents(4),
        config={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, **SD},
        cond={"encoder_hidden_states": (77, 768)},
    ),
    Case(
        name="SD2.1", resolution=768, make=UNet2DConditionModel, sample=_latents(4),
        config={"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), **SD,
                "use_linear_projection": True},
        cond={"encoder_hidden_states": (77, 1024)},
    ),
    Case(
        name="SDXL", resolution=1024, make=UNet2DConditionModel, sample=_latents(4),
        config={"sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048, "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816, **XL, **XL_TIME},
        cond={"encoder_hidden_states": (77, 2048), "added_cond_kwargs": {"text_embeds": (1280,), "time_ids": (6,)}},
    ),
    Case(
        name="SD3-M", resolution=1024, make=SD3Transformer2DModel, sample=_latents(16), flow=True, latent=16,
        config={"sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
                "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048, "pos_embed_max_size": 192},
        cond={"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)},
    ),
    Case(
        name="Flux", resolution=1024, make=FluxTransformer2DModel, flow=True, latent=16,
        sample=lambda pixels: ((pixels // 16) ** 2, 64),
        config={"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
                "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
                "guidance_embeds": True},
        cond={"encoder_hidden_states": (512, 4096), "pooled_projections": (768,), "guidance": ()},
        loose=_flux,
    ),
    Case(
        name="DiT-XL/2", resolution=512, make=DiTTransformer2DModel, sample=_latents(4),
        config={"sample_size": 64, "in_channels": 4, "out_channels": 8, "num_layers": 28, "num_attention_heads": 16,
                "attention_head_dim": 72, "patch_size": 2, "num_embeds_ada_norm": 1000},
        cond={"class_labels": 1000},
    ),
    Case(
        name="DDPM", resolution=256, make=UNet2DModel, sample=lambda pixels: (3, pixels, pixels), latent=0,
        config={"sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512), **DDPM},
    ),
]  # fmt: skip
"""Published models, at the resolution they were trained for."""

TINY = [
    Case(
        name="SD1.5, tiny", resolution=128, make=UNet2DConditionModel, sample=_latents(4),
        config={"sample_size": 16, "cross_attention_dim": 64, "attention_head_dim": 2, **SD,
                "block_out_channels": (32, 64, 128, 128), "norm_num_groups": 8},
        cond={"encoder_hidden_states": (77, 64)},
    ),
    Case(
        name="SDXL, tiny", resolution=128, make=UNet2DConditionModel, sample=_latents(4),
        config={"sample_size": 16, "block_out_channels": (32, 64, 128), "attention_head_dim": (1, 2, 4),
                "cross_attention_dim": 64, "addition_time_embed_dim": 8, "norm_num_groups": 8,
                "projection_class_embeddings_input_dim": 64 + 6 * 8, **XL, **XL_TIME,
                "transformer_layers_per_block": (1, 1, 2)},
        cond={"encoder_hidden_states": (77, 64), "added_cond_kwargs": {"text_embeds": (64,), "time_ids": (6,)}},
    ),
    Case(
        name="SD3-M, tiny", resolution=256, make=SD3Transformer2DModel, sample=_latents(16), flow=True, latent=16,
        config={"sample_size": 32, "in_channels": 16, "out_channels": 16, "num_layers": 8, "attention_head_dim": 32,
                "num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 128,
                "pooled_projection_dim": 64, "pos_embed_max_size": 32},
        cond={"encoder_hidden_states": (77, 64), "pooled_projections": (64,)},
    ),
    Case(
        name="Flux, tiny", resolution=256, make=FluxTransformer2DModel, flow=True, latent=16,
        sample=lambda pixels: ((pixels // 16) ** 2, 64),
        config={"in_channels": 64, "num_layers": 3, "num_single_layers": 6, "attention_head_dim": 32,
                "num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 64,
                "guidance_embeds": True, "axes_dims_rope": (8, 12, 12)},
        cond={"encoder_hidden_states": (64, 64), "pooled_projections": (64,), "guidance": ()},
        loose=lambda pixels: _flux(pixels, 64),
    ),
    Case(
        name="DiT-XL/2, tiny", resolution=256, make=DiTTransformer2DModel, sample=_latents(4),
        config={"sample_size": 32, "in_channels": 4, "out_channels": 8, "num_layers": 12, "num_attention_heads": 4,
                "attention_head_dim": 36, "patch_size": 2, "num_embeds_ada_norm": 10},
        cond={"class_labels": 10},
    ),
    Case(
        name="DDPM, tiny", resolution=64, make=UNet2DModel, sample=lambda pixels: (3, pixels, pixels), latent=0,
        config={"sample_size": 64, "block_out_channels": (16, 16, 32, 32, 64, 64), "norm_num_groups": 8, **DDPM},
    ),
]  # fmt: skip
"""Small models of the same shapes, which are run."""
