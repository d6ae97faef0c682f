"""Inputs for a model of diffusers, made from its config: a sample of normal noise and whatever conditions it asks for.

They have the right shapes, which is what costs and blocks depend on; what they hold means nothing. Shapes are written as
letters: b samples, c channels, f frames, h height, w width, l length, t and u tokens of text; "(h w)" is a packed dimension, and
"[...]" a list with one tensor per sample.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from perceptual_diffusion import taps
from perceptual_diffusion.adapters._arguments import NEEDED, RULES, WHEN_NEEDED, Setting
from perceptual_diffusion.types import Sample

TIMES = {
    "timestep", "timesteps", "t", "sigma", "audio_timestep", "audio_sigma", "timestep_ratio", "timestep_img", "timestep_text", "decoder_noise_time", "bb_ca_time",
    "local_latents_time", "vision_timesteps",
}  # fmt: skip
"""Arguments of time, which are not conditions."""

LAYOUTS = {
    "b c l": ("UNet1DModel", "StableAudioDiTModel", "StableAudio3DiTModel", "MiniMaxMusic3Transformer1DModel"),
    "b l c": ("AceStepTransformer1DModel", "LongCatAudioDiTTransformer", "T5FilmDecoder"),
    "b c": ("PriorTransformer",),
    "b c h w": ("Kandinsky3UNet", "DreamLiteUNetModel", "StableCascadeUNet"),
    "b c f h w": ("UNet3DConditionModel", "UNetMotionModel", "I2VGenXLUNet"),
    "b f c h w": (
        "UNetSpatioTemporalConditionModel", "CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel",
        "AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel",
    ),
    "b f h w c": ("Kandinsky5Transformer3DModel", "Kandinsky6Transformer3DModel", "Kandinsky6SRTransformer3DModel"),
    "b 1 c f h w": ("JoyImageEditTransformer3DModel",),
    "b (h w) c": (
        "FluxTransformer2DModel", "Flux2Transformer2DModel", "Flux3Transformer2DModel", "ChromaTransformer2DModel",
        "BriaTransformer2DModel", "BriaFiboTransformer2DModel", "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel", "QwenImageTransformer2DModel", "NucleusMoEImageTransformer2DModel",
        "Krea2Transformer2DModel", "QwenImage21Transformer2DModel",
    ),
    "b (h w) c 1 2 2": ("JoyImageEditPlusTransformer3DModel",),
    "b (f h w) c": (
        "LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel", "SanaWMLTX2RefinerTransformer3DModel",
    ),
    "[c 1 h w]": ("ZImageTransformer2DModel",),
}  # fmt: skip
"""Shapes of the noisy sample by class; others have "b c f h w" if their name says 3D, else "b c h w"."""

MORE = {
    "LTX2VideoTransformer3DModel": {"audio_hidden_states": ("b l d", "audio_in_channels")},
    "Kandinsky6Transformer3DModel": {"audio_hidden_states": ("b l d", "in_audio_dim")},
    "UniDiffuserModel": {"image_embeds": ("b 1 d", "clip_img_dim"), "prompt_embeds": ("b t d", "text_dim")},
}
"""Classes that denoise more than one sample: the further arguments, their shapes, and the setting of their width d."""

CHANNELS = (
    "audio_acoustic_hidden_dim", "in_channels", "in_visual_dim", "in_dim", "io_channels", "latent_dim", "input_dims",
    "embedding_dim",
)  # fmt: skip
OUTPUTS = ("out_channels", "out_visual_dim", "out_dim")
LENGTHS = ("max_text_seq_length", "text_len", "num_text_tokens", "max_sequence_length")


def example(model: Any, batch: int = 1, *, size: int | tuple[int, ...] | None = None) -> tuple[Sample, dict[str, Any]]:
    """Make inputs for a model of diffusers from its config.

    Args:
        model: a denoiser of diffusers; its weights are not looked at.
        batch: the number of samples.
        size: extent of the sample in the model's own grid (latents, or tokens where they are packed): height and width, or
            (height, width), or (frames, height, width), or the length. By default what the config says, else 64 and 4 frames.

    Returns:
        the clean sample, (B, *) or nested, and the conditions.

    Raises:
        TypeError: `model` has no config.
        ValueError: its class is not known, or an argument of its cannot be made.
    """
    inner = taps.unwrap(model) if isinstance(model, nn.Module) else model
    config = getattr(inner, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"`model` is a {type(inner).__name__}, expected a model of diffusers, with a config. Make the inputs yourself."
        )
    kind = _known(inner)
    letters = next((key for key, kinds in LAYOUTS.items() if kind in kinds), None)
    letters = letters or ("b c f h w" if _has_frames(kind, config) else "b c h w")
    setting = _setting(kind, config, batch, size)
    names = inspect.signature(type(inner).forward).parameters
    noisy, extra = next(name for name in names if name != "self" and name not in TIMES), setting.sizes["extra"]
    if kind == "T5FilmDecoder":
        noisy = "decoder_input_tokens"
    clean: Any = _sample(setting, letters)
    if kind in MORE:
        others = {name: setting.normal(shape, d=setting.get(key)) for name, (shape, key) in MORE[kind].items()}
        clean = {noisy: clean, **others}
    cond: dict[str, Any] = {}
    for name, parameter in names.items():
        if name in ("self", noisy, *TIMES, *(clean if isinstance(clean, dict) else ())):
            continue
        if kind == "AceStepTransformer1DModel" and name == "timestep_r":
            continue  # its adapter gives both times
        needed = parameter.default is parameter.empty
        wanted = needed or name not in WHEN_NEEDED or name in NEEDED.get(kind, ())
        value = RULES[name](setting) if name in RULES and wanted else None
        if value is not None:
            cond[name] = value
        elif needed and parameter.kind is not parameter.VAR_KEYWORD:
            raise ValueError(f"no rule makes the argument {name!r} of {kind}. Make the inputs yourself.")
    if extra and not any(name in cond for name in JOINED):
        if "(" in letters:
            raise ValueError(
                f"no rule makes what {kind} joins to the channels of its tokens. Make the inputs yourself."
            )
        cond["concat"] = _sample(setting, letters.replace("c", "extra"))
        if isinstance(clean, dict):
            cond["concat"] = {noisy: cond["concat"]}
    return clean, cond


JOINED = ("context_latents", "image_latents", "inpaint_latents", "condition_mask")
"""Conditions that a model joins to its sample itself."""


def _known(model: Any) -> str:
    for cls in type(model).__mro__:
        if cls.__module__.split(".")[0] == "diffusers":
            return str(cls.__name__)
    raise ValueError(
        f"inputs can be made for models of diffusers only, not for {type(model).__name__}. Make them yourself."
    )


def _has_frames(kind: str, config: Mapping[str, Any]) -> bool:
    patch = config.get("patch_size")
    return "3D" in kind or (isinstance(patch, list | tuple) and len(patch) == 3)


def _sample(setting: Setting, letters: str) -> Any:
    if letters.startswith("["):
        one = letters.strip("[]")
        return [setting.normal(one) for _ in range(setting.sizes["b"])]
    return setting.normal(letters)


def _setting(kind: str, config: Mapping[str, Any], batch: int, size: Any) -> Setting:
    bare = Setting(kind=kind, config=config, sizes={})
    joined, given = bare.get(*CHANNELS), bare.get(*OUTPUTS)
    if joined is None:
        raise ValueError(f"the config of {kind} says no number of channels. Make the inputs yourself.")
    patch = bare.patch
    alike = given is None or given >= joined or given * patch**2 == joined
    channels = joined if alike else given
    extra = joined - channels
    if config.get("visual_cond") or kind == "Kandinsky6SRTransformer3DModel":
        extra = channels + 1  # a condition and its mask
    if kind == "AceStepTransformer1DModel":
        extra = config["in_channels"] - channels
    frames, height, width = _extent(bare, size)
    length = size if isinstance(size, int) else size[-1] if size else bare.get("targets_length")
    if length is None:
        length = bare.get("sample_size") if "1D" in kind or "Audio" in kind else 256
    sizes = {
        "b": batch, "c": channels, "extra": extra, "f": frames, "h": height, "w": width, "l": length or 256,
        "t": (text := bare.get(*LENGTHS) or min(77, (bare.get("axes_lens") or 300) // 2)),
        "u": bare.get("text_len_t5") or text,
    }  # fmt: skip
    return Setting(kind=kind, config=config, sizes=sizes)


def _extent(bare: Setting, size: Any) -> tuple[int, int, int]:
    config = bare.config
    frames = bare.get("sample_frames", "video_length") or 4
    if config.get("temporal_compression_ratio") and config.get("sample_frames"):
        frames = (frames - 1) // config["temporal_compression_ratio"] + 1
    if size is not None:
        given = (size, size) if isinstance(size, int) else tuple(size)
        if not 1 <= len(given) <= 3 or not all(isinstance(n, int) and n > 0 for n in given):
            raise ValueError(f"`size` is {size!r}, expected a number, (height, width) or (frames, height, width).")
        given = given * 2 if len(given) == 1 else given
        return given if len(given) == 3 else (frames, *given)
    sample = config.get("sample_size")
    height, width = (sample if isinstance(sample, list | tuple) else (sample, sample)) if sample else (64, 64)
    height, width = config.get("sample_height") or height, config.get("sample_width") or width
    patch = bare.patch
    limits = [bare.get("max_resolution"), (bare.get("pos_embed_max_size") or 0) * patch]
    for limit in limits:
        if limit:
            height, width = min(height, limit), min(width, limit)
    return frames, height, width
