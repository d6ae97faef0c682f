"""Rows of the audio and music transformers, and of the protein transformer."""
# ruff: noqa: C408

import math

import diffusers
import torch

from zoo import FLOW_T, INDEX_T, SIGMA_T, B, Tiny, normal, row

LENGTH = 8


def flow(**settings):
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def mask(*lengths, of):
    return torch.arange(of) < torch.tensor(lengths)[:, None]


AUDIO = dict(
    middle="transformer_blocks.2", feature=lambda raw: raw, time=lambda t: {"timestep": t / 1000},
    given=lambda x, t: {"hidden_states": x}, predicted=lambda out: out.sample, prediction="flow_prediction", t=FLOW_T,
)  # fmt: skip
REVERSED = AUDIO | dict(time=lambda t: {"timestep": 1 - t / 1000}, prediction="-flow_prediction")


@row
def StableAudioDiTModel():
    angle = torch.arange(1 + LENGTH)[:, None] * torch.tensor([1.0, 0.1] * 2)  # one more, for the token before the audio
    return Tiny(
        config=dict(
            sample_size=LENGTH, in_channels=3, out_channels=3, num_layers=4, attention_head_dim=8,
            num_attention_heads=2, num_key_value_attention_heads=1, cross_attention_dim=8, cross_attention_input_dim=4,
            time_proj_dim=8, global_states_input_dim=6,
        ),
        clean=normal(B, 3, LENGTH),
        cond={
            "encoder_hidden_states": normal(B, 5, 4), "global_hidden_states": normal(B, 1, 6),
            "rotary_embedding": (angle.cos(), angle.sin()),
            "return_dict": False,  # as its pipeline has it: the class's dict warns that it is deprecated
        },
        scheduler=diffusers.CosineDPMSolverMultistepScheduler,  # it needs the package torchsde
        **AUDIO | dict(
            feature=lambda raw: raw[:, 1:],  # [global and time, audio]
            time=lambda t: {"timestep": t.atan() * 2 / math.pi},
            given=lambda x, t: {"hidden_states": x * (t**2 + 1).rsqrt()[:, None, None]},
            predicted=lambda out: out[0], t=SIGMA_T,
            prediction="-edm",  # sigma_data 1: the v of c_in x_t, c_out = -sigma / sqrt(sigma² + 1)
        ),
    )  # fmt: skip
    # pipeline_stable_audio, scheduling_cosine_dpmsolver_multistep: precondition_inputs, _noise and _outputs


STABLE_3 = AUDIO | dict(
    config=dict(
        io_channels=3, embed_dim=16, depth=4, num_heads=2, cond_token_dim=6, global_cond_dim=5, local_add_cond_dim=4,
        timestep_features_dim=8, num_memory_tokens=2,
    ),
    clean=normal(B, 3, LENGTH), scheduler=flow(num_train_timesteps=1),
    feature=lambda raw: raw[:, 2:],  # [memory, audio]
)  # fmt: skip
STABLE_3_TEXT = {
    "encoder_hidden_states": normal(B, 5, 6), "encoder_attention_mask": mask(5, 3, 1, of=5),
    "global_hidden_states": normal(B, 5),
}  # fmt: skip


@row
def StableAudio3DiTModel():
    return Tiny(cond=STABLE_3_TEXT, **STABLE_3)
    # pipeline_stable_audio_3: the timestep itself, documented as 0 to 1; clean = x_t - t v


@row
def StableAudio3DiTModel__inpaint():
    local = torch.cat([mask(8, 4, 2, of=LENGTH)[:, None].float(), normal(B, 3, LENGTH, seed=2)], 1)
    return Tiny(cond=STABLE_3_TEXT | {"local_add_cond": local}, **STABLE_3)
    # pipeline_stable_audio_3_inpaint: mask and masked latents are added inside every block, not joined to the sample


@row
def AceStepTransformer1DModel():
    return Tiny(
        config=dict(
            hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, in_channels=10, audio_acoustic_hidden_dim=4, sliding_window=2,
        ),
        clean=normal(B, LENGTH, 4),
        cond={"encoder_hidden_states": normal(B, 5, 16), "context_latents": normal(B, LENGTH, 6)},
        scheduler=flow(num_train_timesteps=1),
        **AUDIO | dict(middle="layers.2", time=lambda t: {"timestep": t / 1000, "timestep_r": t / 1000}),
    )  # fmt: skip
    # pipeline_ace_step: both times are the timestep, 0 to 1; the model joins context_latents itself


@row
def LongCatAudioDiTTransformer():
    return Tiny(
        config=dict(dit_dim=16, dit_depth=4, dit_heads=2, dit_text_dim=6, latent_dim=4),
        clean=normal(B, LENGTH, 4),
        cond={
            "encoder_hidden_states": normal(B, 5, 6), "encoder_attention_mask": mask(5, 3, 1, of=5),
            "attention_mask": mask(LENGTH, LENGTH, LENGTH, of=LENGTH), "latent_cond": normal(B, LENGTH, 4, seed=1),
        },
        scheduler=flow(shift=1.0, invert_sigmas=True),
        **REVERSED | dict(middle="blocks.2"),
    )  # fmt: skip
    # pipeline_longcat_audio_dit: inverted sigmas, t / num_train_timesteps; the model joins latent_cond itself


@row
def MiniMaxMusic3Transformer1DModel():
    return Tiny(
        config=dict(
            in_channels=4, condition_dim=6, num_layers=4, num_attention_heads=2, attention_head_dim=8, ff_inner_dim=16,
            rotary_dim=4, fourier_embedding_dim=8,
        ),
        clean=normal(B, 4, LENGTH),
        cond={"encoder_hidden_states": normal(B, LENGTH, 6)},
        scheduler=flow(num_train_timesteps=1, invert_sigmas=True),
        **REVERSED | dict(feature=lambda raw: raw[:, 1:]),  # [time, audio]
    )  # fmt: skip
    # modular_pipelines/minimax_music3: the timestep itself, 0 noise to 1 data; convert_minimax_music3: the scheduler


@row
def T5FilmDecoder():
    notes, before = normal(B, 5, 16), normal(B, LENGTH, 16)
    return Tiny(
        config=dict(input_dims=4, targets_length=LENGTH, d_model=16, num_layers=4, num_heads=2, d_kv=8, d_ff=32),
        clean=normal(B, LENGTH, 4),
        cond={"encodings_and_masks": [(notes, mask(5, 3, 1, of=5).float()), (before, torch.ones(B, LENGTH))]},
        middle="decoders.2", feature=lambda raw: raw[0],  # (hidden,)
        time=lambda t: {"decoder_noise_time": t / 1000}, given=lambda x, t: {"decoder_input_tokens": x},
        predicted=lambda out: out, prediction="epsilon", t=INDEX_T,
        scheduler=lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_large"),
    )  # fmt: skip
    # pipeline_spectrogram_diffusion: index / num_train_timesteps; convert_music_spectrogram: the scheduler has epsilon


@row
def RFD4ProteinaTransformer():
    tokens, every = 6, torch.ones(B, 6, dtype=torch.bool)
    return Tiny(
        config=dict(
            nlayers=4, token_dim=16, nheads=2, dim_cond=8, pair_repr_dim=8, latent_dim=4, token_type_emb_dim=4,
            cath_emb_dim=4, t_emb_dim=8, seq_sep_dim=8, xt_pair_dist_dim=6, tri_mult_c=8,
            feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"), feats_pair_repr=("xt_bb_ca_pair_dists",),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
        ),
        clean={"bb_ca": normal(B, tokens, 3), "local_latents": normal(B, tokens, 4)},
        cond={
            "padding_mask": every, "token_type": torch.zeros(B, tokens, dtype=torch.long),
            "conditioning": {"is_in_context_conditioning": ~every, "supports_local_latent": every},
        },
        middle="transformer_layers.2", feature=lambda raw: raw,  # one token for both noisy parts of a residue
        time=lambda t: {"bb_ca_time": 1 - t / 1000, "local_latents_time": 1 - t / 1000}, given=lambda x, t: dict(x),
        predicted=lambda out: {"bb_ca": out.backbone, "local_latents": out.local_latents},
        prediction="-flow_prediction", t=FLOW_T,
        scheduler=lambda: diffusers.RFD4ProteinaScheduler("log", "1/t", tsr_k=2.0, tsr_sigma=1.0),
    )  # fmt: skip
    # pipeline_rfd4_proteina: clean = x_t + (1 - t) v for both parts; only its two samplers space their times apart
