"""Tiny pipelines with random weights and a folder of captioned emoji, for `--smoke`: nothing here is needed to read an example."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from perceptual_diffusion.cli import datasets

TOKENS = 64
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789-,.:()&'"
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """A tokenizer that spells."""
    pieces = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def t5_tokenizer() -> transformers.T5Tokenizer:
    """A tokenizer that spells."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in CHARACTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def clip(tokenizer: Any, projection: bool = False) -> Any:
    """A text encoder."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=TOKENS, projection_dim=16, **TEXT, **ids
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config).eval()


def t5(width: int) -> Any:
    """A text encoder of another kind."""
    config = transformers.T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        is_encoder_decoder=False,
    )
    return transformers.T5EncoderModel(config).eval()


def vae(**config: Any) -> diffusers.AutoencoderKL:
    """Latents of half the size with four channels."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        **config,
    )


def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    """A text-conditional UNet on 4 x 16 x 16."""
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            **config,
        }
    )


def ddim(**config: Any) -> diffusers.DDIMScheduler:
    """Stable Diffusion's schedule."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return diffusers.DDIMScheduler(**betas, clip_sample=False, **config)


def stable_diffusion() -> Any:
    """Like sd2.1-base-zsnr-laionaes6: zero terminal SNR, v-prediction, trailing steps."""
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=ddim(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """With both text encoders and micro-conditioning."""
    first, second = clip_tokenizer(), clip_tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(first),
        text_encoder_2=clip(second, projection=True),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=ddim(steps_offset=1),
    )


def sd3() -> Any:
    """With its three text encoders."""
    first, second = clip_tokenizer(), clip_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
            pos_embed_max_size=16,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(first, projection=True),
        tokenizer=first,
        text_encoder_2=clip(second, projection=True),
        tokenizer_2=second,
        text_encoder_3=t5(32),
        tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def flux() -> Any:
    """With packed latents and a guidance embedding."""
    tokenizer = clip_tokenizer()
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(16),
        tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def pictures(folder: Path, count: int = 24) -> None:
    """Write emoji with captions, and one file that is no picture, as `datasets`' imagefolder has them."""
    emoji = [row["caption"] for row in datasets._emoji_rows()["emoji"] if row["split"] == "train"]
    rows = []
    for i, image in enumerate(datasets.load("emoji").train.images[:count]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")
        rows.append({"file_name": f"{i:04d}.png", "text": emoji[i]})
    (folder / "broken.png").write_bytes(b"no picture")
    rows.append({"file_name": "broken.png", "text": "a broken file"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(folder: Path, pipeline: Callable[[], Any]) -> None:
    """Write a tiny pipeline and pictures, the same at every call, whole or not at all, also if two processes do it at once."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline().save_pretrained(Path(draft, "tiny/model"))
        Path(draft, "tiny/pictures").mkdir()
        pictures(Path(draft, "tiny/pictures"))
        with contextlib.suppress(OSError):  # another process was first
            Path(draft, "tiny").rename(folder)


def smoke(parser: Any, argv: Any, pipeline: str) -> Any:
    """Give the options of a tiny run, with a pipeline and pictures made in --out."""
    parser.set_defaults(steps=4, batch=2, accumulate=2, lr=1e-3, every=2, size=32, tokens=TOKENS)
    options = parser.parse_args(argv)
    tiny = Path(options.out, "tiny")
    write(tiny, globals()[pipeline])
    options.model, options.data = str(tiny / "model"), str(tiny / "pictures")
    return options
