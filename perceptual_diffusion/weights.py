"""Weights of the loss by time: (B,) times to (B,) weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perceptual_diffusion.parameterizations import Prediction, System
from perceptual_diffusion.schedules import Schedule
from perceptual_diffusion.types import TimeFunction


@dataclass(frozen=True, kw_only=True)
class MinSNR:
    """The min-SNR-γ weight of any prediction (Hang et al. 2023): min(SNR, γ) on the error of the clean sample.

    An error d of the prediction is an error −(sigma / Δ) d of the clean sample, so the weight is
    min(SNR, γ) (sigma / Δ)² = min(alpha², γ sigma²) / Δ²: min(SNR, γ) / SNR for `epsilon`, min(SNR, γ) / (SNR + 1) for
    `v_prediction`, min(alpha², γ sigma²) for flow. No SNR is ever divided by, so SNR 0 and ∞ are finite.

    Attributes:
        gamma: γ, the SNR from which the weight stops growing.
    """

    schedule: Schedule
    prediction: Prediction
    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not (isinstance(self.gamma, int | float) and 0 < self.gamma < math.inf):
            raise ValueError(f"`gamma` is {self.gamma!r}, expected a positive number.")

    def __call__(self, t: Tensor) -> Tensor:
        system = System.of(self.schedule, self.prediction, t)
        delta = system.determinant
        weight = torch.minimum(system.alpha**2, self.gamma * system.sigma**2) / delta**2
        # where Δ is 0, alpha / Δ tends to 1 / b (at alpha = 0, where a is 0), or sigma / Δ to 1 / a (at sigma = 0)
        limit = torch.where(system.alpha == 0, 1 / system.b**2, self.gamma / system.a**2)
        return torch.where(delta == 0, limit, weight)


def get(weight: str | TimeFunction | None, schedule: Schedule, prediction: Prediction) -> TimeFunction | None:
    """Give the weight of a name: None or "none" (all 1), "min_snr" (γ = 5), or a callable of t.

    Raises:
        ValueError: the name is unknown.
        TypeError: it is neither a name nor callable.
    """
    if weight is None or (isinstance(weight, str) and weight == "none"):
        return None
    if isinstance(weight, str) and weight == "min_snr":
        return MinSNR(schedule=schedule, prediction=prediction)
    if isinstance(weight, str):
        raise ValueError(f"unknown weight {weight!r}, expected 'none', 'min_snr', or a callable of t.")
    if not callable(weight):
        raise TypeError(
            f"`weight` is {weight!r}, expected 'none', 'min_snr', or a callable of t, shape (B,), to shape (B,)."
        )
    return weight
