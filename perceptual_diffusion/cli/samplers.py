"""Sample pictures from a diffusers pipeline, each from a seed of its own, so that the batch size changes nothing."""

import inspect
import json
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from perceptual_diffusion import __version__
from perceptual_diffusion.cli import _paths, folders, pipelines, sampling
from perceptual_diffusion.cli._errors import UserError

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ZERO_SNR = 1e-6
"""An alpha_bar below this is zero: some schedulers write 2**-24 there, to divide by."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How pictures are sampled; picture i has the seed `seed` + i, and the prompt or class i, from the first again at their end.

    Without `n` there are as many as prompts or classes, or 16; without `guidance` there is none, or what pipelines tell those
    models that are told it.
    """

    n: int | None = None
    prompts: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    steps: int = 25
    guidance: float | None = None
    rescale: float = 0.0
    seed: int = 0
    batch: int = 8
    device: str = "auto"
    precision: str = "no"
    size: int | None = None
    lora: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("steps", 1), ("batch", 1), ("seed", 0), ("size", 8)):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31:
                raise UserError(f"--{name} is {value}, expected a whole number from {least} to {2**31 - 1}.")
        if self.guidance is not None and not 1 <= self.guidance < float("inf"):
            raise UserError(f"--guidance is {self.guidance}, expected a number of at least 1, which is no guidance.")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"--rescale is {self.rescale}, expected a number from 0 to 1.")
        if self.precision not in PRECISIONS:
            raise UserError(f"--precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}.")


class Sampler:
    """A pipeline that is ready to sample.

    Args:
        name: a folder of a diffusers pipeline, or a hub id.
        settings: how to sample.
        source: a folder of pictures whose captions or classes are taken, spread evenly, where `settings` hold none.

    Raises:
        UserError: the pipeline cannot be loaded, or cannot be sampled with these settings.
    """

    def __init__(self, name: str, settings: Settings, source: Path | None = None) -> None:
        self.name, self.settings = name, settings
        loaded = _load(name, settings)
        self.cls, self.pipe = type(loaded.pipeline).__name__, _by_ddim(loaded.pipeline)
        self.denoiser, self.wanted = loaded.denoiser, loaded.wanted
        self.spacing = _use_trailing(self.pipe)
        self.parameters = inspect.signature(self.pipe.__call__).parameters
        usual = pipelines.GUIDANCE if self.denoiser.config.get("guidance_embeds") else 1.0
        self.guidance = usual if settings.guidance is None else settings.guidance
        self._check(source)
        conditions: list[Any] = [*settings.prompts, *map(self._class, settings.classes)]
        self.n = settings.n or (len(conditions) if len(conditions) > 1 else 16)
        if source is not None and not conditions and self.wanted != "nothing":
            found = folders.read(source, self.wanted)
            labels, items = loaded.labels(found.classes), found.items
            spread = [items[i * max(self.n, len(items)) // self.n % len(items)] for i in range(self.n)]
            conditions = [item.text if self.wanted == "captions" else labels[item.label] for item in spread]
        self.conditions = conditions
        if settings.lora is not None:
            _load_lora(self.pipe, self.cls, settings.lora)

    def _check(self, source: Path | None) -> None:
        """Refuse settings that this pipeline has no use for, and ask for those that it needs."""
        given, cls = self.settings, self.cls
        wants = {
            "nothing": "no condition",
            "classes": "a class (--class)",
            "captions": "a prompt (--prompt, --prompts)",
        }
        for option, values, kind in (("--prompt", given.prompts, "captions"), ("--class", given.classes, "classes")):
            if values and self.wanted != kind:
                raise UserError(f"{option} is given, but {cls} takes {wants[self.wanted]}. Leave {option} out.")
            if not values and self.wanted == kind and source is None:
                raise UserError(f"{cls} needs {wants[kind]}, and none is given.")
        if self.wanted == "classes" and self.guidance != 1 and self.denoiser.config.num_embeds_ada_norm != 1000:
            raise UserError(
                f"--guidance is given, but {cls} takes class 1000 for none, and this model has another number of classes."
            )
        for option, used, argument in (
            ("--guidance", self.guidance != 1, "guidance_scale"), ("--rescale", given.rescale != 0, "guidance_rescale"),
            ("--size", given.size is not None, "height"),
        ):  # fmt: skip
            if used and argument not in self.parameters:
                raise UserError(f"{option} is given, but {cls} has no `{argument}`. Leave {option} out.")

    def _class(self, value: str) -> int:
        """The index of a class, given by index or by name."""
        labels, count = self.pipe.labels, self.denoiser.config.num_embeds_ada_norm
        index = int(value) if value.isdecimal() else labels.get(value, count)
        if not 0 <= index < count:
            known = f", or one of {', '.join(list(labels)[:5])}, …" if labels else ""
            raise UserError(f"--class is {value!r}, expected a number from 0 to {count - 1}{known}.")
        return int(index)

    @property
    def shape(self) -> tuple[Any, ...]:
        """What two models must share for the same seeds to be the same noise."""
        config = self.denoiser.config
        return config.in_channels, config.get("sample_size"), getattr(self.pipe, "vae_scale_factor", None)

    def pictures(self) -> Iterator[list[tuple[dict[str, Any], Any]]]:
        """Give the pictures (PIL) batch by batch, each with its seed and its condition.

        Raises:
            UserError: the pipeline refuses, or memory runs out.
        """
        given, word = self.settings, {"captions": "prompt", "classes": "class"}.get(self.wanted, "")
        for start in range(0, self.n, given.batch):
            index = range(start, min(start + given.batch, self.n))
            conditions = [self.conditions[i % len(self.conditions)] if word else None for i in index]
            try:
                with _quiet():
                    made = self._call([given.seed + i for i in index], conditions)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"out of memory with --batch {given.batch}. Use a smaller --batch, or --precision bf16."
                ) from error
            except Exception as error:  # the pipeline's own
                raise UserError(
                    f"{self.name!r} cannot be sampled with these settings: {type(error).__name__}: {_first_line(error)}"
                ) from error
            flagged = getattr(made, "nsfw_content_detected", None) or [False] * len(index)
            batch = []
            for i, condition, picture, blank in zip(index, conditions, made.images, flagged, strict=True):
                row = {"seed": given.seed + i} | ({word: condition} if word else {})
                batch.append((row | ({"blanked by the safety checker": True} if blank else {}), picture))
            yield batch

    def _call(self, seeds: list[int], conditions: list[Any]) -> Any:
        """Run the pipeline for these pictures. Noise is drawn on the CPU: the same on every device."""
        given = self.settings
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        key = {"nothing": "batch_size", "classes": "class_labels", "captions": "prompt"}[self.wanted]
        told = len(seeds) if self.wanted == "nothing" else conditions
        options: dict[str, Any] = {"num_inference_steps": given.steps, "generator": generators, key: told}
        if "guidance_scale" in self.parameters:
            options["guidance_scale"] = self.guidance
        if given.rescale:
            options["guidance_rescale"] = given.rescale
        if given.size is not None:
            options |= {"height": given.size, "width": given.size}
        scheduler = self.pipe.scheduler
        if self.wanted == "classes" and "generator" in inspect.signature(type(scheduler).step).parameters:
            # DiTPipeline hands its scheduler no generator, and with guidance every latent twice
            scheduler.step = partial(type(scheduler).step, scheduler, generator=generators * (1 + (self.guidance > 1)))
        if self.wanted != "nothing":
            return self.pipe(**options)
        made = self.pipe(**options, output_type="pt")  # its own conversion knows no bfloat16
        made.images = self.pipe.numpy_to_pil(made.images.permute(0, 2, 3, 1).float().cpu().numpy())
        return made

    def facts(self) -> dict[str, Any]:
        """Say what was sampled, and how, as JSON can hold it."""
        # not `to_json_string`, which fails on a config with a `quantization_config`; the list left out has no order of its own
        config = {k: v for k, v in self.pipe.scheduler.config.items() if k != "_use_default_values"}
        scheduler = json.loads(json.dumps(config, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x)))
        settings = {key: value for key, value in asdict(self.settings).items() if key not in ("prompts", "classes")}
        settings |= {"n": self.n, "guidance": self.guidance}
        return {
            "model": self.name, "pipeline": self.cls, "settings": settings,
            "scheduler": {"class": type(self.pipe.scheduler).__name__, "spacing": self.spacing, "config": scheduler},
            "versions": versions(),
        }  # fmt: skip


def versions() -> dict[str, str]:
    """Give the versions that pictures depend on."""
    found = {"perceptual-diffusion": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("diffusers", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _load(name: str, settings: Settings) -> pipelines.Pipeline:
    """Load a pipeline onto the device."""
    device, dtype = sampling.device(settings.device), PRECISIONS[settings.precision]
    folder = _paths.path(name, "the model")
    try:
        with _quiet() if folder.is_dir() else nullcontext():  # a download shows its own bars
            loaded = pipelines.load(str(folder), dtype)
            loaded.pipeline.to(device)
            if loaded.vae is not None and dtype != torch.float32:
                loaded.vae.to(dtype)  # training keeps it in float32
    except torch.OutOfMemoryError as error:
        raise UserError(f"{name!r} does not fit into the memory of {device}. Use --precision bf16.") from error
    return loaded


def _by_ddim(pipe: Any) -> Any:
    """Make a pipeline of DDPM one of DDIM, which needs fewer steps and draws no noise on the way."""
    if type(pipe).__name__ != "DDPMPipeline":
        return pipe
    from diffusers import DDIMPipeline

    made = DDIMPipeline(unet=pipe.unet, scheduler=pipe.scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def _use_trailing(pipe: Any) -> str:
    """Begin at the last timestep where the schedule has no signal there, and say which spacing is used."""
    scheduler = pipe.scheduler
    spacing, alpha_bar = scheduler.config.get("timestep_spacing"), getattr(scheduler, "alphas_cumprod", None)
    if spacing is None:
        return "the scheduler's own"
    if alpha_bar is None or float(alpha_bar[-1]) > ZERO_SNR:
        return str(spacing)
    if spacing == "trailing":
        return "trailing"
    pipe.scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    return f"trailing instead of {spacing}, because the schedule ends at zero SNR"


def _load_lora(pipe: Any, cls: str, name: str) -> None:
    """Add the LoRA weights in a folder to a pipeline."""
    folder = _paths.path(name, "--lora")
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(
            f"--lora {name!r} holds {len(files)} .safetensors files, expected one. Give the folder of a LoRA."
        )
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"--lora is given, but {cls} takes none in diffusers. Leave --lora out.")
    try:
        with _quiet():
            pipe.load_lora_weights(str(folder), weight_name=files[0].name, local_files_only=True, use_safetensors=True)
    except Exception as error:  # diffusers, peft and safetensors each have their own
        raise UserError(f"--lora {name!r} cannot be loaded: {type(error).__name__}: {_first_line(error)}") from error
    if not any("lora_" in key for part in pipe.components.values() for key in getattr(part, "state_dict", dict)()):
        raise UserError(f"--lora {name!r} fits no layer of this {cls}. Give the LoRA of this model.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars and remarks of diffusers and transformers off the screen."""
    from diffusers.utils import is_transformers_available, logging

    libraries: list[Any] = [logging]
    if is_transformers_available():
        from transformers.utils import logging as other

        libraries.append(other)
    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    try:
        for each in libraries:
            each.set_verbosity_error()
            each.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for each, level, bars in before:
            each.set_verbosity(level)
            if bars:
                each.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
