"""Samplers of t and t'. All work on ranks, so that a distribution means the same on every schedule.

Offsets are given on the scale of 1000 timesteps, as in the paper: 40 is 4 % of any schedule.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perceptual_diffusion.schedules import NO_FLOAT64, Schedule, precise
from perceptual_diffusion.types import TimeSampler

SCALE = 1000


def _time(schedule: Schedule, rank: Tensor) -> Tensor:
    """Give the times at ranks, shape (B,), as int64 or float32: what models expect."""
    t = schedule.at(rank.clamp(0, 1))
    return t if schedule.discrete else t.float()


def _noise(function: Any, like: Tensor, generator: torch.Generator | None) -> Tensor:
    dtype = torch.float32 if like.device.type in NO_FLOAT64 else torch.float64
    drawn: Tensor = function(len(like), dtype=dtype, device=like.device, generator=generator)
    return drawn


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform over the schedule, or over [low, high] of it.

    What it draws is a place between clean (0) and noise (1), whichever end of the schedule the noise is at.

    Attributes:
        low: the smallest time drawn; None: the schedule's.
        high: the largest time drawn; None: the schedule's.
        shift: moves times toward the noise, s u / (1 + (s − 1) u) (Esser et al. 2024, eq. 23); or a function of the
            clean sample that gives the shift.
    """

    low: float | None = None
    high: float | None = None
    shift: float | Callable[[Tensor], float] = 1.0

    def __post_init__(self) -> None:
        if not callable(self.shift):
            _positive("shift", self.shift)

    def __call__(
        self, schedule: Schedule, like: Tensor, /, *, t: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return self._place(schedule, like, _noise(torch.rand, like, generator))

    def _place(self, schedule: Schedule, like: Tensor, level: Tensor) -> Tensor:
        """Give the times at levels in [0, 1], 1 toward the noise, shape (B,)."""
        shift = self.shift(like) if callable(self.shift) else self.shift
        _positive("shift", shift)
        level = shift * level / (1 + (shift - 1) * level)
        rank = 1 - level if schedule.noise_first else level
        first, last = schedule.ranks(self.low, self.high)
        return _time(schedule, first + rank * (last - first))


@dataclass(frozen=True, kw_only=True)
class LogitNormal(Uniform):
    """Logit-normal over the schedule: level = sigmoid(N(mean, std²)) (Esser et al. 2024, eq. 19).

    Attributes:
        mean: mean of the normal; above 0 it favours the noise.
        std: its standard deviation.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("std", self.std)
        if not (isinstance(self.mean, int | float) and math.isfinite(self.mean)):
            raise ValueError(f"`mean` is {self.mean!r}, expected a number.")

    def __call__(
        self, schedule: Schedule, like: Tensor, /, *, t: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return self._place(schedule, like, torch.sigmoid(self.mean + self.std * _noise(torch.randn, like, generator)))


@dataclass(frozen=True, kw_only=True)
class Near:
    """t' near t: N(t, std²), clamped to the schedule (Lin & Yang, table 3).

    Attributes:
        std: standard deviation, on the scale of 1000 timesteps.
    """

    std: float = 100.0

    def __post_init__(self) -> None:
        _positive("std", self.std)

    def __call__(
        self, schedule: Schedule, like: Tensor, /, *, t: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        rank = schedule.rank(_given(t, "near"))
        return _time(schedule, rank + self.std / SCALE * _noise(torch.randn, like, generator).to(rank.dtype))


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """t' a fixed distance from t, on either side at random; on the other side where the schedule ends before (table 3).

    Attributes:
        by: the distance, on the scale of 1000 timesteps; at least one index of a discrete schedule.
    """

    by: float = 40.0

    def __post_init__(self) -> None:
        _positive("by", self.by)

    def __call__(
        self, schedule: Schedule, like: Tensor, /, *, t: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        rank, by = schedule.rank(_given(t, "shifted")), max(self.by / SCALE, schedule.spacing)
        side = torch.where(_noise(torch.rand, like, generator) < 0.5, -1.0, 1.0).to(rank.dtype)
        side = torch.where(rank + by > 1, -1.0, torch.where(rank - by < 0, 1.0, side))
        return _time(schedule, rank + by * side)


@dataclass(frozen=True, kw_only=True)
class Contributing:
    """t' more often where it contributes more: q(t'|t) = (1 − uniform) · (∝ |κ|) + uniform · (uniform over the schedule).

    x̂_t' − x_t' = κ (ŷ − y) with κ = (sigma' alpha_t − alpha' sigma_t) / Δ, and Δ depends on t alone: given t, |κ| is how
    far the teacher's two inputs are apart. The objective multiplies each sample's L_sp by `weight`, so that the expectation
    of the loss and of its gradient is that of "uniform". q is constant within a bin: an index of a discrete schedule, a
    thousandth of the rank of a continuous one, with κ at its middle.

    Attributes:
        uniform: the part of the draws that is uniform, above 0 and at most 1; no weight is above 1 / uniform.
    """

    uniform: float = 0.1

    def __post_init__(self) -> None:
        if not (isinstance(self.uniform, int | float) and 0 < self.uniform <= 1):
            raise ValueError(f"`uniform` is {self.uniform!r}, expected a number above 0 and at most 1.")

    def __call__(
        self, schedule: Schedule, like: Tensor, /, *, t: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        often = self._often(schedule, _given(t, "contributing"))
        bins, below = often.shape[1], often.cumsum(1)
        level = _noise(torch.rand, like, generator)[:, None] * below[:, -1:]
        place = torch.searchsorted(below, level, right=True).squeeze(1).clamp(max=bins - 1)
        within = 0.5 if schedule.discrete else _noise(torch.rand, like, generator)
        return _time(schedule, (precise(place) + within) / bins)

    def weight(self, schedule: Schedule, t: Tensor, t_prime: Tensor) -> Tensor:
        """Give p(t') / q(t'|t) of times drawn at t, p uniform over the schedule; float64 or float32 as ranks, shape (B,)."""
        return 1 / self._often(schedule, t).gather(1, _bin(schedule, t_prime)[:, None]).squeeze(1)

    def _often(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Give how much more often than uniformly each bin is drawn, q / p, shape (B, bins)."""
        bins = _bins(schedule)
        middle = (precise(torch.arange(bins, device=t.device)) + 0.5) / bins
        # ranks beyond the ends that a schedule draws (EDM) all give the time of the end: they share the bin of that time
        middle = (precise(_bin(schedule, _time(schedule, middle))) + 0.5) / bins
        (alpha, sigma), (alphas, sigmas) = schedule(t), schedule(_time(schedule, middle))
        apart = precise(sigmas * alpha[:, None] - alphas * sigma[:, None]).abs()
        mean = apart.mean(1, keepdim=True)
        part = torch.where(mean > 0, apart / mean, 1)  # 0: a schedule of one time
        return (1 - self.uniform) * part + self.uniform


@dataclass(frozen=True, kw_only=True)
class Clean:
    """No second noise: the objective compares x̂_0 itself with x_0, and t' is the schedule's clean end.

    alpha' = 1 and sigma' = 0 exactly, even if the clean end has some noise, and if t' is given by hand: the teacher is told
    t', the samples are not noised to it.
    """

    def __call__(
        self, schedule: Schedule, like: Tensor, /, *, t: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        dtype = torch.float32 if like.device.type in NO_FLOAT64 else torch.float64
        end = torch.full((len(like),), float(schedule.noise_first), dtype=dtype, device=like.device)
        return _time(schedule, end)


def _positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"`{name}` is {value!r}, expected a positive number.")


def _bins(schedule: Schedule) -> int:
    return round(1 / schedule.spacing) if schedule.discrete else SCALE


def _bin(schedule: Schedule, t: Tensor) -> Tensor:
    """Give the bin of the rank of each time, int64, shape (B,)."""
    bins = _bins(schedule)
    return (schedule.rank(t) * bins).long().clamp(0, bins - 1)


def _given(t: Tensor | None, name: str) -> Tensor:
    if t is None:
        raise ValueError(
            f"'{name}' places t' relative to t, so it cannot draw t itself. Use 'uniform' or 'logit_normal' for t."
        )
    return t


NAMED: dict[str, TimeSampler] = {
    "uniform": Uniform(),
    "near": Near(),
    "shifted": Shifted(),
    "logit_normal": LogitNormal(),
    "contributing": Contributing(),
}


def get(name: str, sampler: str | TimeSampler) -> TimeSampler:
    """Give the sampler of a name, or the callable itself.

    Args:
        name: the argument's name, for the message.
        sampler: a name, or `(schedule, like, *, t, generator) -> times of shape (B,)`; for t' also "clean".

    Raises:
        ValueError: the name is unknown, or the sampler is for t' only and this is t.
        TypeError: it is neither a name nor callable.
    """
    of_t_prime = "" if name == "t" else "; or 'clean', which compares the clean estimates themselves"
    if isinstance(sampler, str):
        if sampler == "clean" and of_t_prime:
            return Clean()
        if sampler not in NAMED:
            raise ValueError(
                f"unknown `{name}` {sampler!r}, expected one of {', '.join(repr(n) for n in NAMED)}, or a callable{of_t_prime}."
            )
        found = NAMED[sampler]
    elif not callable(sampler) or isinstance(sampler, type):
        raise TypeError(
            f"`{name}` is {sampler!r}, expected one of {', '.join(repr(n) for n in NAMED)}, or a callable{of_t_prime}."
        )
    else:
        found = sampler
    if isinstance(found, Near | Shifted | Contributing) and not of_t_prime:
        raise ValueError(f"`t` is {sampler!r}, which places t' relative to t. Use 'uniform' or 'logit_normal' for t.")
    if isinstance(found, Clean) and not of_t_prime:
        raise ValueError(
            "`t` is 'clean', where there is nothing to denoise; it is for t' only. Use 'uniform' or 'logit_normal' for t."
        )
    return found


def within(sampler: TimeSampler, low: float, high: float) -> TimeSampler:
    """Restrict a sampler of t to the part of [low, high] that it draws; a callable of the user's is left as it is."""
    if not isinstance(sampler, Uniform):
        return sampler
    return replace(
        sampler,
        low=low if sampler.low is None else max(low, sampler.low),
        high=high if sampler.high is None else min(high, sampler.high),
    )
