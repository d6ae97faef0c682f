"""How each argument of diffusers' denoisers is made, by its name and the settings of the config."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perceptual_diffusion._shapes import OWN_SEED


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the shapes of the inputs are made of: the class, its config, and a size for each letter."""

    kind: str
    config: Mapping[str, Any]
    sizes: Mapping[str, int]

    def get(self, *keys: str) -> Any:
        """Give the first of these settings that is set; of a list, its first number."""
        for key in keys:
            value = self.config.get(key)
            while isinstance(value, list | tuple):
                value = next((item for item in value if item is not None), None)
            if value is not None:
                return value
        return None

    @property
    def patch(self) -> int:
        """The extent of a patch in space."""
        patch = self.config.get("patch_size") or 1
        return int(patch[-1] if isinstance(patch, list | tuple) else patch)

    def shape(self, letters: str, **others: int) -> list[int]:
        """Give the sizes of letters such as "b (h w) c"."""
        sizes = {**self.sizes, **others}
        parts = re.findall(r"\(([^)]*)\)|(\S+)", letters)
        return [math.prod(sizes[k] if k in sizes else int(k) for k in (group or one).split()) for group, one in parts]

    def normal(self, letters: str, **others: int) -> torch.Tensor:
        """Draw a normal tensor of such a shape."""
        generator = torch.Generator().manual_seed(OWN_SEED)
        return torch.randn(self.shape(letters, **others), generator=generator)

    def ones(self, letters: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Give a tensor of ones of such a shape."""
        return torch.ones(self.shape(letters), dtype=dtype)


Rule = Callable[[Setting], Any]
"""Makes an argument; None where the config says that it is not wanted, or not how wide it is."""

WIDTHS = (
    "encoder_hid_dim", "caption_channels", "cap_feat_dim", "text_embed_dim", "text_dim",
    "in_text_dim", "joint_attention_dim", "context_in_dim", "text_hidden_dim", "condition_dim", "cond_token_dim",
    "cross_attention_input_dim", "dit_text_dim", "llm_features_dim", "cross_attention_dim",
)  # fmt: skip
"""Settings that say how wide the text is, the first that is set."""

TEXTS = {
    "UNetMotionModel": "(b f) t d",
    "UNetSpatioTemporalConditionModel": "b 1 d",
    "SanaWMTransformer3DModel": "b 1 t d",
    "Krea2Transformer2DModel": "b t k d",
    "BriaFibo2Transformer2DModel": "b k t d",
    "MiniMaxMusic3Transformer1DModel": "b l d",
}
"""Shapes of `encoder_hidden_states` other than "b t d"."""


def _text(s: Setting) -> Tensor | None:
    if s.kind == "PriorTransformer":
        wanted = s.config.get("encoder_hid_proj_type") is not None
        return s.normal("b n c", n=s.config["num_embeddings"]) if wanted else None
    first = ("hidden_size",) if s.kind.startswith("AceStep") else ()
    first = ("crossattn_proj_in_channels",) if s.config.get("use_crossattn_projection") else first
    width = s.get(*first, *WIDTHS)
    layers = s.get("num_text_layers") or 1 + len(s.config.get("injection_layer_ids") or ())
    return None if width is None else s.normal(TEXTS.get(s.kind, "b t d"), d=width, k=layers)


def _of(letters: str, *keys: str) -> Rule:
    """A normal tensor whose width d is one of these settings."""

    def rule(s: Setting) -> Tensor | None:
        width = s.get(*keys)
        return None if width is None else s.normal(letters, d=width)

    return rule


def _mask(s: Setting) -> Tensor:
    return s.ones("b t", torch.bool)


def _second_mask(s: Setting) -> Tensor | None:
    return s.ones("b t") if s.get("text_embed_2_dim") else None


def _second_text(s: Setting) -> Tensor | None:
    widths = [width for width in _flat(s.config.get("cross_attention_dim")) if width is not None]
    return s.normal("b t d", d=widths[1]) if len(widths) > 1 else None


def _flat(value: Any) -> list[Any]:
    return [item for part in value for item in _flat(part)] if isinstance(value, list | tuple) else [value]


def _labels(s: Setting) -> Tensor | None:
    kind, width = s.config.get("class_embed_type"), s.get("projection_class_embeddings_input_dim")
    if kind in ("projection", "simple_projection") and width:
        return s.normal("b d", d=width)
    if kind in ("timestep", "identity"):
        return s.normal("b") if kind == "timestep" else s.normal("b d", d=4 * s.get("block_out_channels"))
    wanted = s.get("num_class_embeds") or (s.kind.startswith("DiT") and s.get("num_embeds_ada_norm"))
    return torch.zeros(s.sizes["b"], dtype=torch.long) if wanted else None


def _added(s: Setting) -> Any:
    kind, ids, width = (
        s.get(k) for k in ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    )
    if kind == "text_time":
        return {"text_embeds": s.normal("b d", d=width - 6 * ids), "time_ids": s.ones("b 6")}
    if kind == "time":
        return {"time_ids": torch.ones(s.sizes["b"], width // ids)}
    if kind in ("image", "text_image", "image_hint"):
        image = s.normal("b d", d=s.get("encoder_hid_dim", "cross_attention_dim"))
        text = s.normal("b d", d=s.get("cross_attention_dim"))
        hint = s.normal("b 3 x y", x=8 * s.sizes["h"], y=8 * s.sizes["w"])
        return (
            {"image_embeds": image}
            | ({"text_embeds": text} if kind == "text_image" else {})
            | ({"hint": hint} if kind == "image_hint" else {})
        )
    if s.kind.startswith("PixArt"):
        conditions = s.config.get("use_additional_conditions")
        conditions = s.config.get("sample_size") == 128 if conditions is None else conditions
        return {
            "resolution": s.ones("b 2") if conditions else None,
            "aspect_ratio": s.ones("b 1") if conditions else None,
        }
    return None


def _guidance(s: Setting) -> Tensor | None:
    wanted = s.config.get("guidance_embeds")
    return s.ones("b") if wanted else None


def _axes(s: Setting) -> int:
    return len(s.config.get("axes_dims_rope") or (0, 0, 0))


def _image_ids(s: Setting) -> Tensor | None:
    if s.kind.startswith("HiDream"):
        return None
    place = torch.cartesian_prod(torch.zeros(1), torch.arange(float(s.sizes["h"])), torch.arange(float(s.sizes["w"])))
    return torch.nn.functional.pad(place, (0, _axes(s) - 3))


def _joint_ids(s: Setting) -> Tensor | None:
    if not s.kind.startswith("Krea"):
        return None
    return torch.cat([torch.zeros(s.sizes["t"], 3), _image_ids(s)])  # type: ignore[list-item]


def _pair(letters: str) -> Rule:
    """Cosines and sines of a rotary embedding that turns nothing."""

    def rule(s: Setting) -> Any:
        cosine = s.ones(letters)
        return cosine, torch.zeros_like(cosine)

    return rule


def _rotary(s: Setting) -> Any:
    """Rotary embeddings that turn nothing, where the model does not make its own."""
    if s.kind.startswith("LuminaNext"):
        width = s.config["hidden_size"] // s.config["num_attention_heads"] // 2
        return torch.ones(384, 384, width, dtype=torch.complex64)
    if s.kind.startswith("HunyuanDiT") or s.config.get("use_rotary_positional_embeddings"):
        frames = s.sizes["f"] // (s.config.get("patch_size_t") or 1) if s.kind.endswith("3DModel") else 1
        return _pair("n d")(_with(s, n=frames * math.prod(_tokens(s)), d=s.config["attention_head_dim"]))
    return None


def _sizes(s: Setting) -> Tensor:
    return torch.tensor([[float(s.sizes["h"]), float(s.sizes["w"])]] * s.sizes["b"])


def _grid(s: Setting) -> Any:
    return [[(1, s.sizes["h"], s.sizes["w"])]] * s.sizes["b"]


def _only(condition: Callable[[Setting], Any], rule: Rule) -> Rule:
    return lambda s: rule(s) if condition(s) else None


def _has(*keys: str) -> Callable[[Setting], bool]:
    return lambda s: s.get(*keys) is not None


def _is(*names: str) -> Callable[[Setting], bool]:
    return lambda s: s.kind.startswith(names)


def _tokens(s: Setting) -> tuple[int, int]:
    """Height and width in patches."""
    patch = s.patch
    return s.sizes["h"] // patch, s.sizes["w"] // patch


RULES: dict[str, Rule] = {
    # text
    "encoder_hidden_states": _text,
    "encoder_hidden_states_1": _second_text,
    "encoder_hidden_states_2": _of("b t d", "text_embed_2_dim"),
    "encoder_hidden_states_t5": _of("b u d", "cross_attention_dim_t5", "text_embed_dim_t5", "caption_channels"),
    "encoder_hidden_states_llama3": lambda s: s.normal(
        "n b t d", n=len(s.config["llama_layers"]), d=s.config["caption_channels"][1]
    ),
    "audio_encoder_hidden_states": lambda s: s.normal(
        "b t d",
        d=s.get("caption_channels" if s.config.get("use_prompt_embeddings", True) else "audio_cross_attention_dim"),
    ),
    "text_encoder_layers": lambda s: [
        s.normal("b t d", d=s.config["text_encoder_dim"])
        for _ in range(s.config["num_layers"] + s.config["num_single_layers"])
    ],
    "cap_feats": lambda s: [s.normal("t d", d=s.config["cap_feat_dim"]) for _ in range(s.sizes["b"])],
    "text_bth": _of("b t d", "text_in_dim"),
    "text_lens": lambda s: torch.full((s.sizes["b"],), s.sizes["t"]),
    "pooled_projections": _of("b d", "pooled_projection_dim", "in_text_dim2"),
    "pooled_embeds": _of("b d", "text_emb_dim"),
    "proj_embedding": _of("b d", "embedding_proj_dim", "embedding_dim"),
    "clip_text_pooled": _of("b 1 d", "clip_text_pooled_in_channels"),
    "clip_text": _of("b t d", "clip_text_in_channels"),
    "clip_img": _of("b 1 d", "clip_image_in_channels"),
    "effnet": _of("b d 24 24", "effnet_in_channels"),
    "global_hidden_states": lambda s: s.normal(
        "b d" if s.kind == "StableAudio3DiTModel" else "b 1 d", d=s.get("global_states_input_dim", "global_cond_dim")
    ),
    "encodings_and_masks": lambda s: [(s.normal("b t d", d=s.config["d_model"]), s.ones("b t"))] * 2,
    # masks
    "encoder_attention_mask": lambda s: s.ones("b t", torch.bool if _is("Lumina2", "Mochi")(s) else torch.float32),
    "encoder_attention_mask_2": _second_mask,
    "encoder_attention_mask_1": lambda s: s.ones("b t"),
    "encoder_mask": _mask,
    "encoder_hidden_states_mask": _mask,
    "text_embedding_mask": lambda s: s.ones("b t", torch.long),
    "text_embedding_mask_t5": lambda s: s.ones("b u", torch.long),
    "padding_mask": lambda s: s.ones("1 1 h w") * 0 if s.config.get("concat_padding_mask") else None,
    "condition_mask": _only(lambda s: s.sizes["extra"] == 1, lambda s: s.ones("b 1 f h w") * 0),
    # classes, sizes, guidance
    "class_labels": _labels,
    "added_cond_kwargs": _added,
    "guidance": _guidance,
    "original_size": _sizes,
    "target_size": _sizes,
    "crop_coords": lambda s: torch.zeros(s.sizes["b"], 2),
    "image_meta_size": lambda s: s.ones("b 6"),
    "style": lambda s: torch.zeros(s.sizes["b"], dtype=torch.long),
    "added_time_ids": lambda s: torch.ones(
        s.sizes["b"], s.config["projection_class_embeddings_input_dim"] // s.config["addition_time_embed_dim"]
    ),
    "fps": lambda s: torch.full((s.sizes["b"],), 16) if s.kind == "I2VGenXLUNet" else None,
    "ofs": _only(_has("ofs_embed_dim"), lambda s: torch.full((1,), 2.0)),
    "additional_t_cond": _only(
        lambda s: s.config.get("use_additional_t_cond"), lambda s: torch.zeros(s.sizes["b"], dtype=torch.long)
    ),
    "prior_token_id": lambda s: torch.zeros(s.sizes["b"], math.prod(_tokens(s)), dtype=torch.long),
    "prior_token_drop": lambda s: torch.zeros(s.sizes["b"], dtype=torch.bool),
    # places
    "img_ids": _image_ids,
    "txt_ids": lambda s: torch.zeros(s.sizes["t"], _axes(s)),
    "position_ids": _joint_ids,
    "img_shapes": _grid,
    "shape_list": _grid,
    "img_mask": lambda s: torch.cat([torch.zeros(s.shape("b t")), s.ones("b (h w)")[:, ::4]], 1).bool(),
    "indices_latents": lambda s: torch.arange(s.sizes["f"]),
    "num_frames": lambda s: s.sizes["f"],
    "height": lambda s: s.sizes["h"],
    "width": lambda s: s.sizes["w"],
    "audio_num_frames": lambda s: s.sizes["l"],
    "image_rotary_emb": _rotary,
    "cross_attention_kwargs": _only(_is("LuminaNext"), lambda s: {}),
    "rotary_embedding": lambda s: _pair("n d")(_with(s, n=1 + s.sizes["l"], d=s.config["attention_head_dim"] // 2)),
    "video_rotary_emb": lambda s: _pair("b (f h w) d")(
        _with(s, d=s.config["num_attention_heads"] * s.config["attention_head_dim"])
    ),
    "visual_rope_pos": lambda s: (
        tuple(torch.arange(n) for n in (s.sizes["f"], *_tokens(s))) if _is("Kandinsky5")(s) else None
    ),
    "text_rope_pos": lambda s: torch.arange(s.sizes["t"]),
    # pictures and videos beside the sample
    "image_latents": lambda s: s.normal("b c f h w"),
    "image_embeddings": _of("b d", "cross_attention_dim"),
    "image_embeds": _of("b 5 d", "image_embed_dim", "image_proj_dim"),
    "encoder_hidden_states_image": _of("b 5 d", "image_dim"),
    "inpaint_latents": _only(lambda s: s.sizes["extra"], lambda s: s.normal("b extra f h w")),
    "context_latents": _only(_is("AceStep"), lambda s: s.normal("b l extra")),
    "control_hidden_states": _of("b d f h w", "vace_in_channels"),
    "pose_hidden_states": lambda s: s.normal("b c g h w", g=s.sizes["f"] - 1),
    "face_pixel_values": lambda s: s.normal(
        "b 3 g x x", g=4 * (s.sizes["f"] - 2) + 1, x=s.config["motion_encoder_size"]
    ),
    "camera_conditions": lambda s: torch.cat([torch.eye(4).flatten(), torch.ones(4)]).repeat(
        s.sizes["b"], s.sizes["f"], 1
    ),
    "chunk_plucker": _of("b d f h w", "chunk_plucker_channels"),
    "latents_clean": lambda s: s.normal("b c 2 h w"),
    "indices_latents_clean": lambda s: torch.arange(2),
    "latents_history_2x": lambda s: s.normal("b c 2 h w"),
    "indices_latents_history_2x": lambda s: torch.arange(2),
    "latents_history_4x": lambda s: s.normal("b c 4 h w"),
    "indices_latents_history_4x": lambda s: torch.arange(4),
    "id_cond": lambda s: s.normal("b d", d=s.config["LFE_id_dim"]),
    "id_vit_hidden": lambda s: [
        s.normal("b n d", n=2, d=s.config["LFE_vit_dim"]) for _ in range(s.config["LFE_num_scale"])
    ],
    # the second time of flow maps
    "r_timestep": lambda s: lambda t: t,
    "timestep_r": _only(lambda s: s.config.get("use_meanflow"), lambda s: torch.zeros(s.sizes["b"])),
    "target_timestep": _only(lambda s: s.config.get("flow_map"), lambda s: torch.zeros(s.sizes["b"])),
}
"""A rule for each argument that is made."""

WHEN_NEEDED = {"encoder_attention_mask", "encoder_attention_mask_1", "encoder_hidden_states_mask", "fps"}
"""Arguments left out where they have a default."""
NEEDED = {
    "Kandinsky3UNet": ("encoder_attention_mask",),
    "SanaWMTransformer3DModel": ("encoder_attention_mask", "camera_conditions", "chunk_plucker"),
}
"""Arguments without which a class does not run, though they have a default."""


def _with(s: Setting, **sizes: int) -> Setting:
    return Setting(kind=s.kind, config=s.config, sizes={**s.sizes, **sizes})
