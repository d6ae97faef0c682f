"""Rows of the zoo: Wan and the video models built on it."""
# ruff: noqa: C408

import warnings

import diffusers
import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from perceptual_diffusion.adapters import Concat
from zoo import FLOW_T, NO_CPU_BACKWARD, B, Tiny, normal, row

WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=32, num_layers=4, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
)  # fmt: skip
IMAGE = dict(image_dim=8, added_kv_proj_dim=24)
CLEAN, TEXT = (B, 4, 3, 8, 8), {"encoder_hidden_states": normal(B, 6, 16)}
SEEN = {"encoder_hidden_states_image": normal(B, 5, 8)}  # what CLIP sees of the first frame


def unipc(shift):
    return lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )


def concat_channels(condition):
    return lambda x, t: {"hidden_states": torch.cat([x, condition], 1)}


def wan(cond=TEXT, *, base=WAN, config=(), shift=3.0, **other):
    """Give a row of a model that takes t as it is; `config` and `other` are what differs from Wan."""
    plain = dict(
        config={**base, **dict(config)},
        clean=normal(*CLEAN),
        cond=cond,
        middle="blocks.2",
        feature=lambda raw: raw,
        time=lambda t: {"timestep": t},
        given=lambda x, t: {"hidden_states": x},
        predicted=lambda output: output.sample,
        prediction="flow_prediction",
        scheduler=unipc(shift),
        t=FLOW_T,
    )
    return Tiny(**{**plain, **other})


@row
def WanTransformer3DModel():
    return wan()  # pipeline_wan: t as it is, the output goes to the scheduler


@row
def WanTransformer3DModel__i2v():
    condition = normal(B, 4 + 4, 3, 8, 8)
    return wan(
        {**TEXT, **SEEN, "concat": condition}, config={"in_channels": 12, **IMAGE}, given=concat_channels(condition)
    )  # pipeline_wan_i2v: a mask of four channels and the first frame's latents after the noisy ones


@row
def WanTransformer3DModel__expand_timesteps():
    return wan(shift=5.0, time=lambda t: {"timestep": t[:, None].expand(B, 3 * 4 * 4)})
    # pipeline_wan, Wan2.2-TI2V-5B: config.expand_timesteps of the pipeline, one time per token


@row
def WanTransformer3DModel__first_frame():
    condition = normal(B, 4, 1, 8, 8, seed=1)

    def time(t):  # the first frame is at time 0
        return {"timestep": torch.cat([torch.zeros(B, 16), t[:, None].expand(B, 2 * 16)], 1)}

    return wan(
        {**TEXT, "concat": Concat(condition, dim=2, first=True)},
        shift=5.0,
        clean=normal(B, 4, 2, 8, 8),
        feature=lambda raw: raw[:, 16:],
        time=time,
        given=lambda x, t: {"hidden_states": torch.cat([condition, x], 2)},
        predicted=lambda output: output.sample[:, :, 1:],
    )  # pipeline_wan_i2v, Wan2.2-TI2V-5B: the first frame is clean, and what is predicted of it is thrown away


@row
def SkyReelsV2Transformer3DModel():
    return wan(shift=8.0)  # pipeline_skyreels_v2: as Wan


@row
def SkyReelsV2Transformer3DModel__i2v():
    condition = normal(B, 4 + 4, 3, 8, 8)
    return wan(
        {**TEXT, **SEEN, "concat": condition},
        shift=5.0,
        config={"in_channels": 12, **IMAGE},
        given=concat_channels(condition),
    )  # pipeline_skyreels_v2_i2v: as Wan


@row
def SkyReelsV2Transformer3DModel__diffusion_forcing():
    return wan(
        {**TEXT, "enable_diffusion_forcing": True, "fps": [1] * B},
        shift=8.0,
        time=lambda t: {"timestep": t[:, None].expand(B, 3)},
    )
    # pipeline_skyreels_v2_diffusion_forcing: one time per latent frame; where config.inject_sample_info is on, diffusers
    # adds the embedded fps (0 is 16 a second, 1 the rest) to one sample only, so it is off here


@row
def ChronoEditTransformer3DModel():
    condition = normal(B, 4 + 4, 2, 8, 8)
    return wan(
        {**TEXT, **SEEN, "concat": condition},
        clean=normal(B, 4, 2, 8, 8),
        config={"in_channels": 12, "rope_temporal_skip_len": 8, **IMAGE},
        given=concat_channels(condition),
    )  # pipeline_chronoedit: always image to video, channels as in Wan; two frames are the first and the edited


@row
def WanVACETransformer3DModel():
    return wan(
        {**TEXT, "control_hidden_states": normal(B, 8, 3, 8, 8), "control_hidden_states_scale": torch.ones(2)},
        config={"vace_layers": [0, 2], "vace_in_channels": 8},
    )  # pipeline_wan_vace: as Wan; the scale is one number per vace layer, no batch


@row
def WanAnimateTransformer3DModel():
    condition = normal(B, 4 + 4, 3, 8, 8)
    return wan(
        {
            **TEXT,
            **SEEN,
            "pose_hidden_states": normal(B, 4, 2, 8, 8),
            "face_pixel_values": normal(B, 3, 5, 16, 16),
            "concat": condition,
        },
        shift=5.0,
        config=dict(
            in_channels=12, latent_channels=4, motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8,
            face_encoder_num_heads=2, inject_face_latents_blocks=2, **IMAGE,
        ),
        given=concat_channels(condition),
    )  # fmt: skip
    # pipeline_wan_animate: channels as in Wan; the reference's frame comes first and is denoised with the others


@row
def WanAnimate2Transformer3DModel():
    cache = WanAnimate2KVCache(4)
    for i in range(4):  # stands for the reference pass that fills it: keys and values of a driving video's 8 tokens
        cache.get(i).store(*normal(2, B, 8, 2, 16, seed=i))
    return wan(
        {
            "encoder_hidden_states": [normal(n, 16) for n in (6, 3, 5)],
            "encoder_hidden_states_image": normal(B, 5, 1280),
            "condition_latents": [normal(4 + 4, 3, 4, 4, seed=i) for i in range(B)],
            "kv_cache": cache,
            "kv_cache_mode": "cached",
            "seq_len": 12,
            "reference_grid_sizes": torch.tensor([[2, 2, 2]] * B),
            "origin_len": 5,
            "origin_area": [32, 32],
        },
        base=dict(
            patch_size=(1, 2, 2), text_len=8, in_dim=12, dim=32, ffn_dim=32, freq_dim=32, text_dim=16, out_dim=4,
            num_heads=2, num_layers=4,
        ),
        clean=[normal(4, 3, 4, 4, seed=9 + i) for i in range(B)],
        shift=5.0,
    )  # fmt: skip
    # modular_pipelines/wan_animate_2/denoise.py: t as it is; condition_latents are joined inside, as channels


NO_CPU_BACKWARD.add("WanAnimate2Transformer3DModel")

ANYFLOW = {**{key: value for key, value in WAN.items() if key != "qk_norm"}, "gate_value": 0.25, "deltatime_type": "r"}


def anyflow(cond, **other):
    """A flow map: where a step of its mean velocity from t lands is the user's to say; at 0 that is the clean sample."""
    return wan(
        {**TEXT, "r_timestep": torch.zeros(B, 3), **cond},
        base=ANYFLOW,
        clean=normal(B, 3, 4, 8, 8),  # frames before channels
        time=lambda t: {"timestep": t[:, None].expand(B, 3)},
        scheduler=lambda: diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
        **other,
    )


@row
def AnyFlowTransformer3DModel():
    return anyflow({})  # pipeline_anyflow: t and r as they are, one per frame; r is the next step's t, or t itself


@row
def AnyFlowFARTransformer3DModel():
    partition = {"chunk_partition": [1, 2]}
    return anyflow(partition, config={"compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3})
    # transformer_anyflow_far, without a cache: the pass it is trained with; with more chunks than full_chunk_limit the
    # first ones are compressed context, of which nothing is predicted


NO_CPU_BACKWARD.add("AnyFlowFARTransformer3DModel")


def helios():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array_wrap__", DeprecationWarning)  # of its own constructor
        return diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)


@row
def HeliosTransformer3DModel():
    frames = torch.arange(4 + 2 + 2 + 3).repeat(B, 1)  # the released sizes of the history are 16, 2 and 1 + 1
    return wan(
        {
            **TEXT,
            "indices_latents_history_long": frames[:, :4],
            "indices_latents_history_mid": frames[:, 4:6],
            "indices_latents_history_short": frames[:, 6:8],
            "indices_hidden_states": frames[:, 8:],
            "latents_history_long": normal(B, 4, 4, 8, 8),
            "latents_history_mid": normal(B, 4, 2, 8, 8),
            "latents_history_short": normal(B, 4, 2, 8, 8),
        },
        base={key: value for key, value in WAN.items() if key != "rope_max_seq_len"},
        config={"rope_dim": (4, 4, 4)},
        feature=lambda raw: raw[:, -3 * 4 * 4 :],  # after the tokens of the history
        scheduler=helios,
    )  # pipeline_helios: t as it is, the output goes to the scheduler; the history is modulated as clean
