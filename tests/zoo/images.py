"""Rows of the zoo: image transformers of one stream, and the prior of CLIP embeddings."""
# ruff: noqa: C408

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from torch.nn.utils.rnn import pad_sequence

from zoo import FLOW_T, INDEX_T, B, Tiny, normal, row


def released(name, **settings):
    return lambda: getattr(diffusers, name)(**settings)


def hidden(x, t):
    return {"hidden_states": x}


def index(t):
    return {"timestep": t}


def unit(t):
    return {"timestep": t / 1000}


def reversed_unit(t):
    return {"timestep": 1 - t / 1000}


def sample(output):
    return output.sample


def mean(output):
    """Four channels of a prediction whose other four are a learned variance."""
    return output.sample[:, :4]


def whole(raw):
    return raw


def last(n):
    return lambda raw: raw[:, -n:]


def mask(*lengths, of):
    return torch.arange(of) < torch.tensor(lengths)[:, None]


FLOW = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = dict(
    use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
)
LINEAR_BETAS = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


@row
def DiTTransformer2DModel():
    return Tiny(
        config=dict(
            in_channels=4, out_channels=8, num_attention_heads=2, attention_head_dim=4, num_layers=4,
            num_embeds_ada_norm=8, sample_size=8,
        ),
        clean=normal(B, 4, 8, 8),
        cond={"class_labels": torch.tensor([1, 3, 8])},
        middle="transformer_blocks.2",
        feature=whole, time=index, given=hidden, predicted=mean,
        prediction="epsilon",
        scheduler=released("DDIMScheduler", clip_sample=False, **LINEAR_BETAS),
        t=INDEX_T,
    )  # fmt: skip
    # pipeline_dit: the first half of the channels goes to the scheduler, whose prediction is epsilon


PIXART = dict(
    sample_size=8, num_layers=4, attention_head_dim=6, num_attention_heads=2, in_channels=4, out_channels=8,
    cross_attention_dim=12, caption_channels=8,
)  # fmt: skip


def pixart(additional, added):
    return Tiny(
        config=dict(use_additional_conditions=additional, **PIXART),
        clean=normal(B, 4, 8, 8),
        cond={
            "encoder_hidden_states": normal(B, 5, 8),
            "encoder_attention_mask": mask(5, 3, 4, of=5).long(),
            "added_cond_kwargs": added,
        },
        middle="transformer_blocks.2",
        feature=whole, time=index, given=hidden, predicted=mean,
        prediction="epsilon",
        scheduler=released("DPMSolverMultistepScheduler", **LINEAR_BETAS),
        t=INDEX_T,
    )  # fmt: skip


@row
def PixArtTransformer2DModel():
    return pixart(False, {"resolution": None, "aspect_ratio": None})
    # pipeline_pixart_sigma: epsilon and a learned variance, halved by chunk(2, dim=1)


@row
def PixArtTransformer2DModel__alpha():
    size = {"resolution": torch.full((B, 2), 64.0), "aspect_ratio": torch.ones(B, 1)}
    return pixart(True, size)  # pipeline_pixart_alpha, at 1024 pixels


@row
def HunyuanDiT2DModel():
    rotary = get_2d_rotary_pos_embed(8, ((0, 0), (4, 4)), (4, 4), use_real=True, output_type="pt")
    return Tiny(
        config=dict(
            sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
            hidden_size=16, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=8, mlp_ratio=2.0,
            text_len=5, text_len_t5=6, activation_fn="gelu-approximate",
        ),
        clean=normal(B, 4, 8, 8),
        cond={
            "encoder_hidden_states": normal(B, 5, 8),
            "text_embedding_mask": mask(5, 3, 4, of=5).long(),
            "encoder_hidden_states_t5": normal(B, 6, 8),
            "text_embedding_mask_t5": mask(2, 6, 4, of=6).long(),
            "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]]).repeat(B, 1),
            "style": torch.zeros(B, dtype=torch.long),
            "image_rotary_emb": rotary,  # (cos, sin) of the tokens, no batch
        },
        middle="blocks.2",
        feature=whole,
        time=lambda t: {"timestep": t.float()},  # its time embedding takes the dtype of t
        given=hidden, predicted=mean,
        prediction="v_prediction",
        scheduler=released(
            "DDPMScheduler", beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", steps_offset=1,
            prediction_type="v_prediction", clip_sample=False,
        ),
        t=INDEX_T,
    )  # fmt: skip
    # pipeline_hunyuandit: t cast to the dtype of the latents, chunk(2, dim=1); v_prediction: the released scheduler


SANA = dict(
    patch_size=1, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=4, num_attention_heads=2,
    num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=8,
)  # fmt: skip


def sana(time, cond, **config):
    return Tiny(
        config=dict(**SANA, **config),
        clean=normal(B, 4, 8, 8),
        cond={
            "encoder_hidden_states": normal(B, 5, 8),
            "encoder_attention_mask": mask(5, 3, 4, of=5).long(),
            **cond,
        },
        middle="transformer_blocks.2",
        feature=whole, time=time, given=hidden, predicted=sample,
        prediction="flow_prediction",
        scheduler=released(
            "DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        t=FLOW_T,
    )  # fmt: skip


@row
def SanaTransformer2DModel():
    return sana(index, {})  # pipeline_sana: timestep * config.timestep_scale, 1


@row
def SanaTransformer2DModel__sprint():
    return sana(unit, {"guidance": torch.full((B,), 0.45)}, guidance_embeds=True, timestep_scale=0.001)
    # pipeline_sana_sprint: its trigonometric sampler turns x_t and t into the flow sample and time, in [0, 1], that the
    # model is given, and the model's flow prediction back; guidance is scaled by config.guidance_embeds_scale


@row
def LuminaNextDiT2DModel():
    return Tiny(
        config=dict(
            sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=4, num_attention_heads=3,
            num_kv_heads=1, multiple_of=16, norm_eps=1e-5, learn_sigma=True, qk_norm=True, cross_attention_dim=16,
        ),
        clean=normal(B, 4, 8, 8),
        cond={
            "encoder_hidden_states": normal(B, 6, 16),
            "encoder_mask": mask(6, 4, 5, of=6).long(),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 8, 8),  # a table by place, no batch; complex
            "cross_attention_kwargs": {},
        },
        middle="layers.2",
        feature=whole, time=reversed_unit, given=hidden, predicted=mean,
        prediction="-flow_prediction",
        scheduler=released(FLOW),
        t=FLOW_T,
    )  # fmt: skip
    # pipeline_lumina: 1 - t / 1000, chunk(2, dim=1)[0], -noise_pred


def lumina2(*captions):
    """Each sample's joint sequence is its caption, without padding, then its 16 image tokens."""

    def feature(raw):
        return torch.stack([raw[i, n : n + 16] for i, n in enumerate(captions)])

    return Tiny(
        config=dict(
            sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=4, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(32, 16, 16),
            cap_feat_dim=8,
        ),
        clean=normal(B, 4, 8, 8),
        cond={
            "encoder_hidden_states": normal(B, 6, 8),
            "encoder_attention_mask": mask(*captions, of=6),
        },
        middle="layers.2",
        feature=feature, time=reversed_unit, given=hidden, predicted=sample,
        prediction="-flow_prediction",
        scheduler=released(FLOW, shift=6.0),
        t=FLOW_T,
    )  # fmt: skip


@row
def Lumina2Transformer2DModel():
    return lumina2(6, 6, 6)  # pipeline_lumina2: 1 - t / 1000, -noise_pred


@row
def Lumina2Transformer2DModel__ragged():
    return lumina2(6, 3, 5)


ZIMAGE = dict(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=16, n_layers=4, n_refiner_layers=1, n_heads=2,
    n_kv_heads=2, qk_norm=True, cap_feat_dim=8, rope_theta=256.0, t_scale=1000.0, axes_dims=[4, 2, 2],
    axes_lens=[256, 32, 32],
)  # fmt: skip


def zimage(clean, cond, feature, given=lambda x, t: {"x": x}, **config):
    return Tiny(
        config=dict(**ZIMAGE, **config),
        clean=clean,
        cond=cond,
        middle="layers.2",
        feature=feature,
        time=lambda t: {"t": (1000 - t) / 1000},
        given=given,
        predicted=sample,
        prediction="-flow_prediction",
        scheduler=released(FLOW, shift=3.0),
        t=FLOW_T,
    )


def captions(*lengths, seed=0):
    return [normal(n, 8, seed=seed + i) for i, n in enumerate(lengths)]


@row
def ZImageTransformer2DModel():
    clean = [normal(4, 1, 16, 16, seed=i) for i in range(B)]
    return zimage(clean, {"cap_feats": captions(7, 7, 7)}, lambda raw: raw[:, :64])
    # pipeline_z_image: (1000 - t) / 1000, lists, -noise_pred; [image; caption], each padded to a multiple of 32


@row
def ZImageTransformer2DModel__ragged():
    sizes = (16, 16), (8, 16), (8, 8)
    clean = [normal(4, 1, *size) for size in sizes]
    counts = [h * w // 4 for h, w in sizes]

    def feature(raw):  # 0 beyond a sample's own tokens; scaled so that the mean square is that of its own tokens
        own = [raw[i, :n] * (max(counts) / n) ** 0.5 for i, n in enumerate(counts)]
        return pad_sequence(own, batch_first=True)

    return zimage(clean, {"cap_feats": captions(5, 40, 7)}, feature)


@row
def ZImageTransformer2DModel__omni():
    references = [[normal(4, 1, 8, 8, seed=i)] for i in range(B)]
    cond = {
        "concat": references,
        "cap_feats": [captions(4, 6, 2, seed=i) for i in range(B)],
        "siglip_feats": [[normal(3, 3, 6, seed=i), None] for i in range(B)],
        "image_noise_mask": [[0, 1]] * B,
    }
    return zimage(
        [normal(4, 1, 16, 16, seed=i) for i in range(B)],
        cond,
        lambda raw: raw[:, 96 + 32 : 96 + 32 + 64],  # three captions and a reference, each padded to 32, come before
        given=lambda x, t: {"x": [[*references[i], x[i]] for i in range(B)]},
        siglip_feat_dim=6,
    )  # pipeline_z_image_omni: the references of each sample, then its noisy image; the references are at time 1, clean


def fibo2(lengths, start):
    return Tiny(
        config=dict(
            in_channels=4, patch_size=2, dim=32, n_layers=4, n_refiner_layers=1, n_heads=2, cap_feat_dim=16,
            injection_layer_ids=(1, 3), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8,
            gist_step=2, gist_min_text_len=4, gist_max_text_len=16, axes_dims=(4, 6, 6), axes_lens=(64, 32, 32),
        ),
        clean=normal(B, 4, 8, 8),
        cond={
            "encoder_hidden_states": normal(B, 3, 16, 16),
            "encoder_attention_mask": mask(*lengths, of=16),
            "context_latents": [normal(B, 4, 4, 8)],
        },
        middle="layers.2",
        feature=lambda raw: raw[:, start : start + 16],
        time=unit, given=hidden, predicted=sample,
        prediction="flow_prediction",
        scheduler=released(FLOW, **DYNAMIC),
        t=FLOW_T,
    )  # fmt: skip


@row
def BriaFibo2Transformer2DModel():
    return fibo2((4, 4, 4), 4)
    # pipeline_bria_fibo2: t / 1000; [gist; image; context images], or the gist last where the samples' gists differ


@row
def BriaFibo2Transformer2DModel__ragged():
    return fibo2((4, 16, 9), 0)


@row
def ErnieImageTransformer2DModel():
    return Tiny(
        config=dict(
            hidden_size=16, num_attention_heads=2, num_layers=4, ffn_hidden_size=32, in_channels=4, out_channels=4,
            text_in_dim=8, rope_axes_dim=(4, 2, 2),
        ),
        clean=normal(B, 4, 8, 8),
        cond={"text_bth": normal(B, 6, 8), "text_lens": torch.tensor([6, 3, 5])},
        middle="layers.2",
        feature=lambda raw: raw[:64].transpose(0, 1),  # sequence first
        time=index, given=hidden, predicted=sample,
        prediction="flow_prediction",
        scheduler=released(FLOW),
        t=FLOW_T,
    )  # fmt: skip
    # pipeline_ernie_image: t as it is, the output goes to the scheduler


def prx(prediction, channels, **config):
    return Tiny(
        config=dict(
            in_channels=channels, patch_size=2, context_in_dim=8, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=4,
            axes_dim=[4, 4], **config,
        ),
        clean=normal(B, channels, 8, 8),
        cond={"encoder_hidden_states": normal(B, 5, 8), "attention_mask": mask(5, 3, 4, of=5)},
        middle="blocks.2",
        feature=whole, time=unit, given=hidden, predicted=sample,
        prediction=prediction,
        scheduler=released(FLOW, shift=3.0),
        t=FLOW_T,
    )  # fmt: skip


@row
def PRXTransformer2DModel():
    return prx("flow_prediction", 4)  # pipeline_prx: t / 1000, the output goes to the scheduler


@row
def PRXTransformer2DModel__pixel():
    return prx("sample", 3, bottleneck_size=8, resolution_embeds=True)
    # pipeline_prx_pixel: (latents - output) / t goes to the scheduler; its noise has the standard deviation 2


@row
def Krea2Transformer2DModel():
    place = torch.zeros(5 + 16, 3)
    place[5:, 1:] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return Tiny(
        config=dict(
            in_channels=16, num_layers=4, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3,
            text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
        ),
        clean=normal(B, 16, 16),
        cond={
            "encoder_hidden_states": normal(B, 5, 3, 16),
            "position_ids": place,  # of [text; image], no batch
            "encoder_attention_mask": mask(5, 3, 4, of=5),
        },
        middle="transformer_blocks.2",
        feature=last(16), time=unit, given=hidden, predicted=sample,
        prediction="flow_prediction",
        scheduler=released(FLOW, **{**DYNAMIC, "max_image_seq_len": 6400}),
        t=FLOW_T,
    )  # fmt: skip
    # pipeline_krea2: t / 1000, the output goes to the scheduler; [text; image]


@row
def Ideogram4Transformer2DModel():
    texts = (5, 3, 4)
    is_text = mask(*texts, of=5).flip(1)  # padded on the left
    is_image = torch.ones(B, 16, dtype=torch.bool)
    place = torch.zeros(B, 21, 3, dtype=torch.long)
    for i, n in enumerate(texts):
        place[i, 5 - n : 5] = torch.arange(n)[:, None]
    place[:, 5:, 1:] = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    place[:, 5:] += 65536
    return Tiny(
        config=dict(
            in_channels=8, num_layers=4, attention_head_dim=16, num_attention_heads=2, intermediate_size=32,
            adaln_dim=8, llm_features_dim=12, mrope_section=(4, 2, 2),
        ),
        clean=normal(B, 16, 8),
        cond={
            "encoder_hidden_states": normal(B, 21, 12),
            "position_ids": place,
            "segment_ids": torch.cat([is_text, is_image], 1).long() * 2 - 1,  # 1, and -1 for padding
            "indicator": torch.cat([is_text * 3, is_image * 2], 1),  # 3 is text, 2 image, 0 padding
        },
        middle="layers.2",
        feature=last(16), time=reversed_unit,
        given=lambda x, t: {"hidden_states": torch.cat([torch.zeros(B, 5, 8), x], 1)},
        predicted=lambda output: output.sample[:, 5:],
        prediction="-flow_prediction",
        scheduler=released(FLOW),
        t=FLOW_T,
    )  # fmt: skip
    # pipeline_ideogram4: 1 - t / 1000, zeros for the text before the image tokens, output[:, max_text_tokens:], step(-v)


@row
def OmniGenTransformer2DModel():
    attend = torch.ones(7 + 16, 7 + 16)
    attend[:7] = attend[:7].tril()
    return Tiny(
        config=dict(
            hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=4,
            pad_token_id=0, vocab_size=32, in_channels=4, time_step_dim=4, pos_embed_max_size=8,
            rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
        ),
        clean=normal(B, 4, 8, 8),
        cond={
            "input_ids": torch.arange(B * 6).view(B, 6) + 1,
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": attend.repeat(B, 1, 1),
            "position_ids": torch.arange(7 + 16).repeat(B, 1),
        },
        middle="layers.2",
        feature=last(16), time=reversed_unit, given=hidden, predicted=sample,
        prediction="-flow_prediction",
        scheduler=released(FLOW, invert_sigmas=True, num_train_timesteps=1),
        t=FLOW_T,
    )  # fmt: skip
    # pipeline_omnigen: the scheduler's timestep as it is, and that runs from 0, noise, to 1; [text; time; image]


PRIOR = dict(num_attention_heads=2, attention_head_dim=4, num_layers=4, embedding_dim=8)


@row
def PriorTransformer():
    return Tiny(
        config=dict(num_embeddings=7, additional_embeddings=4, **PRIOR),
        clean=normal(B, 8),
        cond={
            "proj_embedding": normal(B, 8, seed=1),
            "encoder_hidden_states": normal(B, 7, 8),
            "attention_mask": mask(7, 4, 5, of=7),
        },
        middle="transformer_blocks.2",
        feature=lambda raw: raw[:, -2:-1],  # [text; text embedding; time; noisy; a token that becomes the prediction]
        time=index, given=hidden,
        predicted=lambda output: output.predicted_image_embedding,
        prediction="sample",
        scheduler=released(
            "UnCLIPScheduler", variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        t=INDEX_T,
    )  # fmt: skip
    # pipeline_kandinsky2_2_prior, pipeline_unclip: the released UnCLIPScheduler's prediction is sample


@row
def PriorTransformer__shap_e():
    return Tiny(
        config=dict(
            num_embeddings=6, additional_embeddings=0, time_embed_act_fn="gelu", norm_in_type="layer",
            encoder_hid_proj_type=None, added_emb_type=None, time_embed_dim=16, embedding_proj_dim=5, clip_embed_dim=16,
            **PRIOR,
        ),
        clean=normal(B, 6, 8),
        cond={"proj_embedding": normal(B, 5)},
        middle="transformer_blocks.2",
        feature=last(6), time=index, given=hidden,
        predicted=lambda output: output.predicted_image_embedding[..., :8],
        prediction="sample",
        scheduler=released(
            "HeunDiscreteScheduler", beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample",
            use_karras_sigmas=True, clip_sample=True,
        ),
        t=INDEX_T,
    )  # fmt: skip
    # pipeline_shap_e: a set of tokens, the second half of the last dimension is a variance


def qwen21(concat, layout, shapes):
    """`layout` marks the slots of the vision-language sequence that stand for 2 by 2 image tokens each."""

    def given(x, t):
        return {"hidden_states": x if concat is None else torch.cat([concat, x], 1)}

    return Tiny(
        config=dict(
            in_channels=16, out_channels=16, num_layers=4, attention_head_dim=16, num_attention_heads=2,
            context_in_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        clean=normal(B, 16, 16),
        cond={
            "encoder_hidden_states": normal(B, len(layout) - 4, 16),
            "encoder_hidden_states_mask": mask(*[len(layout) - 4, len(layout) - 6, len(layout) - 5], of=len(layout) - 4),
            "img_shapes": [shapes] * B,
            "img_mask": torch.tensor([layout] * B, dtype=torch.bool),
            **({} if concat is None else {"concat": concat}),
        },
        middle="transformer_blocks.2",
        feature=last(16), time=unit, given=given,
        predicted=lambda output: output.sample[:, -16:],
        prediction="flow_prediction",
        scheduler=released(FLOW, **DYNAMIC),
        t=FLOW_T,
    )  # fmt: skip


@row
def QwenImage21Transformer2DModel():
    return qwen21(
        None, [0] * 6 + [1] * 4, [(1, 4, 4)]
    )  # pipeline_qwenimage21: t / 1000, the last tokens are the target's


@row
def QwenImage21Transformer2DModel__edit():
    return qwen21(normal(B, 8, 16), [0, 0, 1, 1, 0, 0, 0] + [1] * 4, [(1, 2, 4), (1, 4, 4)])
    # pipeline_qwenimage21: the tokens of the condition images come before the noisy ones


@row
def NucleusMoEImageTransformer2DModel():
    return Tiny(
        config=dict(
            in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
            num_key_value_heads=1, joint_attention_dim=16, axes_dims_rope=(8, 4, 4), mlp_ratio=6.0,
        ),  # the first three layers and the last have no experts, whose weights diffusers leaves uninitialised
        clean=normal(B, 16, 16),
        cond={
            "encoder_hidden_states": normal(B, 6, 16),
            "encoder_hidden_states_mask": mask(6, 4, 5, of=6),
            "img_shapes": [(1, 4, 4)] * B,
        },
        middle="transformer_blocks.2",
        feature=whole, time=unit, given=hidden, predicted=sample,
        prediction="-flow_prediction",
        scheduler=released(FLOW, **DYNAMIC),
        t=FLOW_T,
    )  # fmt: skip
    # pipeline_nucleusmoe_image: t / 1000, -noise_pred; the text is only attended to
