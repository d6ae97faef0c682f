"""Rows of the UNets and of UniDiffuser, and the classes that are refused."""
# ruff: noqa: C408

import diffusers
import torch

from zoo import FLOW_T, INDEX_T, REFUSED, SIGMA_T, B, Tiny, normal, row

REFUSED["UVit2DModel"] = "discrete"  # pipeline_amused: token ids in, logits out
REFUSED["Transformer2DModel"] = "block"  # of the UNets
REFUSED["DreamLiteTransformer2DModel"] = "block"  # of DreamLiteUNetModel
REFUSED["TransformerTemporalModel"] = "block"  # of UNet3DConditionModel and I2VGenXLUNet

FRAMES = 2


def released(name, **settings):
    return lambda: getattr(diffusers, f"{name}Scheduler")(**settings)


def joined(condition, dim):
    return lambda x, t: {"sample": torch.cat([x, condition], dim)}


def c_in(x, sigma, sigma_data):
    return x * (sigma**2 + sigma_data**2).rsqrt().reshape(-1, *[1] * (x.ndim - 1))


UNET = dict(
    middle="mid_block", feature=lambda raw: raw, time=lambda t: {"timestep": t}, given=lambda x, t: {"sample": x},
    predicted=lambda out: out.sample, prediction="epsilon", t=INDEX_T,
)  # fmt: skip
NO_MIDDLE = UNET | dict(middle="down_blocks.1", feature=lambda raw: raw[0])  # (hidden, skips)
FRAMED = UNET | dict(feature=lambda raw: raw.unflatten(0, (B, FRAMES)))  # "(b f) c h w"
KARRAS = UNET | dict(time=lambda t: {"timestep": t.log() / 4}, t=SIGMA_T)

SMALL = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=8)
TEXT = dict(**SMALL, in_channels=4, out_channels=4, cross_attention_dim=8, attention_head_dim=2)
CROSS_2D = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
)
DEEP_CROSS_2D = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
)
CROSS_3D = dict(
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D")
)
SDXL = dict(
    **TEXT, **DEEP_CROSS_2D, transformer_layers_per_block=(1, 2), use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=10 + 6 * 4,
)  # fmt: skip
LATENTS = normal(B, 4, 8, 8)
VIDEO = normal(B, 4, FRAMES, 8, 8)
WORDS = {"encoder_hidden_states": normal(B, 5, 8)}
MICRO = {"text_embeds": normal(B, 10), "time_ids": torch.tensor([[64.0, 64, 0, 8, 64, 64]] * B)}

SD_BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SD1 = released("PNDM", **SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)


def pixels(**change):
    config = dict(
        **SMALL, in_channels=3, out_channels=3, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **change,
    )  # fmt: skip
    return dict(config=config, clean=normal(B, 3, 8, 8), scheduler=released("DDPM"))


@row
def UNet2DModel():
    return Tiny(**pixels(), **UNET)
    # pipeline_ddpm: index as is; epsilon on the linear betas


@row
def UNet2DModel__no_mid():
    return Tiny(**pixels(mid_block_type=None), **NO_MIDDLE)
    # unet_2d: what the last down block gives goes to the up blocks


@row
def UNet2DConditionModel():
    return Tiny(config=TEXT | CROSS_2D, clean=LATENTS, cond=WORDS, scheduler=SD1, **UNET)
    # pipeline_stable_diffusion: index as is; Stable Diffusion 1 has epsilon


@row
def UNet2DConditionModel__sdxl():
    cond = WORDS | {"added_cond_kwargs": MICRO}
    scheduler = released("EulerDiscrete", **SD_BETAS, timestep_spacing="leading", steps_offset=1)
    return Tiny(config=SDXL, clean=LATENTS, cond=cond, scheduler=scheduler, **UNET)
    # pipeline_stable_diffusion_xl: scale_model_input makes Euler's sample variance-preserving before the call


@row
def UNet2DConditionModel__edm():
    return Tiny(
        config=SDXL, clean=LATENTS, cond=WORDS | {"added_cond_kwargs": MICRO},
        scheduler=released("EDMDPMSolverMultistep", sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
        **KARRAS | dict(given=lambda x, t: {"sample": c_in(x, t, 0.5)}, prediction="edm"),
    )  # fmt: skip
    # Playground 2.5 in pipeline_stable_diffusion_xl: precondition_inputs, _noise and _outputs of its scheduler


@row
def UNet2DConditionModel__zero_snr():
    return Tiny(
        config=TEXT | CROSS_2D, clean=LATENTS, cond=WORDS,
        scheduler=released(
            "DDIM", **SD_BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing",
            prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        ),
        **UNET | dict(prediction="v_prediction", t=torch.tensor([120, 480, 999])),
    )  # fmt: skip
    # Stable Diffusion 2.1 trained on as Lin et al. 2024 do: at 999 x_t is the noise


@row
def UNet2DConditionModel__inpaint():
    masked = torch.cat([normal(B, 1, 8, 8, seed=1).sign().relu(), normal(B, 4, 8, 8, seed=2)], 1)
    return Tiny(
        config=TEXT | CROSS_2D | dict(in_channels=9), clean=LATENTS, cond=WORDS | {"concat": masked}, scheduler=SD1,
        **UNET | dict(given=joined(masked, 1)),
    )  # fmt: skip
    # pipeline_stable_diffusion_inpaint: cat([latents, mask, masked latents], dim=1)


@row
def UNet2DConditionModel__learned_variance():
    config = TEXT | dict(
        in_channels=3, out_channels=6, cross_attention_dim=32, encoder_hid_dim=12, act_fn="gelu",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type="text", addition_embed_type_num_heads=2, cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    return Tiny(
        config=config, clean=normal(B, 3, 8, 8), cond={"encoder_hidden_states": normal(B, 5, 12)},
        scheduler=released("DDPM", beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
        **UNET | dict(predicted=lambda out: out.sample[:, :3]),
    )  # fmt: skip
    # pipeline_if: noise_pred.split(channels, dim=1) is (epsilon, variance)


@row
def UNet2DConditionModel__no_mid():
    return Tiny(
        config=TEXT | CROSS_2D | dict(mid_block_type=None), clean=LATENTS, cond=WORDS, scheduler=SD1, **NO_MIDDLE
    )  # BK-SDM-Small and -Tiny are Stable Diffusion without its mid block


@row
def AudioLDM2UNet2DConditionModel():
    second = {"encoder_hidden_states_1": normal(B, 7, 12), "encoder_attention_mask_1": torch.ones(B, 7)}
    return Tiny(
        config=TEXT | DEEP_CROSS_2D | dict(cross_attention_dim=((None, 8, None, 12),) * 2),
        clean=LATENTS, cond=WORDS | second,
        scheduler=released(
            "DDIM", beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        **UNET,
    )  # fmt: skip
    # pipeline_audioldm2: index as is, GPT-2's tokens first, then T5's with their mask


@row
def UNet3DConditionModel():
    scheduler = released("DDIM", **SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return Tiny(config=TEXT | CROSS_3D, clean=VIDEO, cond=WORDS, scheduler=scheduler, **FRAMED)
    # pipeline_text_to_video_synth: (B, C, F, H, W), index as is; unet_3d_condition makes it (b f) before conv_in


@row
def UNetMotionModel():
    config = SMALL | dict(
        cross_attention_dim=8, num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )  # fmt: skip
    per_frame = {key: value.repeat_interleave(FRAMES, 0) for key, value in WORDS.items()}  # (B F, L, D), not (B, L, D)
    scheduler = released("DDIM", beta_schedule="linear", steps_offset=1, clip_sample=False)
    return Tiny(config=config, clean=VIDEO, cond=per_frame, scheduler=scheduler, **FRAMED)
    # pipeline_animatediff: it repeats the text per frame, the model the time; the scheduler is its example's


@row
def UNetSpatioTemporalConditionModel():
    image = normal(B, 1, 4, 8, 8, seed=1).repeat(1, FRAMES, 1, 1, 1)
    return Tiny(
        config=dict(
            block_out_channels=(32, 64), layers_per_block=1, sample_size=8, cross_attention_dim=8,
            num_attention_heads=4, down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=12,
        ),
        clean=normal(B, FRAMES, 4, 8, 8),
        cond={
            "encoder_hidden_states": normal(B, 1, 8), "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]] * B),
            "concat": image,  # clean, and c_in does not scale it
        },
        scheduler=released(
            "EulerDiscrete", **SD_BETAS, prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002,
            sigma_max=700.0, use_karras_sigmas=True, timestep_spacing="leading", steps_offset=1,
        ),
        **FRAMED | KARRAS | dict(
            feature=FRAMED["feature"], given=lambda x, t: {"sample": torch.cat([c_in(x, t, 1.0), image], 2)},
            prediction="-edm",  # sigma_data 1: the v of c_in x_t, c_out = -sigma / sqrt(sigma² + 1)
        ),
    )  # fmt: skip
    # pipeline_stable_video_diffusion: scale_model_input, cat([latents, image_latents], dim=2), t = ln(sigma) / 4


@row
def I2VGenXLUNet():
    image = {"image_latents": normal(B, 4, FRAMES, 8, 8, seed=1), "image_embeddings": normal(B, 8)}
    return Tiny(
        config=TEXT | CROSS_3D, clean=VIDEO, cond=WORDS | image | {"fps": torch.full((B,), 16)},
        scheduler=released(
            "DDIM", beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, clip_sample=False, steps_offset=1,
            prediction_type="v_prediction",
        ),
        **FRAMED | dict(prediction="v_prediction"),
    )  # fmt: skip
    # pipeline_i2vgen_xl: (B, C, F, H, W), the model joins image_latents itself; convert_i2vgen: the scheduler


@row
def Kandinsky3UNet():
    return Tiny(
        config=dict(
            time_embedding_dim=8, groups=2, attention_head_dim=4, layers_per_block=2, block_out_channels=(8, 8, 16, 16),
            cross_attention_dim=8, encoder_hid_dim=12,
        ),
        clean=normal(B, 4, 16, 16),
        cond={"encoder_hidden_states": normal(B, 5, 12), "encoder_attention_mask": torch.ones(B, 5)},
        scheduler=released("DDPM", beta_schedule="squaredcos_cap_v2"),
        **UNET | dict(middle="down_blocks.3"),
    )  # fmt: skip
    # pipeline_kandinsky3: index as is; unet_kandinsky3: the last down block's output, a tensor, is skipped to by none


@row
def DreamLiteUNetModel():
    reference = normal(B, 4, 8, 8, seed=1)  # of an edit; zeros for text to image
    return Tiny(
        config=dict(
            sample_size=8, block_out_channels=(8, 16, 16), cross_attention_dim=16, attention_head_dim=4,
            layers_per_block=1, norm_num_groups=4, encoder_hid_dim=12, encoder_hid_dim_type="text_proj_rms",
            addition_embed_type="time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=8,
        ),
        clean=LATENTS,
        cond={
            "encoder_hidden_states": normal(B, 5, 12), "encoder_attention_mask": torch.ones(B, 5),
            "added_cond_kwargs": {"time_ids": torch.tensor([[64.0, 64.0]] * B)}, "concat": reference,
        },
        scheduler=released("FlowMatchEulerDiscrete", use_dynamic_shifting=True),
        **UNET | dict(
            feature=lambda raw: raw[..., : raw.shape[-1] // 2], given=joined(reference, 3),
            predicted=lambda out: out.sample[..., :8], prediction="flow_prediction", t=FLOW_T,
        ),
    )  # fmt: skip
    # pipeline_dreamlite: cat([latents, image_latents], dim=3), timestep as is, the left half of the width is the output


@row
def StableCascadeUNet():
    return Tiny(
        config=dict(
            timestep_ratio_embedding_dim=8, conditioning_dim=8, block_out_channels=(8, 16), num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 2), up_num_layers_per_block=(2, 1), switch_level=(False,),
            clip_text_in_channels=12, clip_text_pooled_in_channels=10, clip_image_in_channels=6,
        ),
        clean=normal(B, 16, 6, 6),
        cond={
            "clip_text_pooled": normal(B, 1, 10), "clip_text": normal(B, 5, 12), "clip_img": normal(B, 1, 6),
        },
        scheduler=released("DDPMWuerstchen"),
        **UNET | dict(
            middle="down_blocks.1.5",  # last of the lowest level's 2 x 3; the lists of a level are never called
            time=lambda t: {"timestep_ratio": t / 1000}, t=FLOW_T,
        ),
    )  # fmt: skip
    # pipeline_stable_cascade_prior: the scheduler's continuous cosine time, 0 to 1; its step takes epsilon


JOINT = {"latent_image_embeds": LATENTS, "image_embeds": normal(B, 1, 6), "prompt_embeds": normal(B, 5, 12)}
UNIDIFFUSER = UNET | dict(
    clean=JOINT, middle="transformer.transformer_mid_block", given=lambda x, t: dict(x),
    time=lambda t: {"timestep_img": t, "timestep_text": t}, predicted=lambda out: dict(zip(JOINT, out, strict=True)),
    scheduler=released("DPMSolverMultistep", **SD_BETAS, solver_order=3),
)  # fmt: skip
UVIT = dict(
    text_dim=12, clip_img_dim=6, num_text_tokens=5, num_attention_heads=2, attention_head_dim=8, in_channels=4,
    out_channels=4, num_layers=4, sample_size=8, patch_size=2, activation_fn="gelu", num_embeds_ada_norm=1000,
)  # fmt: skip


@row
def UniDiffuserModel():
    return Tiny(config=UVIT, **UNIDIFFUSER | dict(feature=lambda raw: raw[:, 2:]))  # [2 times, text, clip, latents]
    # pipeline_unidiffuser, mode "joint": all three noisy at one index; convert_unidiffuser: the scheduler has epsilon


@row
def UniDiffuserModel__v1():
    config = UVIT | dict(use_data_type_embedding=True)
    return Tiny(config=config, cond={"data_type": 1}, **UNIDIFFUSER | dict(feature=lambda raw: raw[:, 3:]))
    # a token of the data type after those of the times


@row
def UNet1DModel():
    return Tiny(
        config=dict(
            sample_size=64, sample_rate=16000, block_out_channels=(32, 32, 64), extra_in_channels=16,
            time_embedding_dim=16,
        ),
        clean=normal(B, 2, 64),
        scheduler=released("IPNDM"),
        **UNET | dict(time=lambda t: {"timestep": t / 1000}, prediction="v_prediction", t=FLOW_T),
    )  # fmt: skip
    # pipeline_dance_diffusion: IPNDM's timesteps, x_t = cos(t π/2) x_0 + sin(t π/2) ε with t of 0 to 1; step takes v


@row
def UNet1DModel__planner():
    return Tiny(
        config=dict(
            in_channels=14, out_channels=14, block_out_channels=(8, 8, 16, 16), act_fn="swish",
            down_block_types=("DownResnetBlock1D",) * 4, up_block_types=("UpResnetBlock1D",) * 3,
            mid_block_type="MidResTemporalBlock1D", out_block_type="OutConv1DBlock", time_embedding_type="positional",
            use_timestep_embedding=True, flip_sin_to_cos=False, freq_shift=1.0,
        ),
        clean=normal(B, 14, 16),
        scheduler=released("DDPM", beta_schedule="squaredcos_cap_v2", clip_sample=False, prediction_type="sample"),
        **UNET | dict(prediction="sample"),
    )  # fmt: skip
    # experimental/rl: index as is, (B, C, horizon); Diffuser (Janner et al. 2022) predicts the clean plan
