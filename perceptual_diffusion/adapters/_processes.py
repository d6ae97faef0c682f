"""What the kinds of diffusers' schedulers say of a diffusion process: a reader `(scheduler, config) -> Process` for each.

Settings that a class does not know stay in its config when it is made with `from_config`: a reader looks only at those
that its classes heed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perceptual_diffusion import timesteps
from perceptual_diffusion._shapes import compute_dtype, map_leaves, over
from perceptual_diffusion.parameterizations import SCORE, Prediction, edm
from perceptual_diffusion.schedules import EDM, Cosine, Discrete, Linear, Schedule, precise
from perceptual_diffusion.types import Sample, TimeFunction, TimeSampler

ModelInput = Callable[[Sample, Tensor], tuple[Sample, Tensor]]
"""`(x_t, t) -> (what the model is given, the time it is given)`."""

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Process:
    """What a scheduler says of a diffusion process.

    Attributes:
        schedule: the noise schedule, in the unit of time of the scheduler's training loops.
        prediction: what the model predicts, or None if the scheduler does not say.
        t: how training draws t.
        model_input: turns (x_t, t) into what the model is given; None: x_t, and t in the unit of the model's family.
    """

    schedule: Schedule
    prediction: str | Prediction | None
    t: TimeSampler = timesteps.NAMED["uniform"]
    model_input: ModelInput | None = None


def _as_it_is(x_t: Sample, t: Tensor) -> tuple[Sample, Tensor]:
    """For a scheduler whose models are given the schedule's own time, whatever others of their family are given."""
    return x_t, t.float()


# Tables of ᾱ_t


def table(scheduler: Any, config: Config) -> Process:
    """ᾱ_t of each index."""
    alpha_bar = scheduler.alphas_cumprod.double().clone()
    if config.get("rescale_betas_zero_snr") and float(alpha_bar[-1]) <= 2**-24:
        alpha_bar[-1] = 0  # some schedulers put 2^-24 there to keep their own divisions finite
    return Process(schedule=Discrete(alpha_bar), prediction=config.get("prediction_type", "epsilon"))


# The straight path


def flow(scheduler: Any, config: Config) -> Process:
    """From data at 0 to noise at T: sigma = t / T whatever the shift."""
    return _straight("flow_prediction", _steps(config), _shift(scheduler, config, "shift"))


def inverted_flow(scheduler: Any, config: Config) -> Process:
    """From noise at 0 to data at T, with a model that predicts clean − noise."""
    return _straight("-flow_prediction", _steps(config), _shift(scheduler, config, "shift"), reverse=True)


def solver_flow(scheduler: Any, config: Config) -> Process:
    """A solver along the straight path; its model may predict the noise or the clean sample as well."""
    return _straight(config["prediction_type"], _steps(config), _shift(scheduler, config, "flow_shift"))


def staged_flow(scheduler: Any, config: Config) -> Process:
    """The same with a config that calls the shift `shift`."""
    return _straight(config["prediction_type"], _steps(config), _shift(scheduler, config, "shift"))


def data_last(scheduler: Any, config: Config) -> Process:
    """From noise at 0 to data at 1, with a model that predicts clean − noise."""
    return _straight("-flow_prediction", 1.0, _shift(scheduler, config, "shift"), reverse=True)


def trigflow(scheduler: Any, config: Config) -> Process:
    """TrigFlow as the model has it, not the scheduler.

    At the angle τ the pipeline gives the model x √(u² + (1 − u)²) at u = sin τ / (sin τ + cos τ), which is
    (1 − u) clean + u noise, and turns its output F into ((1 − 2u) x_u + (1 − 2u + 2u²) F) / √(u² + (1 − u)²), which is
    TrigFlow's cos τ noise − sin τ clean exactly where F = noise − clean.
    """
    return Process(schedule=Linear(), prediction="flow_prediction")


def _steps(config: Config) -> float:
    return float(config["num_train_timesteps"])


def _straight(prediction: str, scale: float, shift: Any, *, reverse: bool = False) -> Process:
    schedule = Linear(scale=scale, reverse=reverse)
    return Process(schedule=schedule, prediction=prediction, t=timesteps.Uniform(shift=shift))


def _shift(scheduler: Any, config: Config, key: str) -> Any:
    if config.get("use_dynamic_shifting"):
        return DynamicShift(config)
    live = isinstance(getattr(type(scheduler), "shift", None), property)  # `set_shift` moves it away from the config
    return (scheduler.shift if live else config.get(key)) or 1.0


PIPELINE_SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
"""What the pipelines of diffusers take where the scheduler's config does not say it."""


class DynamicShift:
    """The shift of a sample by its number of tokens: (B, N, C) has N, (B, C, H, W) has H W / 4, with frames F H W / 4.

    Three dimensions are always taken for packed tokens: for audio (B, C, L), give `t=timesteps.Uniform(shift=...)`.
    """

    def __init__(self, config: Config) -> None:
        values = (config.get(key) for key in PIPELINE_SHIFT)
        given = (d if value is None else value for value, d in zip(values, PIPELINE_SHIFT.values(), strict=True))
        self.low, self.high, self.low_mu, self.high_mu = map(float, given)
        self.exponential = config.get("time_shift_type", "exponential") == "exponential"

    def __call__(self, clean: Tensor) -> float:
        tokens = clean.shape[1] if clean.ndim == 3 else math.prod(clean.shape[2:]) / 4
        mu = self.low_mu + (self.high_mu - self.low_mu) * (tokens - self.low) / (self.high - self.low)
        return math.exp(mu) if self.exponential else mu

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DynamicShift) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))


# EDM and its like: t is sigma


@dataclass(frozen=True)
class _Scaled:
    """What a preconditioned model is given: c_in x_t and a function of sigma (Karras et al. 2022, table 1)."""

    sigma_data: float
    time: TimeFunction

    def __call__(self, x_t: Sample, t: Tensor) -> tuple[Sample, Tensor]:
        c_in = (precise(t) ** 2 + self.sigma_data**2).rsqrt()

        def scaled(x: Tensor) -> Tensor:
            wide = x.to(compute_dtype(x))
            return (over(c_in, wide) * wide).to(x.dtype)

        return map_leaves(scaled, x_t), self.time(precise(t)).float()


def _quarter_log(sigma: Tensor) -> Tensor:
    return sigma.log() / 4


def _thousandfold_quarter_log(sigma: Tensor) -> Tensor:
    return 250 * sigma.log()


def _angle(sigma: Tensor) -> Tensor:
    return sigma.atan() / (math.pi / 2)


def karras(scheduler: Any, config: Config) -> Process:
    """The model is given ln(sigma) / 4 and the scaled sample."""
    schedule = EDM(sigma_min=config["sigma_min"], sigma_max=config["sigma_max"])
    return _preconditioned(config, schedule, _quarter_log)


def karras_angle(scheduler: Any, config: Config) -> Process:
    """The model is given atan(sigma) 2 / π and the scaled sample (Stable Audio)."""
    # its sigma_min (0.3) is where sampling ends; training draws the angle evenly, for which ln sigma has std π / 2
    least = min(config["sigma_min"], math.tan(0.005 * math.pi / 2))
    schedule = EDM(sigma_min=least, sigma_max=config["sigma_max"], p_mean=0.0, p_std=math.pi / 2)
    return _preconditioned(config, schedule, _angle)


def _preconditioned(config: Config, schedule: EDM, time: TimeFunction) -> Process:
    data, kind = float(config["sigma_data"]), config["prediction_type"]
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"prediction_type={kind!r} of an EDM scheduler cannot be read: its steps know 'epsilon' (F as Karras et al. have it) "
            "and 'v_prediction' (−F). Set one of them, or pass `schedules.EDM()`, `prediction=` and `call=`."
        )
    prediction = -edm(data) if kind == "v_prediction" else edm(data)  # diffusers' c_out has the sign turned
    return Process(schedule=schedule, prediction=prediction, model_input=_Scaled(data, time))


def continuous(scheduler: Any, config: Config) -> Process:
    """EDM of data whose standard deviation is 1 (Stable Video Diffusion)."""
    alpha_bar = scheduler.alphas_cumprod.double()
    least, most = (float(((1 - a) / a).sqrt()) for a in (alpha_bar[0], alpha_bar[-1]))
    least, most = config.get("sigma_min") or least, config.get("sigma_max") or most
    schedule = EDM(sigma_min=least, sigma_max=most, p_mean=0.7, p_std=1.6)  # as Stable Video Diffusion is trained
    return Process(schedule=schedule, prediction=-edm(1.0), model_input=_Scaled(1.0, _quarter_log))


@dataclass(frozen=True)
class _Consistency:
    """The row of a consistency model's network: as EDM's, with c_skip = 1 and c_out = 0 at sigma_min."""

    sigma_data: float
    sigma_min: float

    def __call__(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        _, sigma = schedule(t)
        beyond = sigma - self.sigma_min
        c_skip = self.sigma_data**2 / (beyond**2 + self.sigma_data**2)
        c_out = beyond * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        return (1 - c_skip) / c_out, -c_skip * sigma / c_out


def consistency(scheduler: Any, config: Config) -> Process:
    """The network of a consistency model (Song et al. 2023, appendix C)."""
    data, least = float(config["sigma_data"]), float(config["sigma_min"])
    # at sigma_min itself c_out is 0: the network has no say there
    schedule = EDM(sigma_min=2 * least, sigma_max=config["sigma_max"])
    prediction = Prediction(name="consistency", row=_Consistency(data, least))
    return Process(schedule=schedule, prediction=prediction, model_input=_Scaled(data, _thousandfold_quarter_log))


def _log_uniform(config: Config) -> EDM:
    """The schedule whose ln sigma has the mean and the deviation of a uniform one."""
    low, high = math.log(config["sigma_min"]), math.log(config["sigma_max"])
    return EDM(
        sigma_min=config["sigma_min"],
        sigma_max=config["sigma_max"],
        p_mean=(low + high) / 2,
        p_std=(high - low) / math.sqrt(12),
    )


def score_ve(scheduler: Any, config: Config) -> Process:
    """The variance-exploding SDE (Song et al. 2021): the model is given x_t and sigma, and gives the score."""
    return Process(schedule=_log_uniform(config), prediction=SCORE, model_input=_as_it_is)


def karras_ve(scheduler: Any, config: Config) -> Process:
    """The same model run by Karras' sampler, whose samples lie in [-1, 1] where the model's lie in [0, 1]."""
    prediction = Prediction(name="score of pixels in [0, 1]", row=_twice_score)
    return Process(schedule=_log_uniform(config), prediction=prediction, model_input=_pixels)


def _twice_score(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    a, b = SCORE.row(schedule, t)
    return 2 * a, 2 * b


def _pixels(x_t: Sample, t: Tensor) -> tuple[Sample, Tensor]:
    """From samples in [-1, 1] to pixels in [0, 1], whose noise is half as large."""
    return map_leaves(lambda x: (x + 1) / 2, x_t), (precise(t) / 2).float()


# Continuous variance-preserving paths


def pseudo_linear(scheduler: Any, config: Config) -> Process:
    """The quarter circle in its angle (Dance Diffusion), whatever the steps that the scheduler takes along it."""
    return Process(schedule=Cosine(), prediction="v_prediction", model_input=_as_it_is)


def wuerstchen(scheduler: Any, config: Config) -> Process:
    """A cosine ᾱ_t in a time from 0 to 1 (Würstchen, Stable Cascade)."""
    schedule = _Wuerstchen(float(config["scaler"]), float(config["s"]))
    return Process(schedule=schedule, prediction="epsilon", model_input=_as_it_is)


class _Wuerstchen(Schedule):
    """Würstchen's: ᾱ_t = cos²((u + s) / (1 + s) π / 2), 1 at t = 0 and kept within [0.0001, 0.9999]; t from 0 to 1."""

    low, high = 0.0, 1.0

    def __init__(self, scaler: float, s: float) -> None:
        self.scaler, self.s = scaler, s

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        u = 1 - (1 - precise(t)) ** self.scaler if self.scaler > 1 else precise(t) ** self.scaler
        start = math.cos(self.s / (1 + self.s) * math.pi / 2) ** 2
        alpha_bar = torch.cos((u + self.s) / (1 + self.s) * (math.pi / 2)) ** 2 / start
        alpha_bar = alpha_bar.clamp(0.0001, 0.9999)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("Würstchen's schedule is cut at both ends, so it has no 'flow_prediction'. Use 'epsilon'.")

    def __repr__(self) -> str:
        return f"DDPMWuerstchen(scaler={self.scaler:g}, s={self.s:g})"
