"""The denoisers of diffusers: one line for each class. diffusers itself is never imported here.

A line says what cannot be seen in the model: where its middle is, in which unit it takes its time, what released models
predict, and which of its arguments are noisy. Batch layout, streams and tokens are found (`perceptual_diffusion.features`).
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from perceptual_diffusion import taps
from perceptual_diffusion._shapes import describe, first
from perceptual_diffusion.adapters._registry import Adapter, register
from perceptual_diffusion.types import Cond, FeatureSelect, Sample

FLOW, DATAWARD = "flow_prediction", "-flow_prediction"

Spread = Callable[[Any, Tensor, Any, int, dict[str, Any]], Any]
"""`(model, t, x, held, cond) -> the time argument`, where it is not the times (B,) as they are; x is what the model is
given, of which the first `held` entries along the joined dimension are a clean condition, at time 0."""


class Concat(NamedTuple):
    """A clean condition that is joined to the noisy sample, as `cond["concat"]`.

    A tensor alone is joined where released models of the class have it.

    Attributes:
        clean: the condition, in the model's layout; for several noisy arguments a dict by their names.
        dim: the dimension along which it is joined, of a list that of its tensors; None: the family's.
        first: whether it comes before the sample rather than behind it; None: as in the family.
    """

    clean: Any
    dim: int | None = None
    first: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One class of denoisers.

    Attributes:
        modality: what it makes.
        middle: attribute of the middle; or of the lists of blocks, joined by "+" in the order they run ("&" where they
            take turns), of which the block with half of all before it is the middle.
        time: unit of its time, one of `adapters._registry.TIMES`.
        prediction: what released models predict, where the scheduler does not say it (flow matching).
        noisy: its arguments that are denoised.
        times: its arguments of time.
        outputs: the fields of its output that hold the predictions, in the order of `noisy`.
        spread: makes the time argument of the times (B,).
        second: arguments of a second time, without which a flow map predicts nothing, and the setting of the model that
            makes it one ("": always).
        concat: dimension along which `cond["concat"]` is joined to the sample.
        first: whether it comes before the sample.
        held: dimension along which a condition before the sample has time 0.
        channel: dimension of the channels; None: 2 of tokens (B, N, C), else 1.
        round_time: whether the class takes its time in the dtype of its weights, as its pipeline gives it.
        select: takes the noisy sample's part out of the middle's output, where it cannot be found.
        flex: whether its attention is FlexAttention, which has no backward on a CPU.
        awake: modules that have no gradient to their input in eval mode, and no dropout in train mode.
        refused: why it cannot be used.
        note: what a user should know.
    """

    modality: str
    middle: str = ""
    time: str = "timestep"
    prediction: str | tuple[str, ...] | None = None
    noisy: tuple[str, ...] = ("hidden_states",)
    times: tuple[str, ...] = ("timestep",)
    outputs: tuple[str, ...] = ("sample",)
    spread: Spread | None = None
    second: Mapping[str, str] = field(default_factory=dict)
    concat: int = 1
    first: bool = False
    held: int | None = None
    channel: int | None = None
    round_time: bool = False
    select: FeatureSelect | None = None
    flex: bool = False
    awake: tuple[str, ...] = ()
    refused: str = ""
    note: str = ""

    def adapter(self, name: str, model: nn.Module) -> Adapter:
        """Give the adapter of a model of the class."""
        if self.refused:
            raise ValueError(f"{name} cannot be trained with this objective: {self.refused}")
        return Adapter(
            family=name,
            layers=(middle_of(model, self.middle),),
            call=self.call,
            output=self.output,
            select=self.select,
            prepare=self.prepare,
            time=self.time,
            prediction=self.prediction,
            why=f"the class table has {self.middle}",
        )

    def call(self, model: Any, x_t: Any, t: Tensor, cond: Cond, /) -> Any:
        """Run the model on the noisy sample, joined with the clean condition if there is one, at t in the model's unit."""
        given = dict(cond)
        clean = given.pop("concat", None)
        inner: Any = taps.unwrap(model)
        if self.flex and torch.is_grad_enabled() and first(x_t).device.type == "cpu":
            raise ValueError(
                f"{type(inner).__name__} uses FlexAttention, which has no backward on a CPU. Move the model and its inputs to a GPU."
            )
        held, x = 0, x_t
        dim, before = self.concat, self.first
        if clean is not None:
            clean = clean if isinstance(clean, Concat) else Concat(clean)
            dim = dim if clean.dim is None else clean.dim
            before = before if clean.first is None else clean.first
            x = _join(x_t, clean.clean, dim, before)
            if before and dim == self.held and isinstance(clean.clean, Tensor):
                held = clean.clean.shape[dim]
        noisy = self.pack(x)
        self._check_parts(inner, noisy, given)
        second = [name for name, setting in self.second.items() if not setting or inner.config.get(setting)]
        for name in second:
            if given.get(name) is None:
                raise ValueError(
                    f"`cond` lacks {name!r}: {type(inner).__name__} is a flow map from one time to a second. Pass 0 there for the "
                    "mean velocity down to the clean sample, or `lambda t: t` for the velocity at t itself."
                )
        time = t if self.spread is None else self.spread(inner, t, x, held, given)
        for name in second:
            given[name] = given[name](time) if callable(given[name]) else given[name]
        times = time if isinstance(time, dict) else dict.fromkeys(self.times, time)
        if self.round_time and first(x_t).dtype in (torch.float16, torch.bfloat16):
            times = {name: value.to(first(x_t).dtype) for name, value in times.items()}
        output = model(**noisy, **times, **given)
        return output if (dim, before) == (self.concat, self.first) else self._take(output, x_t, dim, before)

    def _check_parts(self, model: Any, noisy: dict[str, Any], given: dict[str, Any]) -> None:
        parameters = inspect.signature(model.forward).parameters
        needed = [
            name for name in self.noisy if name in parameters and parameters[name].default is inspect.Parameter.empty
        ]
        unknown = [name for name in noisy if name not in self.noisy]
        missing = [name for name in needed if name not in noisy and name not in given]
        if unknown or missing:
            what = f"has the part {unknown[0]!r}" if unknown else f"lacks the part {missing[0]!r}"
            raise ValueError(
                f"the sample {what}, expected {' and '.join(map(repr, self.noisy))}, the noisy arguments of "
                f"{type(model).__name__}. Pass a dict of them, or a part that is not noisy in `cond`."
            )

    def pack(self, x: Any) -> dict[str, Any]:
        """Give the noisy arguments."""
        return dict(x) if isinstance(x, dict) else {self.noisy[0]: x}

    def output(self, output: Any, x_t: Sample) -> Sample:
        """Take the prediction out of the output, without a learned variance or tokens of a joined condition."""
        return self._take(output, x_t, self.concat, self.first)

    def _take(self, output: Any, x_t: Any, dim: int, before: bool) -> Sample:
        if _is_like(output, x_t):
            return cast(Sample, output)  # taken out already
        parts = {
            name: self._part(output, field, i)
            for i, (name, field) in enumerate(zip(self.noisy, self.outputs, strict=True))
        }
        if isinstance(x_t, dict):
            return {name: self._fit(parts.get(name), part, dim, before) for name, part in x_t.items()}
        return cast(Sample, self._fit(parts[self.noisy[0]], x_t, dim, before))

    def _part(self, output: Any, name: str, place: int) -> Any:
        if hasattr(output, name):
            return getattr(output, name)
        if isinstance(output, tuple):
            return output[place] if place < len(output) else None
        return output

    def _fit(self, prediction: Any, like: Any, dim: int, before: bool) -> Any:
        if isinstance(prediction, list | tuple) and isinstance(like, list) and len(prediction) == len(like):
            after = dim + 1 if dim >= 0 else dim  # of tensors without a batch dimension
            return [self._fit(p[None], x[None], after, before)[0] for p, x in zip(prediction, like, strict=True)]
        if not isinstance(prediction, Tensor) or not isinstance(like, Tensor) or prediction.ndim != like.ndim:
            return prediction
        channel = (2 if like.ndim == 3 else 1) if self.channel is None else self.channel % like.ndim
        if channel < like.ndim and prediction.shape[channel] == 2 * like.shape[channel]:  # mean and variance
            prediction = prediction.narrow(channel, 0, like.shape[channel])
        dim = dim % like.ndim
        size, wanted = prediction.shape[dim], like.shape[dim]
        if size > wanted and dim != channel:  # tokens or frames of a joined condition
            prediction = prediction.narrow(dim, size - wanted if before else 0, wanted)
        return prediction

    def prepare(self, teacher: nn.Module) -> None:
        """Mend what `eval()` breaks in the teacher."""
        for module in teacher.modules():
            if type(module).__name__ in self.awake:
                module.train()


class _HiDream(Family):
    """Its output in train mode is patches, (B, C, N, p²)."""

    def output(self, output: Any, x_t: Sample) -> Sample:
        patches = super().output(output, x_t)
        if (
            not isinstance(patches, Tensor)
            or not isinstance(x_t, Tensor)
            or patches.ndim != 4
            or patches.shape == x_t.shape
        ):
            return patches
        size = math.isqrt(patches.shape[-1])
        rows, columns = x_t.shape[2] // size, x_t.shape[3] // size
        patches = patches[:, :, : rows * columns].unflatten(2, (rows, columns)).unflatten(4, (size, size))
        image: Tensor = patches.permute(0, 1, 2, 4, 3, 5).reshape(x_t.shape)
        return image


class _Ideogram4(Family):
    """Its sample is as long as text and image together: the places of the text, in front, are 0."""

    def call(self, model: Any, x_t: Any, t: Tensor, cond: Cond, /) -> Any:
        text = x_t.new_zeros(len(x_t), cond["indicator"].shape[1] - x_t.shape[1], x_t.shape[2])
        return super().call(model, x_t, t, {**cond, "concat": text} if "indicator" in cond else cond)


class _Cosmos3(Family):
    """One packed sequence, without a batch dimension; items (C, T, H, W) go in and come out as (1, C, T, H, W)."""

    def pack(self, x: Any) -> dict[str, Any]:
        parts = super().pack(x)
        return parts | {"vision_tokens": [item[None] for item in parts["vision_tokens"]]}

    def output(self, output: Any, x_t: Sample) -> Sample:
        if _is_like(output, x_t):
            return cast(Sample, output)
        video = [item[0] for item in output.sample]
        return {"vision_tokens": video, "sound_tokens": output.sound} if isinstance(x_t, dict) else video


def _is_like(output: Any, x_t: Any) -> bool:
    """Whether a prediction has been taken out of the output already."""
    if isinstance(x_t, list):
        return isinstance(output, list)
    return isinstance(x_t, dict) and type(output) is dict and output.keys() == x_t.keys()


def _join(x: Any, clean: Any, dim: int, before: bool) -> Any:
    if isinstance(x, dict):
        clean = clean if isinstance(clean, dict) else {"": clean}
        unknown = [key for key in clean if key not in x]
        if unknown:
            raise ValueError(
                f"`cond['concat']` has the part {unknown[0]!r}, expected a dict with some of {', '.join(map(repr, x))}, to which "
                "its parts are joined."
            )
        return {key: _join(x[key], clean[key], dim, before) if key in clean else x[key] for key in x}
    if isinstance(x, list) and not (isinstance(clean, list | tuple) and len(clean) == len(x)):
        raise ValueError(
            f"`cond['concat']` is {describe(clean)}, expected a list of {len(x)} tensors, one for each of the samples."
        )
    if isinstance(x, list):
        inner = dim - 1 if dim > 0 else dim
        return [[*b, a] if isinstance(b, list) else _join(a, b, inner, before) for a, b in zip(x, clean, strict=True)]
    if not isinstance(clean, Tensor) or clean.ndim != x.ndim:
        raise ValueError(
            f"`cond['concat']` is {describe(clean)}, expected a tensor that is joined to the sample {describe(x)} along "
            f"dimension {dim}."
        )
    return torch.cat([clean.to(x.dtype), x] if before else [x, clean.to(x.dtype)], dim)


def middle_of(model: nn.Module, path: str) -> str:
    """Give the dotted name of a model's middle: an attribute, or half-way along joined lists of blocks.

    The part "-1" of a path is the last of a list. A "mid_block" that is None gives way to the last of the down blocks.
    """
    if path == "mid_block" and getattr(model, path, None) is None:
        path = "down_blocks.-1"
    if not {"+", "&"} & set(path):
        names: list[str] = []
        for part in path.split("."):
            names.append(str(len(_blocks(model, ".".join(names))) - 1) if part == "-1" else part)
        path = ".".join(names)
        if not isinstance(taps.layer(model, path), nn.ModuleList):
            return path
    lists = [[f"{name}.{i}" for i in range(len(_blocks(model, name)))] for name in path.replace("&", "+").split("+")]
    blocks = (
        [name for pair in zip(*lists, strict=True) for name in pair]
        if "&" in path
        else [name for names in lists for name in names]
    )
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks in {path}. Pass `layers=`.")
    return blocks[len(blocks) // 2]


def _blocks(model: nn.Module, name: str) -> nn.ModuleList:
    return cast(nn.ModuleList, taps.layer(model, name))


def _each_token(model: Any, t: Tensor, x: Any, held: int, cond: dict[str, Any]) -> Tensor:
    """One time for each token of (B, N, C), shape (B, N); 0 for the clean ones."""
    return _held(t, x.shape[1], held)


def _token_if_held(model: Any, t: Tensor, x: Any, held: int, cond: dict[str, Any]) -> Tensor:
    return _held(t, x.shape[1], held) if held else t


def _each_frame(model: Any, t: Tensor, x: Any, held: int, cond: dict[str, Any]) -> Tensor:
    """One time for each frame of (B, F, C, H, W), shape (B, F)."""
    return _held(t, x.shape[1], held)


def _channel_frame(model: Any, t: Tensor, x: Any, held: int, cond: dict[str, Any]) -> Tensor:
    """One time for each frame of (B, C, F, H, W), shape (B, 1, F)."""
    return _held(t, x.shape[2], held)[:, None]


def _patches_if_held(model: Any, t: Tensor, x: Any, held: int, cond: dict[str, Any]) -> Tensor:
    """One time for each patch of (B, C, F, H, W), where the first frames are clean, shape (B, N)."""
    if not held:
        return t
    _, rows, columns = model.config.patch_size
    each = (x.shape[3] // rows) * (x.shape[4] // columns)
    return _held(t, x.shape[2], held).repeat_interleave(each, dim=1)


def _grid_if_held(model: Any, t: Tensor, x: Any, held: int, cond: dict[str, Any]) -> Tensor:
    """The same as a grid, shape (B, 1, F, h, w)."""
    if not held:
        return t
    _, rows, columns = model.config.patch_size
    times = _held(t, x.shape[2], held)[:, None, :, None, None]
    return times.expand(-1, -1, -1, x.shape[3] // rows, x.shape[4] // columns)


def _forced_frames(model: Any, t: Tensor, x: Any, held: int, cond: dict[str, Any]) -> Tensor:
    return _held(t, x.shape[2], held) if held or cond.get("enable_diffusion_forcing") else t


def _times_config(model: Any, t: Tensor, x: Any, held: int, cond: dict[str, Any]) -> Tensor:
    scaled: Tensor = t * model.config.timestep_scale
    return scaled


def _held(t: Tensor, size: int, held: int) -> Tensor:
    return torch.cat([t.new_zeros(len(t), held), t[:, None].expand(-1, size - held)], 1)


def _minus_one(model: Any, t: Tensor, x: Any, held: int, cond: dict[str, Any]) -> Tensor:
    return _cogview(model, t, x, held, cond) - 1


def _cogview(model: Any, t: Tensor, x: Any, held: int, cond: dict[str, Any]) -> Tensor:
    """The timestep that the pipeline pairs with sigma = t / 1000: it shifts sigmas by the resolution, but not times."""
    size: Any = model.config.patch_size
    mu = 0.25 + 0.75 * math.sqrt(x.shape[2] * x.shape[3] / size**2 / 256)
    sigma = t / 1000
    return 1000 * sigma / (sigma + mu * (1 - sigma))


def _one_for_all(model: Any, t: Tensor, x: Any, held: int, cond: dict[str, Any]) -> Tensor:
    """One time for the whole batch: the model's times are a table that all samples share."""
    if len(t) > 1 and not bool((t == t[0]).all()):
        raise ValueError(
            f"{type(model).__name__} has one time for the whole batch, and `t` or `t_prime` holds several. Give batches of one "
            "sample, or times that are all the same."
        )
    return t[:1]


def _cosmos3_times(model: Any, t: Tensor, x: Any, held: int, cond: dict[str, Any]) -> dict[str, Tensor]:
    """One time for each patch of each item."""
    size: Any = model.config.latent_patch_size
    video = x["vision_tokens"] if isinstance(x, dict) else x
    counts = [item.shape[-3] * (item.shape[-2] // size) * (item.shape[-1] // size) for item in video]
    times = {"vision_timesteps": torch.repeat_interleave(t, torch.tensor(counts, device=t.device))}
    if isinstance(x, dict) and "sound_tokens" in x:
        counts = [item.shape[-1] for item in x["sound_tokens"]]
        times["sound_timesteps"] = torch.repeat_interleave(t, torch.tensor(counts, device=t.device))
    return times


def _left_half(output: Any, args: Any, kwargs: Any) -> Tensor:
    """The noisy half of a map whose width is [noisy | reference]."""
    half: Tensor = output[..., : output.shape[-1] // 2]
    return half


SAMPLE: Any = {"noisy": ("sample",)}
BLOCKS, DUAL = "transformer_blocks", "transformer_blocks+single_transformer_blocks"
BUILDING_BLOCK = "it is a building block of other models. Wrap the model that holds it."

FAMILIES: dict[str, Family] = {
    # UNets
    "UNet1DModel": Family(modality="audio, 1-D", middle="mid_block", time="schedule", **SAMPLE),
    "UNet2DModel": Family(modality="image", middle="mid_block", **SAMPLE),
    "UNet2DConditionModel": Family(modality="image, audio", middle="mid_block", **SAMPLE),
    "AudioLDM2UNet2DConditionModel": Family(modality="audio", middle="mid_block", **SAMPLE),
    "UNet3DConditionModel": Family(modality="video", middle="mid_block", **SAMPLE),
    "UNetMotionModel": Family(modality="video", middle="mid_block", **SAMPLE),
    "UNetSpatioTemporalConditionModel": Family(channel=2, modality="video", middle="mid_block", concat=2, **SAMPLE),
    "I2VGenXLUNet": Family(modality="video", middle="mid_block", **SAMPLE),
    "Kandinsky3UNet": Family(modality="image", middle="down_blocks.-1", **SAMPLE),
    "DreamLiteUNetModel": Family(
        modality="image", middle="mid_block", prediction=FLOW, concat=-1, select=_left_half, **SAMPLE
    ),
    "StableCascadeUNet": Family(round_time=True,
        modality="image", middle="down_blocks.-1.-1", time="unit", times=("timestep_ratio",), **SAMPLE
    ),
    "UniDiffuserModel": Family(
        modality="image, text", middle="transformer.transformer_mid_block",
        noisy=("latent_image_embeds", "image_embeds", "prompt_embeds"), times=("timestep_img", "timestep_text"),
        outputs=("0", "1", "2"), note="image latents, image embedding and text are denoised together",
    ),
    "UVit2DModel": Family(
        modality="image", refused="it is discrete: no gradient leads to token ids. Use a model of latents."
    ),
    # transformers with one stream
    "DiTTransformer2DModel": Family(modality="image", middle=BLOCKS),
    "Transformer2DModel": Family(modality="building block", refused=BUILDING_BLOCK),
    "DreamLiteTransformer2DModel": Family(modality="building block", refused=BUILDING_BLOCK),
    "TransformerTemporalModel": Family(modality="building block", refused=BUILDING_BLOCK),
    "PixArtTransformer2DModel": Family(modality="image", middle=BLOCKS),
    "HunyuanDiT2DModel": Family(round_time=True, modality="image", middle="blocks"),
    "SanaTransformer2DModel": Family(modality="image", middle=BLOCKS, prediction=FLOW, spread=_times_config),
    "LuminaNextDiT2DModel": Family(modality="image", middle="layers", time="reversed unit", prediction=DATAWARD),
    "Lumina2Transformer2DModel": Family(modality="image", middle="layers", time="reversed unit", prediction=DATAWARD),
    "ZImageTransformer2DModel": Family(
        modality="image", middle="layers", time="reversed unit", prediction=DATAWARD, noisy=("x",), times=("t",),
        note="a list of samples (C, F, H, W)",
    ),
    "BriaFibo2Transformer2DModel": Family(modality="image", middle="layers", time="unit", prediction=FLOW),
    "ErnieImageTransformer2DModel": Family(modality="image", middle="layers", prediction=FLOW),
    "PRXTransformer2DModel": Family(
        modality="image", middle="blocks", time="unit", prediction=(FLOW, "sample"),
        note="latent models predict the velocity, pixel models the clean sample",
    ),
    "Krea2Transformer2DModel": Family(modality="image", middle=BLOCKS, time="unit", prediction=FLOW),
    "Ideogram4Transformer2DModel": _Ideogram4(round_time=True,
        modality="image", middle="layers", time="reversed unit", prediction=DATAWARD, first=True
    ),
    "OmniGenTransformer2DModel": Family(modality="image", middle="layers", time="reversed unit", prediction=DATAWARD),
    "PriorTransformer": Family(modality="image embedding", middle=BLOCKS, outputs=("predicted_image_embedding",)),
    "QwenImage21Transformer2DModel": Family(
        modality="image", middle=BLOCKS, time="unit", prediction=FLOW, first=True
    ),
    "NucleusMoEImageTransformer2DModel": Family(modality="image", middle=BLOCKS, time="unit", prediction=DATAWARD),
    # transformers with two streams, text and image
    "SD3Transformer2DModel": Family(modality="image", middle=BLOCKS, prediction=FLOW),
    "AuraFlowTransformer2DModel": Family(
        modality="image", middle="joint_transformer_blocks+single_transformer_blocks", time="unit", prediction=FLOW
    ),
    "CogView3PlusTransformer2DModel": Family(modality="image", middle=BLOCKS),
    "CogView4Transformer2DModel": Family(
        modality="image", middle=BLOCKS, prediction=FLOW, spread=_cogview,
        note="its time is not 1000 sigma: the pipeline shifts sigmas by the resolution, but not times",
    ),
    "GlmImageTransformer2DModel": Family(modality="image", middle=BLOCKS, prediction=FLOW, spread=_minus_one, note="as CogView4, and t - 1"),
    "HiDreamImageTransformer2DModel": _HiDream(
        modality="image", middle="double_stream_blocks+single_stream_blocks", prediction=DATAWARD, times=("timesteps",),
        awake=("MOEFeedForwardSwiGLU",),
    ),
    "HunyuanImageTransformer2DModel": Family(round_time=True,
        modality="image", middle=DUAL, prediction=FLOW, second={"timestep_r": "use_meanflow"}
    ),
    "FluxTransformer2DModel": Family(modality="image", middle=DUAL, time="unit", prediction=FLOW),
    "Flux2Transformer2DModel": Family(modality="image", middle=DUAL, time="unit", prediction=FLOW),
    "Flux3Transformer2DModel": Family(
        modality="image", middle="mode_blocks.image+single_transformer_blocks", time="unit", prediction=FLOW,
        second={"target_timestep": "flow_map"},
    ),
    "ChromaTransformer2DModel": Family(modality="image", middle=DUAL, time="unit", prediction=FLOW),
    "BriaTransformer2DModel": Family(modality="image", middle=DUAL, prediction=FLOW),
    "BriaFiboTransformer2DModel": Family(modality="image", middle=DUAL, prediction=FLOW),
    "LongCatImageTransformer2DModel": Family(modality="image", middle=DUAL, time="unit", prediction=FLOW),
    "OvisImageTransformer2DModel": Family(modality="image", middle=DUAL, time="unit", prediction=FLOW),
    "QwenImageTransformer2DModel": Family(modality="image", middle=BLOCKS, time="unit", prediction=FLOW),
    "JoyImageEditTransformer3DModel": Family(channel=2, modality="image", middle="double_blocks", prediction=FLOW, first=True),
    "JoyImageEditPlusTransformer3DModel": Family(channel=2, modality="image", middle="double_blocks", prediction=FLOW),
    # video
    "WanTransformer3DModel": Family(held=2, modality="video", middle="blocks", prediction=FLOW, spread=_patches_if_held),
    "SkyReelsV2Transformer3DModel": Family(held=2,
        modality="video", middle="blocks", prediction=FLOW, spread=_forced_frames
    ),
    "ChronoEditTransformer3DModel": Family(modality="video", middle="blocks", prediction=FLOW),
    "WanVACETransformer3DModel": Family(modality="video", middle="blocks", prediction=FLOW),
    "WanAnimateTransformer3DModel": Family(modality="video", middle="blocks", prediction=FLOW),
    "WanAnimate2Transformer3DModel": Family(
        modality="video", middle="blocks", prediction=FLOW, flex=True, note="lists of samples (C, F, H, W)"
    ),
    "AnyFlowTransformer3DModel": Family(channel=2,
        modality="video", middle="blocks", prediction=FLOW, spread=_each_frame, second={"r_timestep": ""}, concat=2
    ),
    "AnyFlowFARTransformer3DModel": Family(channel=2,
        modality="video", middle="blocks", prediction=FLOW, spread=_each_frame, second={"r_timestep": ""}, concat=2,
        flex=True,
    ),
    "HeliosTransformer3DModel": Family(modality="video", middle="blocks", prediction=FLOW),
    "CogVideoXTransformer3DModel": Family(channel=2, modality="video", middle=BLOCKS, concat=2),
    "ConsisIDTransformer3DModel": Family(channel=2, modality="video", middle=BLOCKS, concat=2),
    "AllegroTransformer3DModel": Family(modality="video", middle=BLOCKS),
    "LatteTransformer3DModel": Family(modality="video", middle="transformer_blocks&temporal_transformer_blocks"),
    "LTXVideoTransformer3DModel": Family(held=1,
        modality="video", middle=BLOCKS, prediction=FLOW, spread=_token_if_held, first=True
    ),
    "LTX2VideoTransformer3DModel": Family(
        modality="video, audio", middle=BLOCKS, prediction=FLOW, noisy=("hidden_states", "audio_hidden_states"),
        times=("timestep", "sigma"), outputs=("sample", "audio_sample"), note="both streams are features",
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Family(modality="video", middle=BLOCKS, prediction=FLOW, spread=_each_token),
    "MochiTransformer3DModel": Family(
        modality="video", middle=BLOCKS, time="reversed timestep", prediction=DATAWARD
    ),
    "CosmosTransformer3DModel": Family(
        modality="video", middle=BLOCKS, time="unit", prediction=FLOW,
        note="1.0 by its EDM scheduler; 2 and 2.5 predict the velocity on the linear path",
    ),
    "Cosmos3OmniTransformer": _Cosmos3(
        modality="video, audio", middle="layers", prediction=FLOW, noisy=("vision_tokens", "sound_tokens"),
        outputs=("sample", "sound"), spread=_cosmos3_times,
        note="lists of samples; those of one call attend to each other: give one for independent samples",
    ),
    "EasyAnimateTransformer3DModel": Family(modality="video", middle=BLOCKS, prediction=FLOW),
    "HunyuanVideoTransformer3DModel": Family(modality="video", middle=DUAL, prediction=FLOW),
    "HunyuanVideoFramepackTransformer3DModel": Family(modality="video", middle=DUAL, prediction=FLOW),
    "HunyuanVideo15Transformer3DModel": Family(round_time=True,
        modality="video", middle=BLOCKS, prediction=FLOW, second={"timestep_r": "use_meanflow"}
    ),
    "MotifVideoTransformer3DModel": Family(modality="video", middle=DUAL, prediction=FLOW),
    "Kandinsky5Transformer3DModel": Family(channel=-1,
        modality="video", middle="visual_transformer_blocks", prediction=FLOW, concat=-1
    ),
    "Kandinsky6Transformer3DModel": Family(channel=-1,
        modality="video, audio", middle="visual_transformer_blocks", prediction=FLOW, concat=-1,
        noisy=("hidden_states", "audio_hidden_states"), outputs=("sample", "audio_sample"),
    ),
    "Kandinsky6SRTransformer3DModel": Family(channel=-1,
        modality="video", middle="visual_transformer_blocks", prediction=FLOW, concat=-1,
        flex=True,
    ),
    "SanaVideoTransformer3DModel": Family(held=2,
        modality="video", middle=BLOCKS, prediction=FLOW, spread=_grid_if_held, concat=2, first=True
    ),
    "SanaWMTransformer3DModel": Family(held=2,
        modality="video", middle="blocks", prediction=FLOW, spread=_channel_frame, concat=2, first=True
    ),
    "MiniMaxH3Transformer3DModel": Family(
        modality="video, audio", middle=BLOCKS, time="reversed unit", prediction=DATAWARD,
        noisy=("hidden_states", "audio_hidden_states"), outputs=("sample", "audio_sample"), spread=_one_for_all,
        note="one time for the whole batch",
    ),
    # audio and others
    "StableAudioDiTModel": Family(modality="audio", middle=BLOCKS),
    "StableAudio3DiTModel": Family(modality="audio", middle=BLOCKS, time="unit", prediction=FLOW),
    "AceStepTransformer1DModel": Family(round_time=True,
        modality="audio", middle="layers", time="unit", prediction=FLOW, times=("timestep", "timestep_r")
    ),
    "LongCatAudioDiTTransformer": Family(modality="audio", middle="blocks", time="reversed unit", prediction=DATAWARD),
    "MiniMaxMusic3Transformer1DModel": Family(round_time=True,
        modality="music", middle=BLOCKS, time="reversed unit", prediction=DATAWARD
    ),
    "T5FilmDecoder": Family(
        modality="music", middle="decoders", time="unit", noisy=("decoder_input_tokens",), times=("decoder_noise_time",)
    ),
    "RFD4ProteinaTransformer": Family(
        modality="protein", middle="transformer_layers", time="reversed unit", prediction=DATAWARD,
        noisy=("bb_ca", "local_latents"), times=("bb_ca_time", "local_latents_time"),
        outputs=("backbone", "local_latents"),
    ),
}  # fmt: skip
"""Every denoiser class of diffusers."""

for _name, _family in FAMILIES.items():
    register(f"diffusers.{_name}", partial(_family.adapter, _name))
