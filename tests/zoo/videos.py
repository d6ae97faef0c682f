"""Rows of the zoo: video transformers, some with sound beside the video.

Where a released variant keeps the first frame clean, the row's x_t is what is noisy, and the frame is the condition
"concat", joined in front of x_t with time 0.
"""
# ruff: noqa: C408

import torch

from zoo import FLOW_T, INDEX_T, NO_CPU_BACKWARD, SIGMA_T, B, Tiny, normal, row

TEXT = {"encoder_hidden_states": normal(B, 6, 16)}
VIDEO = normal(B, 4, 2, 8, 8, seed=1)  # (B, C, F, H, W): 32 tokens in patches of 1 x 2 x 2
FIRST = normal(B, 4, 1, 8, 8, seed=2)  # a clean first frame: 16 tokens
LAST = normal(B, 2, 8, 8, 4, seed=3)  # (B, F, H, W, C)


def scheduler(name, **config):
    def make():
        import diffusers

        return getattr(diffusers, name)(**config)

    return make


def flow(**config):
    return scheduler("FlowMatchEulerDiscreteScheduler", **config)


def whole(out):
    return out


def first(out):
    return out[0]


def sample(output):
    return output.sample


def both(output):
    return {"hidden_states": output.sample, "audio_hidden_states": output.audio_sample}


def streams(x, t):
    return dict(x)


def timestep(t):
    return {"timestep": t}


def hidden(x, t):
    return {"hidden_states": x}


def joined(concat, dim):
    return lambda x, t: {"hidden_states": torch.cat([x, concat], dim=dim)}


def led(concat, dim):
    return lambda x, t: {"hidden_states": torch.cat([concat, x], dim=dim)}


def led_time(t, clean, noisy):
    """A time per token, 0 for the `clean` ones in front: (B, clean + noisy)."""
    return torch.cat([t.new_zeros(len(t), clean), t[:, None].expand(-1, noisy)], dim=1)


FLOW = {"time": timestep, "given": hidden, "predicted": sample, "prediction": "flow_prediction", "t": FLOW_T}

# ---- CogVideoX and its kin: v on a table, (B, F, C, H, W)
_COG = dict(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
    num_layers=4, sample_width=8, sample_height=8, sample_frames=5, temporal_compression_ratio=4, max_text_seq_length=6,
)  # fmt: skip
_COG_T = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
)  # fmt: skip
_COG_ROW = dict(
    clean=normal(B, 2, 4, 8, 8), middle="transformer_blocks.2", feature=first, time=timestep, predicted=sample,
    prediction="v_prediction", t=INDEX_T,
)  # fmt: skip
_COG_IMAGE = normal(B, 2, 4, 8, 8, seed=4)


@row
def CogVideoXTransformer3DModel():
    return Tiny(
        config=_COG, cond=TEXT, given=hidden, scheduler=scheduler("CogVideoXDDIMScheduler", **_COG_T), **_COG_ROW
    )


# pipeline_cogvideox: t as is; convert_cogvideox: v_prediction, snr_shift_scale 3 (2B) or 1 (5B)


@row
def CogVideoXTransformer3DModel__i2v():
    rope = normal(16, 8)  # 1.5: patches of 2 frames, rotary positions (tokens, channels), `ofs` of one value
    return Tiny(
        config=_COG | dict(in_channels=8, patch_size_t=2, ofs_embed_dim=8, use_rotary_positional_embeddings=True),
        cond=TEXT | {"concat": _COG_IMAGE, "ofs": torch.full((1,), 2.0), "image_rotary_emb": (rope.cos(), rope.sin())},
        given=joined(_COG_IMAGE, 2),
        scheduler=scheduler("CogVideoXDPMScheduler", snr_shift_scale=1.0, **_COG_T),
        **_COG_ROW,
    )


# pipeline_cogvideox_image2video: image latents behind the channels; Fun-Control joins its control video the same way


@row
def ConsisIDTransformer3DModel():
    face = dict(
        is_train_face=True, cross_attn_interval=2, cross_attn_dim_head=1, cross_attn_num_heads=1, LFE_id_dim=2,
        LFE_vit_dim=2, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1,
        LFE_output_dim=10, LFE_ff_mult=1, LFE_num_scale=1,
    )  # fmt: skip
    return Tiny(
        config=_COG | face | dict(in_channels=8),
        cond=TEXT | {"concat": _COG_IMAGE, "id_vit_hidden": [normal(B, 2, 2)], "id_cond": normal(B, 2)},
        given=joined(_COG_IMAGE, 2),
        scheduler=scheduler("CogVideoXDPMScheduler", snr_shift_scale=1.0, **_COG_T),
        **_COG_ROW,
    )


# pipeline_consisid: CogVideoX-5B image to video; image latents are always joined to the channels


# ---- epsilon on a table


@row
def AllegroTransformer3DModel():
    return Tiny(
        config=dict(
            num_attention_heads=2, attention_head_dim=12, num_layers=4, cross_attention_dim=24, caption_channels=16,
            sample_width=8, sample_height=8, sample_frames=2,
        ),
        clean=VIDEO,
        cond=TEXT | {"encoder_attention_mask": torch.ones(B, 6)},
        middle="transformer_blocks.2",
        feature=whole,
        time=timestep,
        given=hidden,
        predicted=sample,
        prediction="epsilon",
        scheduler=scheduler(
            "EulerAncestralDiscreteScheduler", beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
        t=INDEX_T,
    )  # fmt: skip


# pipeline_allegro: t as is; the release's own training script: DDPM's default table, epsilon


def _latte(layers, middle, feature):
    return Tiny(
        config=dict(
            num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=layers,
            cross_attention_dim=8, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
            caption_channels=16, video_length=2,
        ),
        clean=VIDEO,
        cond=TEXT | {"enable_temporal_attentions": True},
        middle=middle,
        feature=feature,
        time=timestep,
        given=hidden,
        predicted=lambda output: output.sample[:, :4],
        prediction="epsilon",
        scheduler=scheduler(
            "DDIMScheduler", beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False
        ),
        t=INDEX_T,
    )  # fmt: skip


@row
def LatteTransformer3DModel():
    return _latte(4, "transformer_blocks.2", lambda out: out.unflatten(0, (B, 2)))


@row
def LatteTransformer3DModel__odd():
    return _latte(3, "temporal_transformer_blocks.1", lambda out: out.unflatten(0, (B, 16)))


# pipeline_latte: t as is, variance channels dropped. Spatial and temporal blocks take turns: (B F, N, C), (B N, F, C)


# ---- LTX


_LTX = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=16,
    caption_channels=16,
)
_LTX_T = flow(
    use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
    shift_terminal=0.1,
)  # fmt: skip
_LTX_COND = TEXT | {"encoder_attention_mask": torch.ones(B, 6), "num_frames": 2, "height": 4, "width": 4}
TOKENS = normal(B, 32, 4)


@row
def LTXVideoTransformer3DModel():
    return Tiny(
        config=_LTX | dict(num_layers=4), clean=TOKENS, cond=_LTX_COND, middle="transformer_blocks.2", feature=whole,
        scheduler=_LTX_T, **FLOW,
    )  # fmt: skip


@row
def LTXVideoTransformer3DModel__i2v():
    frame = normal(B, 16, 4, seed=5)
    return Tiny(
        config=_LTX | dict(num_layers=4),
        clean=TOKENS[:, 16:],
        cond=_LTX_COND | {"concat": frame},
        middle="transformer_blocks.2",
        feature=lambda out: out[:, 16:],
        scheduler=_LTX_T,
        **FLOW
        | dict(
            time=lambda t: {"timestep": led_time(t, 16, 16)},
            given=led(frame, 1),
            predicted=lambda output: output.sample[:, 16:],
        ),
    )


# pipeline_ltx: t as is. pipeline_ltx_image2video: a time per token, 0 for the clean frame's. pipeline_ltx_condition's
# `-noise_pred` undoes the sign of dt in the scheduler's step with per_token_timesteps

_LTX2 = _LTX | dict(
    num_layers=4, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
    audio_cross_attention_dim=8, rope_double_precision=False,
)  # fmt: skip
_LTX2_COND = _LTX_COND | {
    "audio_encoder_hidden_states": normal(B, 6, 16, seed=6), "audio_encoder_attention_mask": torch.ones(B, 6),
    "audio_num_frames": 9, "fps": 24.0,
}  # fmt: skip
_LTX2_ROW = dict(
    clean={"hidden_states": TOKENS, "audio_hidden_states": normal(B, 9, 4)}, middle="transformer_blocks.2",
    feature=list, time=lambda t: {"timestep": t, "sigma": t}, given=streams, predicted=both,
    prediction="flow_prediction", scheduler=_LTX_T, t=FLOW_T,
)  # fmt: skip


@row
def LTX2VideoTransformer3DModel():
    return Tiny(config=_LTX2, cond=_LTX2_COND, **_LTX2_ROW)


@row
def LTX2VideoTransformer3DModel__ltx23():
    return Tiny(
        config=_LTX2
        | dict(
            gated_attn=True, audio_gated_attn=True, cross_attn_mod=True, audio_cross_attn_mod=True,
            use_prompt_embeddings=False, perturbed_attn=True,
        ),
        cond=_LTX2_COND | {"audio_encoder_hidden_states": normal(B, 6, 8, seed=6), "use_cross_timestep": True},
        **_LTX2_ROW,
    )  # fmt: skip


# pipeline_ltx2: `timestep` and `sigma` are both t, of video and sound alike (2.0 does not read `sigma`)


@row
def SanaWMLTX2RefinerTransformer3DModel():
    angles = normal(B, 32, 16)
    return Tiny(
        config=_LTX2,
        clean=TOKENS,
        cond=TEXT | {"video_rotary_emb": (angles.cos(), angles.sin()), "encoder_attention_mask": torch.ones(B, 6)},
        middle="transformer_blocks.2",
        feature=whole,
        scheduler=flow(shift=1.0),
        **FLOW | dict(time=lambda t: {"timestep": t[:, None].expand(-1, 32)}),
    )


# sana_wm/refiner: a time per token, all sigma * 1000; x_0 = x_t - sigma v; its loop adds a KV cache of past blocks


# ---- flow, (B, C, F, H, W)


@row
def MochiTransformer3DModel():
    mask = torch.ones(B, 6, dtype=torch.bool)
    mask[0, 4:] = False
    return Tiny(
        config=dict(
            num_attention_heads=2, attention_head_dim=8, num_layers=4, pooled_projection_dim=16, in_channels=4,
            text_embed_dim=16, time_embed_dim=4, max_sequence_length=6,
        ),
        clean=VIDEO,
        cond=TEXT | {"encoder_attention_mask": mask},
        middle="transformer_blocks.2",
        feature=first,
        scheduler=flow(invert_sigmas=True),
        **FLOW | dict(time=lambda t: {"timestep": 1000 - t}, prediction="-flow_prediction"),
    )  # fmt: skip


# pipeline_mochi: t of the scheduler as is, and with invert_sigmas it runs from 0 (noise) to 1000 (clean), dt > 0


_COSMOS = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=4, mlp_ratio=2,
    text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32),
)  # fmt: skip
_PADDING = {"padding_mask": torch.zeros(1, 1, 16, 16)}  # of batch 1: the model repeats it
_COSMOS_ROW = dict(clean=VIDEO, middle="transformer_blocks.2", feature=whole)
_COSMOS_TIME = FLOW | dict(time=lambda t: {"timestep": t / 1000})


@row
def CosmosTransformer3DModel():
    return Tiny(
        config=_COSMOS,
        cond=TEXT | _PADDING | {"fps": 30},
        time=lambda t: {"timestep": t.log() / 4},
        given=lambda x, t: {"hidden_states": x / (t**2 + 0.25).sqrt().reshape(-1, 1, 1, 1, 1)},
        predicted=sample,
        prediction="edm",
        scheduler=scheduler("EDMEulerScheduler", sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min"),
        t=SIGMA_T,
        **_COSMOS_ROW,
    )


# pipeline_cosmos_text2world: scheduler.scale_model_input and c_noise; convert_cosmos: sigma_data 0.5, "epsilon"


@row
def CosmosTransformer3DModel__v2():
    def karras():
        made = flow(use_karras_sigmas=True)()
        made.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
        return made

    config = _COSMOS | dict(extra_pos_embed_type=None, rope_scale=(1.0, 4.0, 4.0))
    return Tiny(config=config, cond=TEXT | _PADDING, scheduler=karras, **_COSMOS_ROW, **_COSMOS_TIME)


# pipeline_cosmos2_text2image: with s = sigma / (1 + sigma), the model is given s and (1 - s) x, which is x_t of flow
# matching, and x_0 = (1 - s) x - s v. The scheduler's own sigmas go to 80


@row
def CosmosTransformer3DModel__v2_5():
    return Tiny(
        config=_COSMOS
        | dict(
            in_channels=5, extra_pos_embed_type=None, rope_scale=(1.0, 3.0, 3.0), use_crossattn_projection=True,
            crossattn_proj_in_channels=20, encoder_hidden_states_channels=16,
        ),
        cond=_PADDING | {"encoder_hidden_states": normal(B, 6, 20), "condition_mask": torch.zeros(B, 1, 2, 8, 8)},
        scheduler=scheduler(
            "UniPCMultistepScheduler", use_karras_sigmas=True, use_flow_sigmas=True,
            prediction_type="flow_prediction", sigma_max=200.0, sigma_min=0.01,
        ),
        **_COSMOS_ROW,
        **_COSMOS_TIME,
    )  # fmt: skip


# pipeline_cosmos2_5_predict: the time is the scheduler's sigma, in 0..1; a mask of clean frames is always an argument


def _cosmos3(sound):
    # One packed sequence [text, B videos of 8 tokens, B sounds of 5] whose every part attends to all others: B samples
    # in one call are items of one document. What belongs to a sample is its rows.
    text, tokens, waves = 4, torch.arange(4, 4 + 8 * B), torch.arange(4 + 8 * B, 4 + (8 + 5 * sound) * B)
    grid = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
    line = torch.stack([torch.arange(5), torch.zeros(5), torch.zeros(5)]).long()
    places = [grid + text] * B + [line + text] * B * sound
    audio = {
        "sound_token_shapes": [(5, 1, 1)] * B, "sound_sequence_indexes": waves, "sound_mse_loss_indexes": waves,
        "sound_noisy_frame_indexes": [torch.arange(5)] * B,
    }  # fmt: skip
    videos = [normal(2, 2, 4, 4, seed=i) for i in range(B)]
    sounds = [normal(3, 5, seed=i) for i in range(B)]

    def times(t):
        spread = {"vision_timesteps": t.repeat_interleave(8)}
        return spread | {"sound_timesteps": t.repeat_interleave(5)} if sound else spread

    def given(x, t):
        packed = {"vision_tokens": [video[None] for video in (x["vision_tokens"] if sound else x)]}
        return dict(x) | packed if sound else packed

    def predicted(output):
        video = [video[0] for video in output.sample]
        return {"vision_tokens": video, "sound_tokens": output.sound} if sound else video

    def feature(out):
        video, heard = out[1][: 8 * B].unflatten(0, (B, 8)), out[1][8 * B :].unflatten(0, (B, -1))
        return torch.cat([video, heard], 1) if sound else video

    return Tiny(
        config=dict(
            head_dim=6, hidden_size=12, intermediate_size=24, latent_channel=2, latent_patch_size=2,
            num_attention_heads=2, num_hidden_layers=4, num_key_value_heads=1, patch_latent_dim=8,
            rope_axes_dim=[1, 1, 1], vocab_size=32, sound_gen=bool(sound), sound_dim=3 if sound else None,
        ),
        clean={"vision_tokens": videos, "sound_tokens": sounds} if sound else videos,
        cond={
            "input_ids": torch.arange(text), "text_indexes": torch.arange(text), "und_len": text,
            "position_ids": torch.cat([torch.arange(text).expand(3, -1), *places], dim=1),
            "sequence_length": text + len(tokens) + len(waves), "vision_token_shapes": [(2, 2, 2)] * B,
            "vision_sequence_indexes": tokens, "vision_mse_loss_indexes": tokens,
            "vision_noisy_frame_indexes": [torch.arange(2)] * B, **(audio if sound else {}),
        },
        middle="layers.2",
        feature=feature,
        time=times,
        given=given,
        predicted=predicted,
        prediction="flow_prediction",
        scheduler=scheduler(
            "UniPCMultistepScheduler", use_karras_sigmas=True, use_flow_sigmas=True,
            prediction_type="flow_prediction", sigma_max=200.0, sigma_min=0.147,
        ),
        t=FLOW_T,
    )  # fmt: skip


@row
def Cosmos3OmniTransformer():
    return _cosmos3(0)


@row
def Cosmos3OmniTransformer__sound():
    return _cosmos3(1)


# pipeline_cosmos3_omni: t of the scheduler, 0..1000, once per noisy patch (the model scales it by timestep_scale); its
# one video is a list of one. Layers return (understanding, generation); the noisy tokens are the generation rows


_EASY = dict(
    attention_head_dim=16, num_attention_heads=2, in_channels=4, mmdit_layers=4, num_layers=4, out_channels=4,
    patch_size=2, text_embed_dim=16, time_embed_dim=8,
)  # fmt: skip
_EASY_ROW = dict(clean=VIDEO, middle="transformer_blocks.2", feature=first, scheduler=flow(shift=5.0), **FLOW)


@row
def EasyAnimateTransformer3DModel():
    return Tiny(config=_EASY, cond=TEXT, **_EASY_ROW)


@row
def EasyAnimateTransformer3DModel__inpaint():
    return Tiny(config=_EASY | dict(in_channels=9), cond=TEXT | {"inpaint_latents": normal(B, 5, 2, 8, 8)}, **_EASY_ROW)


# pipeline_easyanimate: t as is; mask and masked video are an argument that the model joins itself (control latents too)


# Linear attention divides by relu(q) relu(k), which is 0 where a narrow head's q happens to be all negative.
_SANA = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=4,
    num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=16,
    sample_size=8, rope_max_seq_len=32,
)  # fmt: skip
_SANA_COND = TEXT | {"encoder_attention_mask": torch.ones(B, 6)}


@row
def SanaVideoTransformer3DModel():
    return Tiny(
        config=_SANA, clean=VIDEO, cond=_SANA_COND, middle="transformer_blocks.2", feature=whole, **FLOW,
        scheduler=scheduler(
            "DPMSolverMultistepScheduler", flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    )  # fmt: skip


@row
def SanaVideoTransformer3DModel__i2v():
    return Tiny(
        config=_SANA,
        clean=VIDEO,
        cond=_SANA_COND | {"concat": FIRST},
        middle="transformer_blocks.2",
        feature=lambda out: out[:, 16:],
        scheduler=flow(shift=8.0),
        **FLOW
        | dict(
            time=lambda t: {"timestep": led_time(t, 16, 32).reshape(-1, 1, 3, 4, 4)},
            given=led(FIRST, 2),
            predicted=lambda output: output.sample[:, :, 1:],
        ),
    )


# pipeline_sana_video: t as is. pipeline_sana_video_i2v: a time per patch (B, 1, F, h, w), 0 in the clean first frame


def _sana_wm(frames):
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([8.0, 8.0, 4.0, 4.0])]).repeat(B, frames, 1)
    return dict(
        config=dict(
            in_channels=4, num_layers=4, hidden_size=32, num_attention_heads=2, linear_head_dim=16,
            chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=4, image_size=64, caption_channels=16,
        ),
        cond={
            "encoder_hidden_states": normal(B, 1, 6, 16), "encoder_attention_mask": torch.ones(B, 6),
            "camera_conditions": camera, "chunk_plucker": normal(B, 6, frames, 4, 4),
        },
        clean=normal(B, 4, 2, 4, 4),
        middle="blocks.2",
        scheduler=flow(shift=9.8),
    )  # fmt: skip


@row
def SanaWMTransformer3DModel():
    return Tiny(
        **_sana_wm(2), feature=whole, **FLOW | dict(time=lambda t: {"timestep": t[:, None, None].expand(-1, 1, 2)})
    )


@row
def SanaWMTransformer3DModel__i2v():
    frame, plain = normal(B, 4, 1, 4, 4, seed=7), _sana_wm(3)
    return Tiny(
        **plain | dict(cond=plain["cond"] | {"concat": frame}),
        feature=lambda out: out[:, 16:],
        **FLOW
        | dict(
            time=lambda t: {"timestep": led_time(t, 1, 2)[:, None]},
            given=led(frame, 2),
            predicted=lambda output: output.sample[:, :, 1:],
        ),
    )


# pipeline_sana_wm: a time per frame (B, 1, F), cut to whole numbers by the model, 0 for the first frame, which the
# release always keeps clean; its `-noise_pred` undoes the sign of dt in the scheduler's step with per_token_timesteps


# ---- Kandinsky: flow, (B, F, H, W, C)

_K = dict(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=32,
    num_text_blocks=1, num_visual_blocks=4, axes_dims=(4, 6, 6),
)  # fmt: skip
_K_COND = TEXT | {"pooled_projections": normal(B, 8)}
_K5_COND = _K_COND | {
    "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(4)), "text_rope_pos": torch.arange(6),
    "scale_factor": (1.0, 2.0, 2.0),
}  # fmt: skip
_K_CONCAT = torch.cat([normal(B, 2, 8, 8, 4, seed=8), torch.ones(B, 2, 8, 8, 1)], dim=-1)  # condition, and its mask
_K_ROW = dict(clean=LAST, middle="visual_transformer_blocks.2")


@row
def Kandinsky5Transformer3DModel():
    return Tiny(config=_K, cond=_K5_COND, feature=whole, scheduler=flow(shift=5.0), **_K_ROW, **FLOW)


@row
def Kandinsky5Transformer3DModel__visual_cond():
    return Tiny(
        config=_K | dict(visual_cond=True),
        cond=_K5_COND | {"concat": _K_CONCAT},
        feature=whole,
        scheduler=flow(shift=5.0),
        **_K_ROW,
        **FLOW | dict(given=joined(_K_CONCAT, -1)),
    )


# pipeline_kandinsky: t as is; with visual_cond x_t, condition and mask are joined along the last dimension (zeros where
# there is no condition)


_K6 = _K | dict(visual_cond=True, in_audio_dim=5, out_audio_dim=5, ca_rope=True, cross_gates=True, fix_modulation=True)


@row
def Kandinsky6Transformer3DModel():
    return Tiny(
        config=_K6,
        cond=_K_COND | {"concat": {"hidden_states": _K_CONCAT}},
        feature=list,
        scheduler=flow(shift=5.0),
        **_K_ROW | dict(clean={"hidden_states": LAST, "audio_hidden_states": normal(B, 7, 5)}),
        **FLOW
        | dict(
            given=lambda x, t: dict(x) | {"hidden_states": torch.cat([x["hidden_states"], _K_CONCAT], dim=-1)},
            predicted=both,
        ),
    )


@row
def Kandinsky6Transformer3DModel__video():
    return Tiny(
        config=_K6 | dict(visual_cond=False), cond=_K_COND, feature=first, scheduler=flow(shift=5.0), **_K_ROW, **FLOW
    )


# pipeline_kandinsky6_ti2va: t as is, one for both; released with visual_cond, joined to the video alone; without sound
# the blocks return (video, None). Checkpoints with a PiflowScheduler put out a grid and no prediction of x_t


@row
def Kandinsky6SRTransformer3DModel():
    anchor = torch.cat([normal(B, 1, 16, 16, 4, seed=9), torch.ones(B, 1, 16, 16, 1)], dim=-1)
    return Tiny(
        config=dict(
            in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=16, ff_dim=32, num_visual_blocks=4,
            axes_dims=(4, 6, 6), nabla_window=(3, 3, 3),
        ),
        clean=normal(B, 1, 16, 16, 4),
        cond={"concat": anchor},
        middle="visual_transformer_blocks.2",
        feature=whole,
        scheduler=flow(shift=5.0),
        **FLOW | dict(given=joined(anchor, -1)),
    )  # fmt: skip


NO_CPU_BACKWARD.add("Kandinsky6SRTransformer3DModel")

# pipeline_kandinsky6_sr: t as is; anchor and its mask always behind the channels (zeros in the release). Its "noise" is
# the low-resolution video with noise in it. Tokens are in the order of 8 x 8 windows; checkpoints that put out 10 times
# the channels are distilled (Piflow)


# ---- packed rows with one table of times


@row
def MiniMaxH3Transformer3DModel():
    text, audio, video = torch.arange(4), torch.arange(4, 10), torch.arange(10, 18)
    tags = torch.tensor([1] * 4 + [2] * 6 + [0] * 8)
    return Tiny(
        config=dict(
            num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=4, num_refiner_layers=2,
            ffn_dim=32, in_channels=4, audio_in_channels=6, text_dim=16, freq_dim=8, time_embed_hidden_dim=24,
            time_embed_dim=16, rope_freq_dim=2,
        ),
        clean={"hidden_states": normal(B, 8, 16), "audio_hidden_states": normal(B, 6, 6)},
        cond={
            "encoder_hidden_states": normal(B, 4, 16), "timestep_indices": torch.zeros(18, dtype=torch.long),
            "token_tags": tags, "position_ids": normal(18, 3), "video_indices": video, "audio_indices": audio,
            "text_indices": text,
        },
        middle="transformer_blocks.2",
        feature=lambda out: torch.cat([out[:, audio], out[:, video]], 1),
        time=lambda t: {"timestep": 1 - t[:1] / 1000},
        given=streams,
        predicted=both,
        prediction="-flow_prediction",
        scheduler=scheduler("MiniMaxH3Scheduler", shift=12.0),
        t=torch.full((B,), 480.0),
    )  # fmt: skip


# scheduling_minimax_h3: t = 1 - sigma, x_0 = x_t + sigma v. `timestep` is a table of distinct times, `timestep_indices`
# says which of them a row of the packed sequence has, for all samples of the batch: a time per sample needs a call per
# sample, so all samples of this row have one. Times of video and sound may differ (shift 12 and 3)
