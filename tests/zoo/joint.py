"""Rows of the zoo: transformers where text and sample attend to each other (MMDiT), image and video.

Most of them run two-stream blocks and then one-stream blocks; the middle counts both, in the order they run.
"""

import warnings

import torch

from perceptual_diffusion.adapters import Concat
from zoo import FLOW_T, INDEX_T, B, Tiny, normal, row


def thousand(t):
    return {"timestep": t}


def unit(t):
    return {"timestep": t / 1000}


def less_one(t):
    return {"timestep": unshifted(t)["timestep"] - 1}


def hidden(x, t):
    return {"hidden_states": x}


def joined(clean, dim, first=False):
    """Give the model the noisy sample and a clean one, joined along `dim`."""
    return lambda x, t: {"hidden_states": torch.cat([clean, x] if first else [x, clean], dim)}


def stream(index, start=0, stop=None):
    """Take the sample's stream out of a block's (text, sample) or (sample, text), and its noisy tokens."""
    return lambda out: out[index][:, start:stop]


def tokens(start, stop=None):
    """Take the noisy tokens out of one joint sequence, or out of a prediction."""
    return lambda out: getattr(out, "sample", out)[:, start:stop]


def scheduler(name, **settings):
    def make():
        import diffusers

        return getattr(diffusers, name)(**settings)

    return make


def euler(**settings):
    return scheduler("FlowMatchEulerDiscreteScheduler", **settings)


def flow(config, clean, cond, middle, feature, time, **others):
    """A model that predicts noise - clean from `hidden_states`, unless `others` says otherwise."""
    usual = {
        "given": hidden,
        "predicted": lambda out: out.sample,
        "prediction": "flow_prediction",
        "scheduler": euler(),
        "t": FLOW_T,
    }
    fields = {"config": config, "clean": clean, "cond": cond, "middle": middle, "feature": feature, "time": time}
    return Tiny(**{**usual, **fields, **others})


def grid(axes=3, index=0):
    """Positions of 4 x 4 packed patches: the first axis numbers the image, the fourth is unused."""
    positions = torch.cartesian_prod(torch.tensor([float(index)]), torch.arange(4.0), torch.arange(4.0))
    return torch.nn.functional.pad(positions, (0, axes - 3))


LATENT = normal(B, 4, 8, 8)
VIDEO = normal(B, 4, 2, 8, 8)
PACKED = normal(B, 16, 4)  # 4 x 4 tokens, as all pipelines of packed latents
REFERENCE = normal(B, 16, 4, seed=1)
TEXT = normal(B, 6, 32)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
DEPTH = {"num_layers": 2, "num_single_layers": 2}
DYNAMIC = euler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, shift=3.0)


# ---------------------------------------------------------------------------------------------- latents (B, C, H, W)


@row
def SD3Transformer2DModel():
    config = {
        **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4, **HEADS},
        **{"caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 16},
        **{"pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    }
    cond = {"encoder_hidden_states": TEXT, "pooled_projections": normal(B, 16)}
    return flow(config, LATENT, cond, "transformer_blocks.2", stream(1), thousand, scheduler=euler(shift=3.0))


# pipeline_stable_diffusion_3: t as it is, FlowMatchEuler's step takes noise - clean; blocks return (text, image)


@row
def AuraFlowTransformer2DModel():
    config = {
        **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 16, **HEADS},
        **{"num_mmdit_layers": 2, "num_single_dit_layers": 2},
        **{"caption_projection_dim": 32, "joint_attention_dim": 32},
    }
    cond = {"encoder_hidden_states": TEXT}
    shift = euler(shift=1.73)
    return flow(config, LATENT, cond, "single_transformer_blocks.0", tokens(8 + 6), unit, scheduler=shift)


# pipeline_aura_flow: t / 1000; a sequence is [8 register tokens; text; image]


SIZES = {name: torch.tensor([[64.0, 64.0]] * B) for name in ("original_size", "target_size")}
SIZES["crop_coords"] = torch.zeros(B, 2)
COGVIEW = {
    **{"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4, "text_embed_dim": 32},
    **{"time_embed_dim": 8, "condition_dim": 4, **HEADS},
}


@row
def CogView3PlusTransformer2DModel():
    config = {**COGVIEW, "pos_embed_max_size": 8, "sample_size": 8}
    cond = {"encoder_hidden_states": TEXT, **SIZES}
    betas = {
        **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "snr_shift_scale": 4.0},
        **{"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        **{"clip_sample": False},
    }
    return flow(
        config,
        LATENT,
        cond,
        "transformer_blocks.2",
        stream(0),
        thousand,
        prediction="v_prediction",
        scheduler=scheduler("CogVideoXDDIMScheduler", **betas),
        t=INDEX_T,
    )


# convert_cogview3_to_diffusers: the scheduler; pipeline_cogview3plus: its integer t; blocks return (image, text)


LINEAR_SHIFT = euler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear")


def cogview4(**others):
    cond = {"encoder_hidden_states": TEXT, **SIZES, **others.pop("cond", {})}
    config = {**COGVIEW, "rope_axes_dim": (16, 16), **others.pop("config", {})}
    others = {"scheduler": LINEAR_SHIFT, **others}
    return flow(config, LATENT, cond, "transformer_blocks.2", stream(0), unshifted, **others)


def unshifted(t):
    """The timestep u of sigma = t / 1000 = mu / (mu + 1000 / u - 1), mu = 0.75 sqrt(16 tokens / 256) + 0.25."""
    mu = 0.75 * (16 / 256) ** 0.5 + 0.25
    return {"timestep": 1000 / (mu * (1000 / t - 1) + 1)}


@row
def CogView4Transformer2DModel():
    return cogview4()


@row
def CogView4Transformer2DModel__control():
    control = normal(B, 4, 8, 8, seed=1)
    return cogview4(config={"in_channels": 8}, cond={"concat": control}, given=joined(control, 1))


# pipeline_cogview4(_control), train_control_cogview4: t as it is, but sigma is the shifted t / 1000 of this t: set_timesteps
# gets both, and the shift mu = 0.75 sqrt(tokens / 256) + 0.25 reaches the sigmas only.


@row
def GlmImageTransformer2DModel():
    config = {**COGVIEW, "prior_vq_quantizer_codebook_size": 64}
    cond = {
        **{"encoder_hidden_states": TEXT, "prior_token_id": torch.arange(B * 16).reshape(B, 16)},
        **{"prior_token_drop": torch.tensor([False, True, False])},
        **{name: SIZES[name] for name in ("target_size", "crop_coords")},
    }
    return flow(config, LATENT, cond, "transformer_blocks.2", stream(0), less_one, scheduler=LINEAR_SHIFT)


# pipeline_glm_image: timestep = t - 1; t and sigma part as in CogView4; blocks return (image, text)


@row
def HiDreamImageTransformer2DModel():
    config = {
        **{"patch_size": 2, "in_channels": 4, "out_channels": 4, **DEPTH, **HEADS, "axes_dims_rope": (8, 4, 4)},
        **{"caption_channels": [32, 12], "text_emb_dim": 16, "num_routed_experts": 4, "num_activated_experts": 2},
        **{"max_resolution": (8, 8), "llama_layers": [0, 1, 2, 3]},
    }
    cond = {
        **{"encoder_hidden_states_t5": TEXT, "encoder_hidden_states_llama3": normal(4, B, 5, 12)},  # layers first
        **{"pooled_embeds": normal(B, 16)},
    }
    return flow(
        config,
        LATENT,
        cond,
        "single_stream_blocks.0",
        tokens(0, 16),
        lambda t: {"timesteps": t},
        prediction="-flow_prediction",
        scheduler=euler(shift=3.0),
        awake=("MOEFeedForwardSwiGLU",),
    )


# pipeline_hidream_image: t as it is, noise_pred = -noise_pred; a sequence is [image; T5; last llama; this block's llama].
# In eval mode its experts run under no_grad, and in train mode its output is (B, C, tokens, 4), not an image.


def hunyuan_image(**others):
    config = {
        **{"in_channels": 4, "out_channels": 4, **HEADS, **DEPTH, "num_refiner_layers": 1, "text_embed_dim": 32},
        **{"patch_size": (1, 1), "text_embed_2_dim": 12, "rope_axes_dim": (8, 8), **others.pop("config", {})},
    }
    cond = {
        **{"encoder_hidden_states": TEXT, "encoder_attention_mask": torch.ones(B, 6)},
        **{"encoder_hidden_states_2": normal(B, 4, 12), "encoder_attention_mask_2": torch.ones(B, 4)},
        **others.pop("cond", {}),
    }
    others = {"scheduler": euler(shift=5.0), **others}
    return flow(config, LATENT, cond, "single_transformer_blocks.0", stream(0), thousand, **others)


@row
def HunyuanImageTransformer2DModel():
    return hunyuan_image()


@row
def HunyuanImageTransformer2DModel__meanflow():
    # r is where the mean velocity ends; at r = 0 it leads to the clean sample: x_t - t u = clean
    cond = {"timestep_r": torch.zeros(B), "guidance": torch.full((B,), 3250.0)}
    return hunyuan_image(config={"use_meanflow": True, "guidance_embeds": True}, cond=cond)


@row
def HunyuanImageTransformer2DModel__refiner():
    coarse = normal(B, 4, 2, 8, 8, seed=1)
    config = {
        **{"in_channels": 8, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, **DEPTH},
        **{"num_refiner_layers": 1, "patch_size": (1, 1, 1), "text_embed_dim": 32, "rope_axes_dim": (4, 4, 4)},
        **{"guidance_embeds": True},
    }
    cond = {
        **{"encoder_hidden_states": TEXT, "encoder_attention_mask": torch.ones(B, 6)},
        **{"guidance": torch.full((B,), 3250.0), "concat": coarse},
    }
    others = {"given": joined(coarse, 1), "scheduler": euler(shift=4.0)}
    return flow(config, VIDEO, cond, "single_transformer_blocks.0", stream(0), thousand, **others)


# pipeline_hunyuanimage(_refiner): t as it is; timestep_r is the next t, guidance is times 1000; blocks return (image, text)


# ---------------------------------------------------------------------------------- packed latents (B, tokens, channels)


def packed(config, cond, time, feature, reference=False, axes=3, **others):
    """One of Flux's heirs; `reference` adds an image's tokens after the noisy ones."""
    config = {"patch_size": 1, "in_channels": 4, "joint_attention_dim": 32, **DEPTH, **HEADS, **config}
    ids = torch.cat([grid(axes, i) for i in range(2 if reference else 1)])
    cond = {"encoder_hidden_states": TEXT, "img_ids": ids, "txt_ids": torch.zeros(6, axes), **cond}
    if reference:
        cond["concat"] = REFERENCE
        others = {"given": joined(REFERENCE, 1), "predicted": tokens(0, 16), **others}
    others = {"scheduler": DYNAMIC, **others}
    return flow(config, PACKED, cond, "single_transformer_blocks.0", feature, time, **others)


FLUX = {"pooled_projection_dim": 12, "axes_dims_rope": (4, 4, 8)}
POOLED = {"pooled_projections": normal(B, 12)}
DEV = {"guidance": torch.full((B,), 3.5), **POOLED}


@row
def FluxTransformer2DModel():
    return packed(FLUX, POOLED, unit, stream(1), scheduler=euler())


@row
def FluxTransformer2DModel__dev():
    return packed({**FLUX, "guidance_embeds": True}, DEV, unit, stream(1))


@row
def FluxTransformer2DModel__kontext():
    return packed({**FLUX, "guidance_embeds": True}, DEV, unit, stream(1, 0, 16), reference=True)


@row
def FluxTransformer2DModel__fill():
    masked = normal(B, 16, 5, seed=1)  # a masked image and its mask
    config = {**FLUX, "guidance_embeds": True, "in_channels": 9, "out_channels": 4}
    return packed(config, {**DEV, "concat": Concat(masked, dim=2)}, unit, stream(1), given=joined(masked, 2))


# pipeline_flux(_kontext, _fill): t / 1000, the model multiplies by 1000; Kontext's tokens follow, Fill's channels; blocks
# of both kinds return (text, image)


FLUX2 = {"timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)}


@row
def Flux2Transformer2DModel():
    return packed(FLUX2, {"guidance": torch.full((B,), 4.0)}, unit, tokens(6), axes=4)


@row
def Flux2Transformer2DModel__klein_edit():
    return packed({**FLUX2, "guidance_embeds": False}, {}, unit, tokens(6, 22), reference=True, axes=4)


# pipeline_flux2(_klein): t / 1000; one-stream blocks return one tensor [text; noisy; reference]


def flux3(config=(), cond=(), **others):
    config = {
        **{"in_channels": 4, "cond_in_channels": 4, "joint_attention_dim": 32, "timestep_channels": 32},
        **{"axes_dims_rope": (4, 4, 4, 4), **DEPTH, **HEADS, **dict(config)},
    }
    ids = {"img_ids": grid(4), "txt_ids": torch.zeros(6, 4)}
    cond = {"encoder_hidden_states": TEXT, **ids, **dict(cond)}
    feature = stream(1, 0, 16)
    others = {"scheduler": euler(shift=6.93), **others}
    return flow(config, PACKED, cond, "single_transformer_blocks.0", feature, unit, **others)


@row
def Flux3Transformer2DModel():
    return flux3()


@row
def Flux3Transformer2DModel__edit():
    return flux3(cond={"image_cond_hidden_states": REFERENCE, "image_cond_ids": grid(4, 1)})


@row
def Flux3Transformer2DModel__flow_map():
    # the time a step jumps to, in the unit of `timestep`; at 0 the mean velocity leads to the clean sample
    return flux3(config={"flow_map": True}, cond={"target_timestep": torch.zeros(B)})


# modular_pipelines/flux3/denoise: t / 1000, shift 6.93; trunk = mode_blocks.image, then single_transformer_blocks, which
# return (text, [noisy; reference]); the reference is an argument of its own and gives no output


@row
def ChromaTransformer2DModel():
    warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)  # raised by its own constructor
    config = {
        **{"axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8},
        **{"approximator_hidden_dim": 16, "approximator_layers": 1},
    }
    return packed(config, {"attention_mask": torch.ones(B, 6 + 16)}, unit, tokens(6))


# pipeline_chroma: t / 1000, a mask over text and image; one-stream blocks return [text; image]


@row
def BriaTransformer2DModel():
    return packed({"axes_dims_rope": [0, 8, 8]}, {}, thousand, stream(1))


# pipeline_bria: t as it is, "v" of flow matching with FlowMatchEuler, epsilon with DDIM; blocks return (text, image)


def fibo(feature, **others):
    cond = {"text_encoder_layers": [normal(B, 6, 12, seed=i) for i in range(4)]}  # one per block
    return packed({"axes_dims_rope": [0, 8, 8], "text_encoder_dim": 12}, cond, thousand, feature, **others)


@row
def BriaFiboTransformer2DModel():
    return fibo(tokens(6))


@row
def BriaFiboTransformer2DModel__edit():
    return fibo(tokens(6, 22), reference=True)


# pipeline_bria_fibo(_edit): t as it is; one-stream blocks return [text; noisy; reference], two-stream (text, image)


LONGCAT = {"pooled_projection_dim": 12, "axes_dims_rope": (4, 4, 8)}


@row
def LongCatImageTransformer2DModel():
    return packed(LONGCAT, {}, unit, stream(1))


@row
def LongCatImageTransformer2DModel__edit():
    return packed(LONGCAT, {}, unit, stream(1, 0, 16), reference=True)


# pipeline_longcat_image(_edit): t / 1000; guidance is ignored; blocks return (text, image)


@row
def OvisImageTransformer2DModel():
    return packed({"axes_dims_rope": (4, 4, 8), "out_channels": 4}, {}, unit, stream(1))


# pipeline_ovis_image: t / 1000; blocks return (text, image)


def qwen(shapes, clean=PACKED, references=None, config=(), cond=()):
    config = {
        **{"patch_size": 2, "in_channels": 4, "out_channels": 1, "num_layers": 4, "joint_attention_dim": 32},
        **{"axes_dims_rope": (4, 4, 8), **HEADS, **dict(config)},
    }
    cond = {
        **{"encoder_hidden_states": TEXT, "encoder_hidden_states_mask": torch.ones(B, 6, dtype=torch.bool)},
        **{"img_shapes": [shapes] * B, **dict(cond)},
    }
    others = {}
    if references is not None:
        cond["concat"] = references
        others = {"given": joined(references, 1), "predicted": tokens(0, clean.shape[1])}
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    feature = stream(1, 0, clean.shape[1])
    others["scheduler"] = euler(**shift, shift_terminal=0.02)
    return flow(config, clean, cond, "transformer_blocks.2", feature, unit, **others)


@row
def QwenImageTransformer2DModel():
    return qwen([(1, 4, 4)])


@row
def QwenImageTransformer2DModel__edit():
    return qwen([(1, 4, 4), (1, 4, 4)], references=REFERENCE)


@row
def QwenImageTransformer2DModel__edit_plus():
    two = normal(B, 16 + 8, 4, seed=1)
    return qwen([(1, 4, 4), (1, 4, 4), (1, 2, 4)], references=two, config={"zero_cond_t": True})


@row
def QwenImageTransformer2DModel__layered():
    config = {"use_additional_t_cond": True, "use_layer3d_rope": True}
    cond = {"additional_t_cond": torch.zeros(B, dtype=torch.long)}
    layers = normal(B, 3 * 16, 4)  # all noisy
    return qwen([(1, 4, 4)] * 4, layers, REFERENCE, config, cond)


# pipeline_qwenimage(_edit, _edit_plus, _layered): t / 1000, the time projection multiplies by 1000; blocks return (text,
# [noisy; reference])


# ------------------------------------------------------------------------------------------------- items, patches, video


JOY = {
    **{"patch_size": [1, 2, 2], "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 32},
    **{"num_layers": 4, "rope_dim_list": [4, 6, 6], "theta": 256},
}


@row
def JoyImageEditTransformer3DModel():
    cond = {"encoder_hidden_states": TEXT}
    clean = normal(B, 1, 4, 1, 8, 8)  # (B, items, C, T, H, W)
    return flow(JOY, clean, cond, "double_blocks.2", stream(0), thousand, scheduler=euler(shift=1.5))


@row
def JoyImageEditTransformer3DModel__edit():
    reference = normal(B, 1, 4, 1, 8, 8, seed=1)
    others = {"given": joined(reference, 1, first=True), "predicted": tokens(-1), "scheduler": euler(shift=1.5)}
    cond = {"encoder_hidden_states": TEXT, "concat": reference}
    clean = normal(B, 1, 4, 1, 8, 8)
    return flow(JOY, clean, cond, "double_blocks.2", stream(0, 0, 16), thousand, **others)


# pipeline_joyimage_edit: t as it is, the items are [references; noisy]; the forward moves the last, noisy item to the
# front of its tokens and its prediction back; blocks return (image, text)


def joy_plus(reference=None):
    items = [(1, 2, 4)] if reference is None else [(1, 2, 4), (1, 3, 4)]  # sizes in patches
    cond = {
        **{"encoder_hidden_states": TEXT, "encoder_hidden_states_mask": torch.ones(B, 6)},
        **{"shape_list": [items] * B},
    }
    others = {"scheduler": euler(shift=1.5)}
    if reference is not None:
        cond["concat"] = reference
        others |= {"given": joined(reference, 1), "predicted": tokens(0, 8)}
    clean = normal(B, 8, 4, 1, 2, 2)  # (B, patches, C, pt, ph, pw)
    return flow(JOY, clean, cond, "double_blocks.2", stream(0, 0, 8), thousand, **others)


@row
def JoyImageEditPlusTransformer3DModel():
    return joy_plus()


@row
def JoyImageEditPlusTransformer3DModel__edit():
    return joy_plus(normal(B, 12, 4, 1, 2, 2, seed=1))


# pipeline_joyimage_edit_plus: t as it is, patches [noisy; references], here noisy first; blocks return (image, text)


HUNYUAN = {
    **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, **DEPTH},
    **{"num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 32},
    **{"pooled_projection_dim": 12, "rope_axes_dim": (4, 4, 4)},
}
HUNYUAN_COND = {"encoder_hidden_states": TEXT, "encoder_attention_mask": torch.ones(B, 6), **POOLED}
GUIDANCE = {"guidance": torch.full((B,), 6000.0)}


def hunyuan_video(config, cond, feature, **others):
    middle, cond = "single_transformer_blocks.0", {**HUNYUAN_COND, **cond}
    return flow({**HUNYUAN, **config}, VIDEO, cond, middle, feature, thousand, scheduler=euler(shift=7.0), **others)


@row
def HunyuanVideoTransformer3DModel():
    return hunyuan_video({}, GUIDANCE, stream(0))


@row
def HunyuanVideoTransformer3DModel__latent_concat():
    image = normal(B, 5, 2, 8, 8, seed=1)  # the first frame's latents and a mask of it
    config = {"in_channels": 9, "guidance_embeds": False, "image_condition_type": "latent_concat"}
    return hunyuan_video(config, {"concat": image}, stream(0), given=joined(image, 1))


@row
def HunyuanVideoTransformer3DModel__token_replace():
    # the clean first frame stands in place of a noisy one, which is not denoised: what is noisy is the other frames
    frame = normal(B, 4, 1, 8, 8, seed=1)
    others = {"given": joined(frame, 2, first=True), "predicted": lambda out: out.sample[:, :, 1:]}
    cond = {**GUIDANCE, "concat": Concat(frame, dim=2, first=True)}
    return hunyuan_video({"image_condition_type": "token_replace"}, cond, stream(0, 16), **others)


# pipeline_hunyuan_video(_image2video): t as it is, guidance times 1000; blocks return (video, text)


@row
def HunyuanVideoFramepackTransformer3DModel():
    history = {
        **{"image_embeds": normal(B, 5, 12), "indices_latents": torch.tensor([8, 9])},
        **{"latents_clean": VIDEO.flip(0), "indices_latents_clean": torch.tensor([0, 7])},
        **{"latents_history_2x": VIDEO.flip(1), "indices_latents_history_2x": torch.tensor([5, 6])},
        **{"latents_history_4x": normal(B, 4, 4, 8, 8), "indices_latents_history_4x": torch.tensor([1, 2, 3, 4])},
    }
    config = {"has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True}
    return hunyuan_video(config, {**GUIDANCE, **history}, stream(0, -32))


# pipeline_hunyuan_video_framepack: t as it is; the history is given apart and stands before the noisy tokens;
# blocks return ([4x; 2x; clean; noisy], text)


def hunyuan15(config=(), cond=()):
    config = {
        **{"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4},
        **{"num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 32, "text_embed_2_dim": 12},
        **{"image_embed_dim": 10, "rope_axes_dim": (2, 2, 4), **dict(config)},
    }
    image = normal(B, 5, 2, 8, 8, seed=1)  # the first frame's latents and a mask of it: zeros for text to video
    cond = {
        **{"encoder_hidden_states": TEXT, "encoder_attention_mask": torch.ones(B, 6)},
        **{"encoder_hidden_states_2": normal(B, 4, 12), "encoder_attention_mask_2": torch.ones(B, 4)},
        **{"image_embeds": normal(B, 3, 10), "concat": image, **dict(cond)},
    }
    others = {"given": joined(image, 1), "scheduler": euler(shift=5.0)}
    return flow(config, VIDEO, cond, "transformer_blocks.2", stream(0), thousand, **others)


@row
def HunyuanVideo15Transformer3DModel():
    return hunyuan15()


@row
def HunyuanVideo15Transformer3DModel__meanflow():
    return hunyuan15({"use_meanflow": True}, {"timestep_r": torch.zeros(B)})  # r = 0 as in HunyuanImage


# pipeline_hunyuan_video1_5(_image2video): t as it is, always 2C + 1 channels; blocks return (video, text)


@row
def MotifVideoTransformer3DModel():
    config = {
        **{"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12},
        **{"num_layers": 2, "num_single_layers": 3, "num_decoder_layers": 1, "patch_size": 2, "text_embed_dim": 32},
        **{"image_embed_dim": 10, "rope_axes_dim": (4, 4, 4)},
    }
    image = normal(B, 5, 2, 8, 8, seed=1)  # the first frame's latents and a mask of it: zeros for text to video
    cond = {
        **{"encoder_hidden_states": TEXT, "encoder_attention_mask": torch.ones(B, 6)},
        **{"image_embeds": normal(B, 3, 10), "concat": image},
    }
    others = {"given": joined(image, 1), "scheduler": DYNAMIC}
    return flow(config, VIDEO, cond, "single_transformer_blocks.0", stream(0), thousand, **others)


# pipeline_motif_video(_image2video): t as it is, always 2C + 1 channels; blocks return (video, text); the last
# num_decoder_layers blocks start anew from the embedded video
