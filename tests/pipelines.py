"""Tiny pipelines of diffusers with random weights, written to disk as released ones are, and folders of pictures."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from models import conditional_unet, dit
from PIL import Image

WORDS = ["a", "red", "green", "blue", "square", "on", "white", "picture", "of", "the"]


def clip_tokenizer(folder):
    """A CLIP tokenizer of ten words and the letters, read from its two files."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = sorted(set("".join(WORDS)))
    pieces, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (pair := f"{parts[0]} {parts[1]}") not in merges:
                merges.append(pair)
            parts[:2] = ["".join(parts[:2])]
            pieces.append(parts[0])
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def clip_text(tokenizer, *, projected=False, width=8):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=8, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(**config):
    """Three channels to four, halved once."""
    return AutoencoderKL(
        **{
            "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16,
            "scaling_factor": 0.5,
        } | config
    ).eval()  # fmt: skip


def table(**config):
    """Stable Diffusion's betas."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1, **config
    )


def ddpm(folder):
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=8, dropout=0.1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)


def dit_classes(folder):
    from diffusers import DiTPipeline

    DiTPipeline(transformer=dit(), vae=vae(), scheduler=table()).save_pretrained(folder)


def stable_diffusion(folder, **unet):
    from diffusers import StableDiffusionPipeline

    tokenizer = clip_tokenizer(folder / "made")
    StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_text(tokenizer), tokenizer=tokenizer, unet=conditional_unet(**unet), scheduler=table(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def sdxl(folder):
    from diffusers import StableDiffusionXLPipeline

    tokenizer = clip_tokenizer(folder / "made")
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=(1, 2), cross_attention_dim=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=8 + 6 * 4,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip_text(tokenizer), text_encoder_2=clip_text(tokenizer, projected=True),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, scheduler=table(), add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip


def sd3(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer = clip_tokenizer(folder / "made")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(shift_factor=0.1),
        text_encoder=clip_text(tokenizer, projected=True), tokenizer=tokenizer,
        text_encoder_2=clip_text(tokenizer, projected=True), tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    ).save_pretrained(folder)  # fmt: skip


def flux(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    tokenizer = clip_tokenizer(folder / "made")
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(shift_factor=0.1),
        text_encoder=clip_text(tokenizer), tokenizer=tokenizer, text_encoder_2=t5.eval(), tokenizer_2=tokenizer,
    ).save_pretrained(folder)  # fmt: skip


KINDS = {"ddpm": ddpm, "dit": dit_classes, "sd": stable_diffusion, "sdxl": sdxl, "sd3": sd3, "flux": flux}
"""Functions that write a pipeline into a folder, by name."""


def write(kind, folder, seed=0, **options):
    """Write a tiny pipeline and give its folder."""
    torch.manual_seed(seed)
    KINDS[kind](folder, **options)
    return folder


def pictures(folder, number=6, *, size=(20, 16), layout="captions"):
    """Write coloured pictures: with a metadata.jsonl ("captions"), in subfolders ("classes"), or "bare"."""
    folder.mkdir(parents=True)
    colours = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200)}
    rows = []
    for index in range(number):
        name = list(colours)[index % 3]
        picture = Image.new("RGB", size, "white")
        picture.paste(colours[name], (2 + index, 3, 10 + index, 12))
        path = folder / (f"{name}/{index}.png" if layout == "classes" else f"{index}.png")
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        rows.append({"file_name": path.name, "text": f"a {name} square on white"})
    if layout == "captions":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(folder)
