"""Read schedule, prediction and unit of time from a diffusers scheduler, without importing diffusers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from perceptual_diffusion import timesteps
from perceptual_diffusion._shapes import compute_dtype, map_leaves, over
from perceptual_diffusion.parameterizations import Prediction, edm
from perceptual_diffusion.schedules import EDM, Discrete, Linear, Schedule, precise
from perceptual_diffusion.types import Sample, TimeSampler

ModelInput = Callable[[Sample, Tensor], tuple[Sample, Tensor]]
"""`(x_t, t) -> (what the model is given, the time it is given)`."""

TABLE = (
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler",
    "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Schedulers with a table of ᾱ_t."""
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
KARRAS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


@dataclass(frozen=True, kw_only=True)
class Process:
    """What a scheduler says of a diffusion process.

    Attributes:
        schedule: the noise schedule, in the unit of time of the scheduler's training loops.
        prediction: what the model predicts, or None if the scheduler does not say.
        t: how training draws t.
        model_input: turns (x_t, t) into what the model is given.
    """

    schedule: Schedule
    prediction: str | Prediction | None
    t: TimeSampler = timesteps.NAMED["uniform"]
    model_input: ModelInput | None = None


def read(scheduler: Any) -> Process:
    """Read a diffusers scheduler.

    - DDPM and its like (a table of ᾱ_t): t is the index, x_t the variance-preserving sample, which is what the model is
      given; the variance-exploding sample of the Euler and LMS schedulers' `add_noise` is x_t / alpha_t.
    - flow matching: t is a timestep from 0 to 1000, sigma = t / 1000 whatever the shift. The shift, dynamic or not, says
      how training times are drawn.
    - EDM: t is sigma. The model is given c_in x_t and ln(sigma) / 4.

    Args:
        scheduler: an instance of a scheduler class of diffusers, or of a subclass of one.

    Returns:
        the process.

    Raises:
        TypeError: it is no scheduler.
        ValueError: its class or a setting of it cannot be read; the message says what to pass.
    """
    config = getattr(scheduler, "config", None)
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    if not isinstance(config, Mapping) or not any(name.endswith("Scheduler") for name in names):
        raise TypeError(
            f"`schedule` is a {type(scheduler).__name__}, expected a diffusers scheduler or a schedule of perceptual_diffusion.schedules."
        )
    flow_table = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    if any(name in FLOW for name in names) or (flow_table and any(name in TABLE for name in names)):
        return _flow(scheduler, config)
    if any(name in KARRAS for name in names):
        return _karras(config)
    if any(name in TABLE for name in names):
        return _table(scheduler, config)
    raise ValueError(
        f"{type(scheduler).__name__} cannot be read. Pass a schedule of perceptual_diffusion.schedules and `prediction=`, "
        "the ones the model was trained with."
    )


def _table(scheduler: Any, config: Mapping[str, Any]) -> Process:
    if config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{type(scheduler).__name__} with timestep_type='continuous' gives the model ln(sigma) / 4. Pass "
            "`schedules.EDM()`, `prediction=` and a `call` that scales the sample and the time."
        )
    alpha_bar = scheduler.alphas_cumprod.double().clone()
    if config.get("rescale_betas_zero_snr"):
        alpha_bar[-1] = 0  # some schedulers put 2^-24 there to keep their own divisions finite
    return Process(schedule=Discrete(alpha_bar), prediction=config.get("prediction_type"))


def _flow(scheduler: Any, config: Mapping[str, Any]) -> Process:
    if config.get("invert_sigmas"):
        raise ValueError(
            f"{type(scheduler).__name__} with invert_sigmas=True runs from noise at t = 0 to data. Pass "
            "`schedules.Interpolant(lambda t: t, lambda t: 1 - t)`, `prediction=`, and a `call` that scales the time."
        )
    steps = float(config.get("num_train_timesteps", 1000))
    live = isinstance(getattr(type(scheduler), "shift", None), property)  # `set_shift` moves it away from the config
    shift: Any = (scheduler.shift if live else config.get("shift")) or config.get("flow_shift") or 1.0
    if config.get("use_dynamic_shifting"):
        shift = _DynamicShift(config)
    prediction = config.get("prediction_type", "flow_prediction")
    return Process(schedule=Linear(scale=steps), prediction=prediction, t=timesteps.Uniform(shift=shift))


class _DynamicShift:
    """The shift of a sample by its number of tokens: (B, N, C) has N, (B, C, H, W) has H W / 4, with frames F H W / 4."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        missing = [key for key in keys if config.get(key) is None]
        if missing:
            raise ValueError(
                f"the scheduler shifts dynamically but its config lacks {', '.join(missing)}. Pass `t=timesteps.Uniform(shift=...)`."
            )
        self.low, self.high, self.low_mu, self.high_mu = (float(config[key]) for key in keys)
        self.exponential = config.get("time_shift_type", "exponential") == "exponential"

    def __call__(self, clean: Tensor) -> float:
        tokens = clean.shape[1] if clean.ndim == 3 else math.prod(clean.shape[2:]) / 4
        mu = self.low_mu + (self.high_mu - self.low_mu) * (tokens - self.low) / (self.high - self.low)
        return math.exp(mu) if self.exponential else mu

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _DynamicShift) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))


def _karras(config: Mapping[str, Any]) -> Process:
    data = float(config["sigma_data"])
    schedule = EDM(sigma_min=config["sigma_min"], sigma_max=config["sigma_max"])

    def model_input(x_t: Sample, t: Tensor) -> tuple[Sample, Tensor]:
        scale = (precise(t) ** 2 + data**2).rsqrt()  # c_in

        def scaled(x: Tensor) -> Tensor:
            wide = x.to(compute_dtype(x))
            return (over(scale, wide) * wide).to(x.dtype)

        return map_leaves(scaled, x_t), (precise(t).log() / 4).float()  # c_noise

    preconditioned = edm(data)
    prediction = -preconditioned if config.get("prediction_type") == "v_prediction" else preconditioned
    return Process(schedule=schedule, prediction=prediction, model_input=model_input)
