"""Pipelines of diffusers as things to be trained: (clean, cond) from pictures and captions or classes, samples, a folder.

The class that model_index.json names is looked up in `KINDS`, and those of its components in `COMPONENTS`, nowhere else.
Captions are encoded by the pipeline's own `encode_prompt`; weights are read from safetensors only.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceptual_diffusion.adapters.diffusers import FAMILIES
from perceptual_diffusion.adapters.schedulers import SCHEDULERS
from perceptual_diffusion.cli import loading
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.cli.folders import Item, Wanted

COMPONENTS = {
    "diffusers": {*FAMILIES, *SCHEDULERS, "AutoencoderKL", "Transformer2DModel"},
    "transformers": {
        "CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPTextModel",
        "CLIPTextModelWithProjection", "CLIPTokenizer", "CLIPTokenizerFast", "CLIPVisionModelWithProjection",
        "T5EncoderModel", "T5Tokenizer", "T5TokenizerFast",
    },
    "stable_diffusion": {"StableDiffusionSafetyChecker"},
}  # fmt: skip
"""Libraries and classes that a pipeline's components may have."""

GUIDANCE = 3.5
"""What guidance-distilled Flux models are told in training: what their pipeline samples with."""
LORA_LAYERS = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures as the data loader gives them.

    Attributes:
        pixels: in [-1, 1], shape (B, C, side, side).
        frames: height and width of the original, and top and left of the crop after resizing, int64, shape (B, 4).
        index: which pictures of the folder they are, int64, shape (B,).
    """

    pixels: Tensor
    frames: Tensor
    index: Tensor


class Pipeline:
    """A pipeline of diffusers whose denoiser is trained. The methods of this class are those of latent text-to-image."""

    wanted: Wanted = "captions"
    fixed = False
    """Whether the pipeline draws pictures of one size only."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.part = "unet" if "unet" in pipeline.components else "transformer"
        self.denoiser: Any = getattr(pipeline, self.part)
        self.vae: Any = pipeline.components.get("vae")
        self.encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(part is self.denoiser).eval()
        if self.vae is not None:
            self.vae.float()  # half precision overflows in some
            self.vae.decode = _whole(self.vae.decode)
        pipeline.set_progress_bar_config(disable=True)

    @property
    def channels(self) -> int:
        """Channels of the pictures."""
        return int((self.denoiser if self.vae is None else self.vae).config.in_channels)

    @property
    def factor(self) -> int:
        """Pixels per latent."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def side(self, asked: int) -> int:
        """Give the side of the pictures, in pixels.

        Raises:
            UserError: the model cannot have the one asked for.
        """
        config = self.denoiser.config
        own = config.get("sample_size") or getattr(self.pipeline, "default_sample_size", None)
        own = own[0] if isinstance(own, list | tuple) else own
        unit = self.factor * (2 ** (len(config["block_out_channels"]) - 1) if self.part == "unet" else self._patch())
        if self.fixed and asked and own and asked != own * self.factor:
            raise UserError(
                f"`resolution` is {asked}, and this pipeline draws {own * self.factor} pixels. Leave it out."
            )
        if not (side := asked or (own or 0) * self.factor):
            raise UserError("`resolution` is 0, and the model does not say its own. Set it, in pixels.")
        if side % unit:
            raise UserError(f"`resolution` is {side}, expected a multiple of {unit} for this model.")
        return int(side)

    def _patch(self) -> int:
        return int(self.denoiser.config.get("patch_size") or 1)

    def clean(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Encode pictures in [-1, 1], shape (B, C, H, W), into what is noised; `generator` draws from the posterior."""
        config = self.vae.config
        latents = self.vae.encode(pixels).latent_dist.sample(generator)
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor  # type: ignore[no-any-return]

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode captions into conditions by name, a row per caption."""
        return {"encoder_hidden_states": self.pipeline.encode_prompt(texts, self.denoiser.device, 1, False)[0]}

    def encode_nothing(self) -> dict[str, Tensor]:
        """Encode a condition that is left out, as one row: what the pipeline guides away from."""
        return self.encode([""])

    def cond(self, rows: dict[str, Tensor], frames: Tensor, clean: Tensor) -> dict[str, Any]:
        """Make the denoiser's arguments of encoded captions, the frames of the pictures and the clean sample."""
        return dict(rows)

    def labels(self, classes: tuple[str, ...]) -> list[int]:
        """Give the model's class of each class of the data."""
        return []

    def sample(self, items: list[Item], labels: list[int], side: int, steps: int, seed: int) -> list[Any]:
        """Draw pictures for the captions or classes of some items; each has a seed of its own."""
        given = {"num_inference_steps": steps, "generator": _generators(len(items), seed)}
        return list(self._draw(items, labels, side, given).images)

    def _draw(self, items: list[Item], labels: list[int], side: int, given: dict[str, Any]) -> Any:
        return self.pipeline(prompt=[item.text for item in items], height=side, width=side, **given)

    def save(self, folder: Path, lora: bool) -> None:
        """Write the pipeline, or only its LoRA layers, as safetensors."""
        if not lora:
            self.pipeline.save_pretrained(folder, safe_serialization=True)
        else:
            from peft import get_peft_model_state_dict

            self.pipeline.save_lora_weights(
                folder, **{f"{self.part}_lora_layers": get_peft_model_state_dict(self.denoiser)}
            )


class Pixels(Pipeline):
    """An unconditional model of pixels: DDPM, DDIM."""

    wanted: Wanted = "nothing"
    fixed = True

    def clean(self, pixels: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        return pixels

    def _draw(self, items: list[Item], labels: list[int], side: int, given: dict[str, Any]) -> Any:
        from diffusers import DDIMPipeline  # needs fewer steps than DDPM's ancestral sampling

        drawn = DDIMPipeline(unet=self.denoiser, scheduler=self.pipeline.scheduler)
        drawn.set_progress_bar_config(disable=True)
        return drawn(batch_size=len(items), **given)


class Classes(Pipeline):
    """A latent model of classes: DiT."""

    wanted: Wanted = "classes"
    fixed = True

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        for module in self.denoiser.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = (
                    0.0  # each block would leave out other samples' classes; the run itself leaves them out
                )

    def labels(self, classes: tuple[str, ...]) -> list[int]:
        """Give a number as it is, a name that the pipeline knows as its class, or else the classes in order."""
        known = getattr(self.pipeline, "labels", {})
        number = self.denoiser.config.num_embeds_ada_norm
        if all(name.isdecimal() for name in classes):
            if (largest := max(map(int, classes))) >= number:
                raise UserError(
                    f"the data has a class {largest}, and those of the model end at {number - 1}. Rename the subfolders."
                )
            return [int(name) for name in classes]
        if all(name in known for name in classes):
            return [known[name] for name in classes]
        if len(classes) > number:
            raise UserError(f"the data has {len(classes)} classes, and the model {number}. Use fewer subfolders.")
        return list(range(len(classes)))

    def cond(self, rows: dict[str, Tensor], frames: Tensor, clean: Tensor) -> dict[str, Any]:  # noqa: D102
        nothing = self.denoiser.config.num_embeds_ada_norm
        return {"class_labels": torch.where(rows["class_labels"] < 0, nothing, rows["class_labels"])}

    def _draw(self, items: list[Item], labels: list[int], side: int, given: dict[str, Any]) -> Any:
        # the pipeline's guidance takes class 1000 for "no class"; a scale of 1 is none
        scale = {} if self.denoiser.config.num_embeds_ada_norm == 1000 else {"guidance_scale": 1.0}
        return self.pipeline(class_labels=[labels[item.label] for item in items], **scale, **given)


class StableDiffusionXL(Pipeline):
    """SDXL: pooled text, and the frame of each picture as micro-conditioning."""

    def encode(self, texts: list[str]) -> dict[str, Tensor]:  # noqa: D102
        states, _, pooled, _ = self.pipeline.encode_prompt(
            texts, device=self.denoiser.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    def encode_nothing(self) -> dict[str, Tensor]:  # noqa: D102
        rows = self.encode([""])
        zeros = self.pipeline.config.force_zeros_for_empty_prompt
        return {name: torch.zeros_like(row) for name, row in rows.items()} if zeros else rows

    def cond(self, rows: dict[str, Tensor], frames: Tensor, clean: Tensor) -> dict[str, Any]:  # noqa: D102
        side = torch.tensor([clean.shape[-2:]], device=frames.device).mul(self.factor).expand(len(frames), 2)
        added = {"text_embeds": rows["text_embeds"], "time_ids": torch.cat([frames, side], 1).to(clean.dtype)}
        return {"encoder_hidden_states": rows["encoder_hidden_states"], "added_cond_kwargs": added}


class StableDiffusion3(Pipeline):
    """SD3: joint and pooled text."""

    def encode(self, texts: list[str]) -> dict[str, Tensor]:  # noqa: D102
        states, _, pooled, _ = self.pipeline.encode_prompt(
            texts, None, None, device=self.denoiser.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}


class Flux(Pipeline):
    """Flux: latents packed into tokens with their places, and a guidance that distilled models are told."""

    def _patch(self) -> int:
        return 2

    def clean(self, pixels: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        latents = super().clean(pixels, generator)
        return self.pipeline._pack_latents(latents, *latents.shape)  # type: ignore[no-any-return]

    def encode(self, texts: list[str]) -> dict[str, Tensor]:  # noqa: D102
        states, pooled, _ = self.pipeline.encode_prompt(texts, None, device=self.denoiser.device)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def cond(self, rows: dict[str, Tensor], frames: Tensor, clean: Tensor) -> dict[str, Any]:  # noqa: D102
        side = int(clean.shape[1] ** 0.5)
        places = self.pipeline._prepare_latent_image_ids(len(clean), side, side, clean.device, clean.dtype)
        text = clean.new_zeros(rows["encoder_hidden_states"].shape[1], 3)
        told = {"guidance": clean.new_full((len(clean),), GUIDANCE)} if self.denoiser.config.guidance_embeds else {}
        return {**rows, "img_ids": places, "txt_ids": text, **told}


def _whole(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Let a VAE decode in float32 where its pipeline runs in mixed precision."""

    def run(latents: Tensor, *args: Any, **given: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.float(), *args, **given)

    return run


KINDS: dict[str, type[Pipeline]] = {
    "DDPMPipeline": Pixels,
    "DDIMPipeline": Pixels,
    "DiTPipeline": Classes,
    "StableDiffusionPipeline": Pipeline,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}
"""The pipelines that can be trained, by class."""


def load(name: str, dtype: torch.dtype = torch.float32) -> Pipeline:
    """Load a pipeline that can be trained.

    Args:
        name: a folder, or a hub id.
        dtype: of its weights; the VAE's are float32.

    Raises:
        UserError: it cannot be found or read, or is of another class.
    """
    folder, cls, absent = _find(name)
    files = [path.name for part in loading.DENOISERS for path in (folder / part).glob("*.safetensors")]
    half = "fp16" if files and all(".fp16" in file for file in files) else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # `torch_dtype` has another name since diffusers 0.42; others are the files'
            pipeline = cls.from_pretrained(name, use_safetensors=True, torch_dtype=dtype, variant=half, **absent)
    except Exception as error:  # diffusers, transformers, safetensors, JSON and the hub each have their own
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise UserError(f"the pipeline in {name!r} cannot be loaded: {type(error).__name__}: {first}") from error
    loaded = KINDS[cls.__name__](pipeline)
    _check_parts(loaded)
    return loaded


def wanted(name: str) -> Wanted:
    """Give what the pipeline needs beside pictures, without loading it.

    Raises:
        UserError: it cannot be found, or is of another class.
    """
    return KINDS[_find(name)[1].__name__].wanted


def _find(name: str) -> tuple[Path, Any, dict[str, None]]:
    """The folder of a pipeline, or of the description that was downloaded, its class, and the components it leaves out."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute():
            raise UserError(
                f"`model` is {name!r}, and there is no such folder. Give a pipeline's folder, or its hub id."
            )
        folder = loading._download(name, ["model_index.json"])
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{str(folder)!r} holds no model_index.json. Give the folder of a diffusers pipeline.")
    for part in sorted((*folder.glob("*/config.json"), *folder.glob("*/scheduler_config.json"))):
        loading.check_sizes(loading._json(part), part)
    return folder, *_checked(folder / "model_index.json")


def _checked(path: Path) -> tuple[Any, dict[str, None]]:
    """The class that a model_index.json names, after a look at its components, and those that it leaves out."""
    index = loading._json(path)
    name = str(index.get("_class_name"))
    if name not in KINDS:
        raise UserError(f"{str(path)!r} names the pipeline {name[:80]!r}, expected one of {', '.join(KINDS)}. For others, write a loop of your own: see examples/.")  # fmt: skip
    import diffusers

    cls = getattr(diffusers, name)
    absent: dict[str, None] = {}
    for part, parameter in inspect.signature(cls.__init__).parameters.items():
        given = index.get(part)
        if given in (None, [None, None]) and parameter.default is parameter.empty and part != "self":
            absent[part] = None  # such as SD3's T5; diffusers wants to be told
        elif isinstance(given, list) and given != [None, None]:
            known = len(given) == 2 and (str(given[1]) in COMPONENTS.get(str(given[0]), ()))
            if not known:
                raise UserError(f"{str(path)!r} names {given!r} as its {part!r}, which is not among the known classes. Use a pipeline of diffusers as it was released.")  # fmt: skip
    return cls, absent


def _check_parts(loaded: Pipeline) -> None:
    """Refuse what the class of the pipeline does not show."""
    config = loaded.denoiser.config
    if loaded.wanted == "nothing" and config.get("num_class_embeds"):
        raise UserError(f"the unet of {type(loaded.pipeline).__name__} has classes, which that pipeline cannot be given. Use DiTPipeline's, or a loop of your own.")  # fmt: skip
    if loaded.part == "unet" and loaded.vae is not None and config.in_channels != loaded.vae.config.latent_channels:
        raise UserError(f"the unet takes {config.in_channels} channels, and the latents have {loaded.vae.config.latent_channels}: it is no text-to-image model.")  # fmt: skip


def _generators(number: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + index) for index in range(number)]
