"""The families of diffusers that are known by name. diffusers itself is never imported here."""

from typing import Any

from torch import Tensor

from perceptual_diffusion.adapters._registry import Adapter, register
from perceptual_diffusion.objective import take_prediction
from perceptual_diffusion.types import Cond, Sample


def _call(model: Any, x_t: Any, t: Tensor, cond: Cond, /) -> Any:
    return model(x_t, timestep=t, **cond)


def _mean_only(output: Any, x_t: Sample) -> Sample:
    """Take the prediction, without the channels of a learned variance that follow it."""
    prediction = take_prediction(output, x_t)
    if isinstance(prediction, Tensor) and isinstance(x_t, Tensor) and prediction.ndim == x_t.ndim > 1:
        if prediction.shape[1] == 2 * x_t.shape[1]:
            return prediction[:, : x_t.shape[1]]
    return prediction


def _unet(family: str) -> Any:
    def factory(model: Any) -> Adapter:
        middle = "mid_block" if model.mid_block is not None else f"down_blocks.{len(model.down_blocks) - 1}"
        return Adapter(family=family, layers=(middle,), call=_call, output=_mean_only, time_scale=1000)

    return factory


def _dit(model: Any) -> Adapter:
    """The block in the middle: half of the blocks, rounded down, have run before it."""
    middle = f"transformer_blocks.{len(model.transformer_blocks) // 2}"
    return Adapter(family="DiT", layers=(middle,), call=_call, output=_mean_only, time_scale=1000)


register("diffusers.UNet2DModel", _unet("UNet2D"))
register("diffusers.UNet2DConditionModel", _unet("UNet2DCondition"))
register("diffusers.DiTTransformer2DModel", _dit)
