"""What a student knows of the clean sample beyond what x_t shows, on one scale for every prediction and every time.

x_t fixes one direction of the plane of x_0 and ε. A prediction ŷ says the other, the unit vector
u = (alpha ε − sigma x_0) / √(alpha² + sigma²), by û − u = (ŷ − y) √(alpha² + sigma²) / Δ. With P, what a multiple of x_t
cannot explain,

    skill = 1 − |û − u|² / |P u|²

is 1 for a perfect prediction and 0 for one that knows nothing but x_t; other predictions and other times are then
hypotheses that can be compared with the declared ones.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from perceptual_diffusion import parameterizations
from perceptual_diffusion._checking.numbers import TINY, rows
from perceptual_diffusion._shapes import map_leaves
from perceptual_diffusion.parameterizations import Prediction, System
from perceptual_diffusion.renoising import mix_samples
from perceptual_diffusion.schedules import Schedule, precise
from perceptual_diffusion.types import Sample

Skills = tuple[Tensor, Tensor]
"""The skill of each sample, not below −1, and |P u|², the weight that it counts with, shape (B,) each."""


def skills(
    predicted: Sample, clean: Sample, noise: Sample, t: Tensor, *, schedule: Schedule, prediction: Prediction
) -> Skills:
    """Give the skill of each sample, if ŷ is this kind of prediction.

    Args:
        predicted: ŷ, shape (B, *) or nested.
        clean: x_0, likewise.
        noise: ε, likewise.
        t: times of x_t, shape (B,).
        schedule: the noise schedule.
        prediction: the kind of ŷ supposed.

    Returns:
        skills and weights, shape (B,) each.
    """
    system = System.of(schedule, prediction, t)
    alpha, sigma, delta = precise(system.alpha), precise(system.sigma), precise(system.determinant)
    length = (alpha.square() + sigma.square()).sqrt()
    clean, noise, predicted = (map_leaves(precise, sample) for sample in (clean, noise, predicted))
    x_t = mix_samples(clean, noise, (alpha, sigma))
    error = map_leaves(torch.sub, predicted, mix_samples(clean, noise, (system.a, system.b)))
    values, weights = [], []
    for i, (x, e, x_t_i, d) in enumerate(zip(*map(rows, (clean, noise, x_t, error)), strict=True)):
        u = (alpha[i] * e - sigma[i] * x) / length[i]
        unknown = u.square().sum() - (u @ x_t_i).square() / x_t_i.square().sum().clamp_min(TINY)
        values.append(1 - d.square().sum() * (length[i] / delta[i]).square() / unknown)
        weights.append(unknown.clamp_min(0))
    return torch.stack(values).nan_to_num(-1, -1, -1).clamp(-1, 1), torch.stack(weights)


def total(of_samples: Skills) -> float:
    """Give the skill of a whole batch."""
    value, weight = of_samples
    return float((value * weight).sum() / weight.sum().clamp_min(TINY))


def other_predictions(schedule: Schedule, declared: Prediction, t: Tensor) -> list[Prediction]:
    """Give the other kinds of prediction, and the negatives, that exist on a schedule and differ from the declared one."""
    found = []
    row = declared.row(schedule, t)
    for prediction in (declared, *parameterizations.NAMED.values()):
        for signed in (prediction, -prediction):
            try:
                other = signed.row(schedule, t)
            except ValueError:  # no 'flow_prediction' on a discrete schedule
                continue
            if not all(torch.allclose(x, y) for x, y in zip(other, row, strict=True)):
                found.append(signed)
    return found


def other_times(schedule: Schedule, t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Give times in other units by a formula for each.

    On a GPU none is beyond what the schedule's own times may be: there a look-up in a table must not fail.
    """
    ends = schedule.low + schedule.high
    yield f"{ends:g} - t", ends - t
    if schedule.low == 0:
        for formula, time in (("t", t), (f"({ends:g} - t)", ends - t)):
            yield f"{formula} / 1000", time.float() / 1000
            if schedule.high <= 1:
                yield f"{formula} * 1000", time * 999
            elif t.device.type == "cpu":
                yield f"{formula} * 1000", time.float() * 1000
