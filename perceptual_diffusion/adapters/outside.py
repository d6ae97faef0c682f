"""Teachers made of outside networks: a timm backbone on the decoded sample, or the decoder itself.

They are the baselines that the model's own frozen copy is compared with, run through the same objective: losses like
LPIPS (Zhang et al. 2018), on tokens of a ViT such as DINO, or on features of the VAE's decoder (LPL, Berrada et al. 2025).
Such networks have seen clean pictures only, so they are used with `t_prime="clean"`, which compares x̂_0 with x_0:

    teacher = TimmTeacher(timm.create_model("vgg16", pretrained=True), decode=vae)
    objective = SelfPerceptualObjective.wrap(model, scheduler, teacher=teacher, t_prime="clean")
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from perceptual_diffusion import taps
from perceptual_diffusion._shapes import compute_dtype, describe, leaves
from perceptual_diffusion.teachers import ModuleTeacher
from perceptual_diffusion.types import Cond, Sample

Decode = Callable[[Any], Tensor]
"""Takes the model's sample to pixels in [-1, 1], shape (B, C, H, W), with a gradient."""

MODES = ("bilinear", "bicubic")
"""Interpolations of data configs that torch has with antialiasing."""


class TimmTeacher:
    """Features of a timm backbone on pictures, with a gradient to the picture and none to the weights.

    Pixels in [-1, 1] are brought to the size of the backbone's own data config, with its interpolation, and normalised by
    its mean and standard deviation. The time and the condition are not used.

    The backbone, and a decoder that is a module, are put into `eval()` and frozen, and stay so.

    Args:
        backbone: a model of timm that has `forward_intermediates`.
        layers: which of its intermediate features to compare: indices as timm counts them, from the end where negative;
            by default all. A ViT has one for each block, a convolutional network one for each resolution.
        decode: takes the sample to pixels: a VAE of diffusers, whose scaling of latents is undone, or a function; by
            default the sample is pixels.
        resize: bring pictures to the size of the data config; without it they are taken as they are.
        norm: apply the backbone's last norm to every feature, as DINO's are used.
        prefix: put the class and register tokens of a ViT before its patch tokens.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the backbone has no intermediate features or not those, or the VAE does not say how its latents are
            scaled.
        ImportError: timm is not installed.
    """

    t_prime = "clean"
    """It looks at x̂_0 and x_0 themselves, where `wrap` is not told otherwise."""

    def __init__(
        self,
        backbone: nn.Module,
        *,
        layers: Sequence[int] | None = None,
        decode: nn.Module | Decode | None = None,
        resize: bool = True,
        norm: bool = False,
        prefix: bool = False,
    ) -> None:
        if not isinstance(backbone, nn.Module):
            raise TypeError(
                f"`backbone` is {backbone!r}, expected a model of timm. Pass `timm.create_model(name, pretrained=True)`."
            )
        run = getattr(backbone, "forward_intermediates", None)
        if run is None:
            raise ValueError(
                f"`backbone` is a {type(backbone).__name__} without `forward_intermediates`, expected a model of timm that has "
                "it. Use another, or teachers.ModuleTeacher with `layers=`."
            )
        tokens = "return_prefix_tokens" in inspect.signature(run).parameters  # a ViT's tokens stay tokens
        before: Any = getattr(backbone, "num_prefix_tokens", None)
        if prefix and not (tokens and before):
            raise ValueError(
                f"`prefix` is True, but {type(backbone).__name__} has no class or register tokens. Leave it out."
            )
        config, indices = _data_config(backbone), _indices(backbone, layers)
        self.module = backbone.eval().requires_grad_(False)
        self.decode = _decoder(decode)
        self.size = _size(backbone, config) if resize else None
        self.interpolation = config["interpolation"] if config["interpolation"] in MODES else "bicubic"
        self.mean, self.std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
        self.options: dict[str, Any] = {
            "indices": indices,
            "intermediates_only": True,
            "stop_early": True,
            "norm": norm,
            "output_fmt": "NLC" if tokens else "NCHW",
        }
        if prefix:
            self.options["return_prefix_tokens"] = True

    def __call__(self, x_t: Sample, t: Tensor, cond: Cond, /) -> list[Tensor]:
        """Give the features of a sample.

        Args:
            x_t: the sample, pixels in [-1, 1] or what `decode` takes, shape (B, *).
            t: ignored.
            cond: ignored.

        Returns:
            maps (B, C, H, W), or for a ViT tokens (B, N, C), in the order of depth; of a video (B, C, F, H, W) those of
            its frames, (B F, ...).

        Raises:
            ValueError: the sample gives no pictures that the backbone takes.
        """
        held = next(self.module.parameters())
        for leaf in leaves(x_t):
            if leaf.device != held.device:
                raise ValueError(
                    f"the teacher is on {held.device}, expected {leaf.device}, the device of the sample. "
                    f"Call `objective.to({str(leaf.device)!r})`."
                )
        pixels: Any = x_t if self.decode is None else self.decode(x_t)
        if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5) or pixels.shape[1] != len(self.mean):
            raise ValueError(
                f"{'the sample' if self.decode is None else '`decode`'} gives {describe(pixels)}, expected pixels in [-1, 1], "
                f"shape (B, {len(self.mean)}, H, W). Pass a `decode=` that makes them of the model's sample."
            )
        if pixels.ndim == 5:
            pixels = pixels.transpose(1, 2).flatten(0, 1)
        picture = self.prepare(pixels)
        if not torch.is_autocast_enabled(held.device.type):
            picture = picture.to(held.dtype)
        features = self.module.forward_intermediates(picture, **self.options)  # type: ignore[operator]
        return [torch.cat([f[1], f[0]], 1) if isinstance(f, tuple) else f for f in features]

    def prepare(self, pixels: Tensor) -> Tensor:
        """Bring pixels in [-1, 1], shape (B, C, H, W), to what the backbone was trained on, in float32 or better."""
        pixels = (pixels.to(compute_dtype(pixels)) + 1) / 2
        if self.size is not None and pixels.shape[-2:] != self.size:
            pixels = functional.interpolate(pixels, self.size, mode=self.interpolation, antialias=True)
        return (pixels - self.mean.to(pixels)) / self.std.to(pixels)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the backbone, and a decoder that is a module, as `nn.Module.to` does."""
        for module in self._modules:
            module.to(*args, **kwargs)
        return self

    @property
    def parameters_held(self) -> int:
        """How many parameters the teacher holds in memory."""
        return sum(p.numel() for module in self._modules for p in module.parameters())

    @property
    def _modules(self) -> list[nn.Module]:
        decoder = self.decode.vae if isinstance(self.decode, VAEDecoder) else self.decode
        return [self.module, decoder] if isinstance(decoder, nn.Module) else [self.module]


class DecoderTeacher(ModuleTeacher):
    """Features inside the decoder of a diffusers VAE on latents, with a gradient to the latents and none to the weights.

    The VAE is put into `eval()` and frozen, and stays so. Each pass ends at the last layer.

    Args:
        vae: a VAE of diffusers; its scaling of latents is undone.
        layers: dotted names of its layers; by default the middle and every up block of its decoder.

    Raises:
        TypeError: `vae` is no module.
        ValueError: a layer does not exist, or the VAE does not say how its latents are scaled.
    """

    t_prime = "clean"
    """It looks at x̂_0 and x_0 themselves, where `wrap` is not told otherwise."""

    def __init__(self, vae: nn.Module, *, layers: Sequence[str] | None = None) -> None:
        if not isinstance(vae, nn.Module) or not hasattr(vae, "decode"):
            raise TypeError(
                f"`vae` is a {type(vae).__name__}, expected a VAE of diffusers, a module that has `decode`."
            )
        decode = VAEDecoder(vae)
        names = list(layers) if layers is not None else [n for n, _ in vae.named_modules() if _is_stage(n)]
        if not names:
            raise ValueError(
                f"{type(vae).__name__} has no `decoder.mid_block` and no `decoder.up_blocks`. Pass `layers=` with dotted names."
            )
        super().__init__(vae, layers=names, call=lambda module, x_t, t, cond: decode(x_t), select=taps.select)


class VAEDecoder:
    """The decoder of a diffusers VAE: latents as a diffusion model has them, to pixels in [-1, 1].

    pixels = decode(latents / scaling_factor + shift_factor), or with means and standard deviations of the channels
    decode(latents · std / scaling_factor + mean), as the VAE's config says. The VAE is put into `eval()` and frozen.

    Args:
        vae: the VAE.

    Raises:
        ValueError: its config does not say how its latents are scaled.
    """

    def __init__(self, vae: nn.Module) -> None:
        config = getattr(vae, "config", None)
        config = config if isinstance(config, Mapping) else {}
        self.scale = config.get("scaling_factor")
        # LTX's VAEs hold the statistics as buffers
        held = dict(vae.named_buffers(recurse=False)) if isinstance(vae, nn.Module) else {}
        mean, std = (config.get(name, held.get(name)) for name in ("latents_mean", "latents_std"))
        if self.scale is None and (mean is None or std is None):
            raise ValueError(
                f"the config of {type(vae).__name__} has no `scaling_factor` and no `latents_mean`, so how its latents are scaled "
                "cannot be told. Pass a function, `decode=lambda latents: vae.decode(...).sample`."
            )
        self.of_channels = None if mean is None or std is None else (torch.as_tensor(mean), torch.as_tensor(std))
        self.shift = config.get("shift_factor") or 0.0
        self.vae = vae.eval().requires_grad_(False)

    def __call__(self, latents: Tensor) -> Tensor:
        """Give the pixels of latents (B, C, *)."""
        weight = next(self.vae.parameters())
        wide = latents.to(compute_dtype(latents)) / (self.scale or 1.0)
        if self.of_channels is None:
            wide = wide + self.shift
        else:
            mean, std = (x.to(wide).reshape(-1, *[1] * (wide.ndim - 2)) for x in self.of_channels)
            wide = wide * std + mean
        if not torch.is_autocast_enabled(weight.device.type):
            wide = wide.to(weight.dtype)
        output = self.vae.decode(wide)  # type: ignore[operator]
        return cast(Tensor, output.sample if hasattr(output, "sample") else output)


def _decoder(decode: Any) -> Decode | None:
    if isinstance(decode, nn.Module):
        return VAEDecoder(decode) if hasattr(decode, "decode") else decode.eval().requires_grad_(False)
    if decode is not None and not callable(decode):
        raise TypeError(f"`decode` is {decode!r}, expected a VAE of diffusers, a function of the sample, or None.")
    return cast("Decode | None", decode)


def _is_stage(name: str) -> bool:
    head, _, last = name.rpartition(".")
    return name == "decoder.mid_block" or (head == "decoder.up_blocks" and last.isdecimal())


def _data_config(backbone: nn.Module) -> dict[str, Any]:
    try:
        from timm.data import resolve_model_data_config
    except ImportError as error:
        raise ImportError("TimmTeacher needs timm. Run `pip install 'perceptual-diffusion[timm]'`.") from error
    config: dict[str, Any] = resolve_model_data_config(backbone)
    return config


def _size(backbone: nn.Module, config: dict[str, Any]) -> tuple[int, int]:
    """The size of pictures: that which the patches of a backbone are laid out for, else its data config's."""
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None) or config["input_size"]
    return int(size[-2]), int(size[-1])


def _indices(backbone: nn.Module, layers: Any) -> list[int] | None:
    """The indices, made sure of; None for all."""
    if layers is None:
        return None
    whole = isinstance(layers, Sequence) and not isinstance(layers, str)
    if not whole or not layers or any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
        raise TypeError(f"`layers` is {layers!r}, expected a list of indices, such as [-1], or None for all.")
    count = len(cast(Any, backbone.feature_info))
    if any(not -count <= i < count for i in layers):
        raise ValueError(
            f"`layers` is {list(layers)}, expected indices from {-count} to {count - 1}: {type(backbone).__name__} has {count} "
            "intermediate features."
        )
    return list(layers)
