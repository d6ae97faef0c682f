"""Distances between two features of one layer, sample by sample: (B, *), (B, *) to (B,). Each is 0 for equal features.

Features come as float32 or better. Maps and volumes are (B, C, ...), tokens (B, N, C).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from perceptual_diffusion._shapes import mean_per_sample
from perceptual_diffusion.types import Distance

EPS = 1e-8


def mse(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean squared error (Lin & Yang, eq. 12) of two features (B, *), one value per sample, shape (B,)."""
    return mean_per_sample((predicted - true).square())


def mae(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean absolute error (Lin & Yang, table 4) of two features (B, *), one value per sample, shape (B,)."""
    return mean_per_sample((predicted - true).abs())


def huber(predicted: Tensor, true: Tensor, *, delta: float = 1.0) -> Tensor:
    """Huber's loss of two features (B, *), one value per sample, shape (B,): half the squared error up to `delta`, linear beyond."""
    return mean_per_sample(torch.nn.functional.huber_loss(predicted, true, reduction="none", delta=delta))


def cosine(predicted: Tensor, true: Tensor) -> Tensor:
    """One minus the cosine of the angle between the whole features (B, *), one value per sample, shape (B,).

    Written as half the squared distance of the unit vectors, which is the same and exactly 0 for equal features. Against
    a feature that is all zero, it is 1/2.
    """
    if predicted.ndim == 1:
        predicted, true = predicted[:, None], true[:, None]
    return (_unit(predicted.flatten(1), 1) - _unit(true.flatten(1), 1)).square().sum(1) / 2


def normalised(predicted: Tensor, true: Tensor) -> Tensor:
    """Squared distance of unit channel vectors, averaged over positions (Zhang et al. 2018, eq. 1, with unit weights).

    Of two features (B, *), one value per sample, shape (B,). The channels are dim 1 of maps and volumes and the last dim of tokens (B, N, C). A few channels of huge value, as
    transformers have them, weigh on the direction of each vector but no longer on its scale.
    """
    if predicted.ndim == 1:
        predicted, true = predicted[:, None], true[:, None]
    channel = -1 if predicted.ndim == 3 else 1
    return mean_per_sample((_unit(predicted, channel) - _unit(true, channel)).square().sum(channel))


def _unit(feature: Tensor, dim: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(feature, dim=dim, keepdim=True)
    return feature / norm.clamp_min(EPS)


NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "mae": mae,
    "huber": huber,
    "cosine": cosine,
    "normalised": normalised,
}


def get(distance: str | Distance) -> Distance:
    """Give the distance of a name, or the callable itself.

    Raises:
        ValueError: the name is unknown.
        TypeError: it is neither a name nor callable.
    """
    if isinstance(distance, str):
        if distance not in NAMED:
            raise ValueError(
                f"unknown distance {distance!r}, expected one of {', '.join(repr(n) for n in NAMED)}, or a callable."
            )
        return NAMED[distance]
    if not callable(distance) or isinstance(distance, type):
        raise TypeError(
            f"`distance` is {distance!r}, expected one of {', '.join(repr(n) for n in NAMED)}, or a callable."
        )
    return distance
