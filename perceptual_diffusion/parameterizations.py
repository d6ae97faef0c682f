"""What a network predicts: one 2 x 2 linear system for every case.

A prediction is a row (a_t, b_t): the network's target is y = a_t x_0 + b_t ε. With x_t = alpha_t x_0 + sigma_t ε,

    clean = (b x_t − sigma y) / Δ,   noise = (alpha y − a x_t) / Δ,   Δ = alpha b − sigma a,

of which Lin & Yang's eqs. 8 and 9 are the v-prediction case. Δ = 0 means that the pair of schedule and prediction is
singular there: the prediction does not determine the clean sample and the noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perceptual_diffusion._shapes import compute_dtype, over, result_dtype
from perceptual_diffusion.schedules import Schedule

Row = Callable[[Schedule, Tensor], tuple[Tensor, Tensor]]
"""`(schedule, t) -> (a_t, b_t)`, each of shape (B,)."""

SINGULAR = 1e-12
"""A determinant not above this is taken for 0."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A kind of prediction: the network is trained to give y = a_t x_0 + b_t ε.

    Attributes:
        name: what errors and reports call it.
        row: `(schedule, t) -> (a_t, b_t)`, each of shape (B,).
    """

    name: str
    row: Row

    def __neg__(self) -> "Prediction":
        """The prediction with its sign turned (clean − noise instead of noise − clean)."""
        name = self.name[1:] if self.name.startswith("-") else f"-{self.name}"
        return Prediction(name=name, row=self.row.of if isinstance(self.row, _Negative) else _Negative(self.row))


@dataclass(frozen=True)
class _Negative:
    """A row with its sign turned; a class, so that a prediction can be pickled and compared."""

    of: Row

    def __call__(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.of(schedule, t)
        return -a, -b


def _epsilon(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, _ = schedule(t)
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def _sample(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, _ = schedule(t)
    return torch.ones_like(alpha), torch.zeros_like(alpha)


def _v_prediction(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = schedule(t)
    return -sigma, alpha


def _flow_prediction(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    return schedule.velocity(t)


def _score(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    _, sigma = schedule(t)
    return torch.zeros_like(sigma), -1 / sigma


EPSILON = Prediction(name="epsilon", row=_epsilon)
SAMPLE = Prediction(name="sample", row=_sample)
V_PREDICTION = Prediction(name="v_prediction", row=_v_prediction)
FLOW_PREDICTION = Prediction(name="flow_prediction", row=_flow_prediction)
SCORE = Prediction(name="score", row=_score)
"""The score ∇ log p(x_t), of which −ε / sigma_t is the target (Song et al. 2021)."""

NAMED = {p.name: p for p in (EPSILON, SAMPLE, V_PREDICTION, FLOW_PREDICTION)}


def edm(sigma_data: float = 0.5) -> Prediction:
    """The raw output F of a preconditioned network, D = c_skip x_t + c_out F (Karras et al. 2022, eq. 7 and table 1).

    Args:
        sigma_data: standard deviation of the data.

    Returns:
        a = (1 − c_skip) / c_out, b = −c_skip sigma / c_out, on `schedules.EDM`.
    """
    if not (isinstance(sigma_data, int | float) and 0 < sigma_data < math.inf):
        raise ValueError(f"`sigma_data` is {sigma_data!r}, expected a positive number.")
    return Prediction(name="edm", row=_EDM(float(sigma_data)))


@dataclass(frozen=True)
class _EDM:
    sigma_data: float

    def __call__(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        _, sigma = schedule(t)
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        return (1 - c_skip) / c_out, -c_skip * sigma / c_out


def get(prediction: str | Prediction) -> Prediction:
    """Give the prediction of a name; a leading minus turns its sign ("-flow_prediction": clean − noise).

    Raises:
        ValueError: the name is unknown.
        TypeError: it is neither a name nor a `Prediction`.
    """
    if isinstance(prediction, Prediction):
        return prediction
    if not isinstance(prediction, str):
        raise TypeError(
            f"`prediction` is a {type(prediction).__name__}, expected a name or a parameterizations.Prediction."
        )
    name = prediction.removeprefix("-")
    if name not in NAMED:
        names = ", ".join(repr(known) for known in NAMED)
        raise ValueError(
            f"unknown prediction {prediction!r}, expected one of {names}, with a leading '-' where the model predicts the "
            "negative, or a parameterizations.Prediction."
        )
    return -NAMED[name] if prediction.startswith("-") else NAMED[name]


@dataclass(frozen=True, kw_only=True)
class System:
    """The 2 x 2 system at a batch of times: every field has shape (B,).

    Attributes:
        alpha: scale of the clean sample in x_t.
        sigma: scale of the noise in x_t.
        a: scale of the clean sample in y.
        b: scale of the noise in y.
    """

    alpha: Tensor
    sigma: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, schedule: Schedule, prediction: Prediction, t: Tensor) -> "System":
        """Evaluate schedule and prediction at times t, shape (B,)."""
        alpha, sigma = schedule(t)
        a, b = prediction.row(schedule, t)
        return cls(alpha=alpha, sigma=sigma, a=a, b=b)

    @property
    def determinant(self) -> Tensor:
        """Δ = alpha b − sigma a, shape (B,)."""
        return self.alpha * self.b - self.sigma * self.a


def mix(clean: Tensor, noise: Tensor, clean_scale: Tensor, noise_scale: Tensor) -> Tensor:
    """Mix clean data and noise: x_t = alpha_t x_0 + sigma_t ε (eq. 2), or y = a_t x_0 + b_t ε.

    Computed in float32 or better, rounded once.

    Args:
        clean: x_0, shape (B, *).
        noise: ε, unit variance, shape (B, *).
        clean_scale: alpha_t or a_t, shape (B,).
        noise_scale: sigma_t or b_t, shape (B,).

    Returns:
        the mixture, shape (B, *), in the wider dtype of the two.
    """
    dtype = compute_dtype(clean, noise)
    wide_clean, wide_noise = clean.to(dtype), noise.to(dtype)
    mixed = over(clean_scale, wide_clean) * wide_clean + over(noise_scale, wide_noise) * wide_noise
    return mixed.to(result_dtype(clean, noise))


def recover(x_t: Tensor, model_output: Tensor, system: System) -> tuple[Tensor, Tensor]:
    """Solve for the clean sample and the noise (eqs. 8 and 9 for v-prediction, and their like for the rest).

    Args:
        x_t: what the model saw, shape (B, *).
        model_output: ŷ, shape (B, *).
        system: schedule and prediction at the times of the batch.

    Returns:
        clean_hat and noise_hat, in float32 or better, shape (B, *) each.
    """
    dtype = compute_dtype(x_t, model_output)
    x_t, model_output = x_t.to(dtype), model_output.to(dtype)
    delta = system.determinant
    clean = over(system.b / delta, x_t) * x_t - over(system.sigma / delta, x_t) * model_output
    noise = over(system.alpha / delta, x_t) * model_output - over(system.a / delta, x_t) * x_t
    return clean, noise


def convert(
    model_output: Tensor, x_t: Tensor, t: Tensor, *, schedule: Schedule, source: str | Prediction, to: str | Prediction
) -> Tensor:
    """Turn one kind of prediction into another: recover the pair, then mix it by the other row.

    Args:
        model_output: ŷ of kind `source`, shape (B, *).
        x_t: what the model saw, shape (B, *).
        t: times in the schedule's unit, shape (B,).
        schedule: the noise schedule.
        source: the kind of `model_output`.
        to: the kind wanted.

    Returns:
        the other prediction, in float32 or better, shape (B, *).

    Raises:
        ValueError: an unknown kind, times that do not fit, or a singular pair at one of them.
    """
    source, to = get(source), get(to)
    schedule.check("t", t, len(x_t), x_t.device)
    if x_t.shape != model_output.shape:
        raise ValueError(
            f"`model_output` has shape {tuple(model_output.shape)}, expected {tuple(x_t.shape)}, that of `x_t`."
        )
    system = System.of(schedule, source, t)
    bad = _is_singular(system.determinant)
    if bool(bad.any()):
        raise ValueError(_singular(schedule, source, float(t[bad][0])))
    a, b = to.row(schedule, t)
    dtype = compute_dtype(x_t, model_output)
    if not bool((a.to(dtype).isfinite() & b.to(dtype).isfinite()).all()):
        raise ValueError(f"'{to.name}' is infinite at one of the times. Draw t where sigma is above 0.")
    return mix(*recover(x_t, model_output, system), a, b)


def check_regular(schedule: Schedule, prediction: Prediction, low: float, high: float) -> None:
    """Raise a ValueError that names the pair if it is singular at any time from `low` to `high`.

    Args:
        schedule: the noise schedule.
        prediction: the kind of prediction.
        low: the smallest time in use.
        high: the largest time in use.
    """
    grid = schedule.grid()
    ends = torch.tensor([max(low, float(grid[0])), min(high, float(grid[-1]))], dtype=grid.dtype)
    t = torch.cat([grid[(grid >= low) & (grid <= high)], ends])
    bad = _is_singular(System.of(schedule, prediction, t).determinant)
    if bool(bad.any()):
        raise ValueError(_singular(schedule, prediction, float(t[bad][0])))


def _is_singular(determinant: Tensor) -> Tensor:
    return ~((determinant.abs() > SINGULAR) & determinant.isfinite())


def _singular(schedule: Schedule, prediction: Prediction, t: float) -> str:
    alpha, sigma = (float(s) for s in schedule(torch.tensor([t], dtype=torch.float64)))
    zero = (
        "alpha is 0 (zero terminal SNR)"
        if abs(alpha) <= SINGULAR
        else "sigma is 0"
        if abs(sigma) <= SINGULAR
        else "the determinant is 0"
    )
    return (
        f"at t = {t:g} of {schedule!r} {zero}: '{prediction.name}' cannot give back the clean sample and the noise there. "
        f"Use 'v_prediction', or leave that time out with `t_range=(low, high)`."
    )
