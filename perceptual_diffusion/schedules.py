"""Noise schedules: a time t to the scales (alpha_t, sigma_t) of x_t = alpha_t x_0 + sigma_t ε (Lin & Yang, eq. 2).

Each schedule owns its unit of time: an index for `Discrete`, 0 to 1 for `Linear`, `Cosine` and `Interpolant`, sigma for
`EDM`. Scales are computed in float64 (float32 on devices that have no float64) and never below.

The *rank* of a time is its place between 0 and 1 in the order in which the schedule is meant to be sampled: `at(rank)`
is the time, `rank(t)` the way back. Samplers of t and t' work on ranks, so that they mean the same on every schedule.
Ranks rise with t; where `noise_first`, rank 0 is the noise.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from perceptual_diffusion.types import TimeFunction

NO_FLOAT64 = ("mps", "xla", "npu")
"""Device types whose schedules are computed in float32."""


TIMES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Dtypes of times. bfloat16 has a message of its own."""


class Schedule(ABC):
    """A noise schedule: `schedule(t)` gives (alpha_t, sigma_t), each of shape (B,)."""

    low: float
    """The smallest time, in the schedule's own unit."""
    high: float
    """The largest time, in the schedule's own unit."""
    discrete: bool = False
    """Whether times are integers."""

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Give the scales of signal and noise.

        Args:
            t: times in the schedule's unit, shape (B,).

        Returns:
            alpha_t and sigma_t, float64 (float32 where the device has none), shape (B,) each.
        """

    @abstractmethod
    def derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Give (d alpha/dt, d sigma/dt), shape (B,) each, for times t of shape (B,).

        Raises:
            ValueError: the schedule is discrete and has none.
        """

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Give the row of `flow_prediction`: the derivative along the path's own parameter, shape (B,) each."""
        return self.derivative(t)

    def at(self, rank: Tensor) -> Tensor:
        """Give the time at a rank in [0, 1], shape (B,)."""
        return self.low + rank * (self.high - self.low)

    def rank(self, t: Tensor) -> Tensor:
        """Give the rank in [0, 1] of a time, shape (B,)."""
        return (precise(t) - self.low) / (self.high - self.low)

    def ranks(self, low: float | None = None, high: float | None = None) -> tuple[float, float]:
        """Give the ranks between which exactly the times from `low` to `high` lie; None is the schedule's own end.

        Raises:
            ValueError: there are no such times among those that are drawn.
        """
        first, last = self.drawn
        low, high = first if low is None else low, last if high is None else high
        if not first <= low <= high <= last:
            raise ValueError(
                f"`low` is {low:g} and `high` {high:g}, expected {first:g} <= low <= high <= {last:g} on {self!r}."
            )
        return self._rank_of(low), self._rank_of(high)

    def _rank_of(self, t: float) -> float:
        return float(self.rank(torch.tensor([t], dtype=torch.float64, device="cpu")))

    @property
    def drawn(self) -> tuple[float, float]:
        """The smallest and the largest time that samplers draw."""
        return self.low, self.high

    @property
    def noise_first(self) -> bool:
        """Whether the smallest time is the noise and the largest the data (SiT); on most schedules it is not."""
        alpha, sigma = self(torch.tensor(self.drawn, device="cpu"))
        return bool(alpha[0] * sigma[1] < alpha[1] * sigma[0])

    def level(self, t: Tensor) -> Tensor:
        """Give the place of a time between clean (0) and noise (1), whichever end the noise is at, shape (B,).

        It is linear in t: it counts the schedule's own unit, and is sigma only where sigma is (`Linear` with shift 1).

        Raises:
            ValueError: the schedule's unit has no such end (`EDM`).
        """
        place = (precise(t) - self.low) / (self.high - self.low)
        return 1 - place if self.noise_first else place

    @property
    def spacing(self) -> float:
        """The distance in rank of two neighbouring times; 0 for a continuous schedule."""
        return 0.0

    def grid(self) -> Tensor:
        """Times that stand for the whole schedule in checks made at construction, ends included, shape (K,)."""
        return torch.linspace(self.low, self.high, 1001, dtype=torch.float64)

    def check(
        self,
        name: str,
        t: Any,
        batch: int | None = None,
        device: torch.device | None = None,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        """Raise a TypeError or ValueError unless t is a valid batch of times.

        Args:
            name: the argument's name, for the message.
            t: what the user gave.
            batch: the batch size B that t must have, if known.
            device: the device that t must be on, if known.
            low: the smallest time allowed; by default the schedule's.
            high: the largest time allowed; by default the schedule's.
        """
        self.check_together({name: t}, batch, device, low, high)

    def check_together(
        self,
        times: Mapping[str, Any],
        batch: int | None = None,
        device: torch.device | None = None,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        """Raise a TypeError or ValueError unless several batches of times are valid, with one wait for their device.

        Args:
            times: what the user gave, by the names of the arguments.
            batch: as in `check`.
            device: likewise.
            low: the smallest of the first ones allowed; by default the schedule's.
            high: the largest of the first ones allowed; by default the schedule's.
        """
        for name, t in times.items():
            self._check_form(name, t, batch, device)
        looks = [self._look(t) for t in times.values() if len(t)]
        seen = iter(torch.stack(looks).tolist() if looks else ())  # one transfer
        for name, t in times.items():
            if len(t):
                self._check_values(name, t.dtype, next(seen), low, high)
            low = high = None

    def _check_form(self, name: str, t: Any, batch: int | None, device: torch.device | None) -> None:
        if not isinstance(t, Tensor):
            raise TypeError(
                f"`{name}` is {type(t).__name__} {t!r}, expected a tensor of shape (B,), one time per sample."
            )
        if t.dtype == torch.bfloat16:
            raise TypeError(
                f"`{name}` has dtype torch.bfloat16, which rounds 999 to 1000. Pass times as int64 or float32."
            )
        if t.dtype not in TIMES:
            raise TypeError(f"`{name}` has dtype {t.dtype}, expected an integer or float32. Pass `{name}.float()`.")
        if t.layout != torch.strided:
            raise TypeError(f"`{name}` is sparse, expected one number per sample. Pass `{name}.to_dense()`.")
        if t.ndim != 1:
            shape = f"({batch},)" if batch is not None else "(B,)"
            mend = f"Pass `{name}.flatten()`." if t.numel() == batch else f"Pass `{name}.expand(B)` of one number."
            raise ValueError(f"`{name}` has shape {tuple(t.shape)}, expected {shape}, one time per sample. {mend}")
        if batch is not None and len(t) != batch:
            raise ValueError(
                f"`{name}` has shape ({len(t)},), expected ({batch},), one time per sample. Pass `{name}.expand({batch})` of one."
            )
        if device is not None and t.device != device:
            raise ValueError(
                f"`{name}` is on {t.device}, expected {device}, the device of the sample. Pass `{name}.to({str(device)!r})`."
            )

    def _look(self, t: Tensor) -> Tensor:
        """The least and the largest time, and whether one is NaN, or a fraction where that is none, shape (4,)."""
        fraction = (
            (t != t.round()).any() if self.discrete and t.is_floating_point() else t.new_zeros((), dtype=torch.bool)
        )
        return torch.stack([precise(x) for x in (t.min(), t.max(), (t != t).any(), fraction)])

    def _check_values(
        self, name: str, dtype: torch.dtype, look: list[float], low: float | None, high: float | None
    ) -> None:
        least, most, broken, fractional = look
        bottom, top = self.low if low is None else low, self.high if high is None else high
        slack = torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0  # an end, rounded to the times' dtype
        if broken:
            raise ValueError(f"`{name}` holds NaN, expected times from {bottom:g} to {top:g}.")
        below = least < bottom - slack * abs(bottom)
        if below or most > top + slack * abs(top):
            wrong = least if below else most
            raise ValueError(f"`{name}` holds {wrong:g}, expected times from {bottom:g} to {top:g}. {self._unit()}")
        if fractional:
            raise ValueError(
                f"`{name}` holds a fraction, expected whole indices from {bottom:g} to {top:g}. Pass `{name}.long()`."
            )

    def _unit(self) -> str:
        return f"The unit of time of {self!r} runs from {self.low:g} to {self.high:g}."


def precise(t: Tensor) -> Tensor:
    """Turn a time or a scale to float64, or float32 where the device has no float64."""
    return t.to(torch.float32 if t.device.type in NO_FLOAT64 else torch.float64)


def _numbers(**values: Any) -> None:
    """Raise a TypeError unless every value is a number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"`{name}` is {value!r}, expected a number.")


def _table(name: str, values: Any) -> Tensor:
    """Give one value per timestep as float64 on the CPU, a copy."""
    if isinstance(values, Tensor) and (values.is_complex() or values.device.type == "meta"):
        raise TypeError(f"`{name}` has dtype {values.dtype} on {values.device}, expected real values.")
    try:
        return torch.as_tensor(values).detach().to("cpu", torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`{name}` is a {type(values).__name__}, expected a tensor of shape (T,), one value per timestep."
        ) from error


def _check_snr(schedule: Schedule) -> None:
    """Raise unless scales are finite, of shape (B,), not both 0, and the SNR is monotone in t."""
    t = schedule.grid()
    alpha, sigma = schedule(t)
    for name, scale in (("alpha", alpha), ("sigma", sigma)):
        if not isinstance(scale, Tensor) or scale.shape != t.shape:
            got = tuple(scale.shape) if isinstance(scale, Tensor) else type(scale).__name__
            raise ValueError(
                f"`{name}` gives {got} for times of shape {tuple(t.shape)}, expected one scale per time, shape (B,)."
            )
        if not bool(scale.isfinite().all()):
            raise ValueError(
                f"`{name}` is not finite at t = {float(t[~scale.isfinite()][0]):g}. Give finite scales from {schedule.low:g} to {schedule.high:g}."
            )
    for name, scale in (("alpha", alpha), ("sigma", sigma)):
        if bool((scale < 0).any()):
            raise ValueError(
                f"`{name}` is negative at t = {float(t[scale < 0][0]):g}, so the signal-to-noise ratio alpha²/sigma² is not "
                "monotone. Give scales of at least 0; the sign of a prediction belongs to `prediction=`."
            )
    # alpha_i / sigma_i falls exactly when alpha_i sigma_{i+1} - alpha_{i+1} sigma_i > 0, also where sigma is 0
    turn = alpha[:-1] * sigma[1:] - alpha[1:] * sigma[:-1]
    if not bool((turn > 0).all() or (turn < 0).all()):
        raise ValueError(
            "the signal-to-noise ratio alpha²/sigma² neither falls nor rises all along t. Give scales whose ratio is monotone."
        )


class Discrete(Schedule):
    """A table of ᾱ_t with alpha_t = √ᾱ_t and sigma_t = √(1 − ᾱ_t) (DDPM; Lin & Yang, eq. 2). t is the index 0 … T − 1.

    Args:
        alpha_bar: ᾱ_t in [0, 1], strictly falling, shape (T,). A last value of 0 is zero terminal SNR.

    Raises:
        ValueError: the table is not one-dimensional, leaves [0, 1], is not finite or does not fall.
    """

    discrete = True

    def __init__(self, alpha_bar: Tensor) -> None:
        table = _table("alpha_bar", alpha_bar)
        if table.ndim != 1 or not len(table):
            raise ValueError(
                f"`alpha_bar` has shape {tuple(table.shape)}, expected (T,), one value per timestep, T at least 1."
            )
        if not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError(
                "`alpha_bar` leaves [0, 1] or holds NaN, expected ᾱ_t, the cumulative product of 1 − beta. Pass `scheduler.alphas_cumprod`."
            )
        if not bool((table.diff() < 0).all()):
            at = int((table.diff() >= 0).nonzero()[0]) + 1
            raise ValueError(
                f"`alpha_bar` does not fall at t = {at}, expected a strictly falling table. Pass ᾱ_t in the order of t = 0 … T − 1."
            )
        self.alpha_bar = table
        self.low, self.high = 0, len(table) - 1
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_betas(cls, betas: Tensor) -> "Discrete":
        """Build from β_t, shape (T,): ᾱ_t = Π (1 − β_s)."""
        return cls((1 - _table("betas", betas)).cumprod(0))

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> "Discrete":
        """Build Stable Diffusion's schedule: √β_t linear from √start to √end."""
        return cls.from_betas(torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2)

    @classmethod
    def linear(cls, start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> "Discrete":
        """Build DDPM's schedule: β_t linear from start to end."""
        return cls.from_betas(torch.linspace(start, end, steps, dtype=torch.float64))

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> "Discrete":
        """Build the cosine schedule of Nichol & Dhariwal (2021), eq. 17, with β clipped at `max_beta`."""
        x = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((x + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta))

    def zero_terminal_snr(self) -> "Discrete":
        """Shift and scale √ᾱ_t so that it ends at 0 and starts as before (Lin et al. 2024, algorithm 1)."""
        root = self.alpha_bar.sqrt()
        if len(root) < 2:
            raise ValueError("a schedule of one timestep has no terminal SNR to rescale.")
        return Discrete(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        tables = self._tables.get(t.device)
        if tables is None:
            bar = self.alpha_bar.to(torch.float32 if t.device.type in NO_FLOAT64 else torch.float64).to(t.device)
            tables = self._tables[t.device] = (bar.sqrt(), (1 - bar).sqrt())
        index = t.long()
        return tables[0][index], tables[1][index]

    def derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "a discrete schedule has no time derivative, so no 'flow_prediction'. Use 'v_prediction', or a continuous schedule such as schedules.Linear()."
        )

    def at(self, rank: Tensor) -> Tensor:
        return (rank * len(self.alpha_bar)).floor().clamp(0, self.high).long()

    def rank(self, t: Tensor) -> Tensor:
        return (precise(t) + 0.5) / len(self.alpha_bar)

    def level(self, t: Tensor) -> Tensor:
        return precise(t) / len(self.alpha_bar)  # t = T would be the noise, as pipelines divide by T

    def ranks(self, low: float | None = None, high: float | None = None) -> tuple[float, float]:
        first, last = super().ranks(None if low is None else math.ceil(low), None if high is None else math.floor(high))
        half = self.spacing / 2  # an index owns the ranks half a step to either side
        return first - half, last + half

    @property
    def spacing(self) -> float:
        return 1 / len(self.alpha_bar)

    def grid(self) -> Tensor:
        return torch.arange(len(self.alpha_bar))

    def __repr__(self) -> str:
        end = ", zero terminal SNR" if float(self.alpha_bar[-1]) == 0 else ""
        return f"Discrete({len(self.alpha_bar)} steps{end})"


class Linear(Schedule):
    """The straight path of rectified flow: alpha = 1 − s, sigma = s; t = `scale` is noise, or t = 0 where reversed.

    s = shift u / (1 + (shift − 1) u) with u = t / scale (Esser et al. 2024, eq. 23), or u = 1 − t / scale where reversed.
    Shift and direction only re-time the path: `flow_prediction` is noise − clean whatever they are, as released models
    have it; one that predicts clean − noise (SiT) has "-flow_prediction".

    Args:
        shift: how much nearer the noise the middle of the path comes; 1 leaves it as it is.
        scale: the time of pure noise (of clean data where reversed): 1, or 1000 for diffusers' timesteps.
        reverse: t = 0 is noise and t = `scale` is data (SiT, flow_matching, Mochi; diffusers' `invert_sigmas`).
    """

    def __init__(self, shift: float = 1.0, *, scale: float = 1.0, reverse: bool = False) -> None:
        for name, value in (("shift", shift), ("scale", scale)):
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"`{name}` is {value!r}, expected a positive number.")
        if not isinstance(reverse, bool):
            raise TypeError(f"`reverse` is {reverse!r}, expected True (t = 0 is noise) or False.")
        self.shift, self.scale, self.reverse = float(shift), float(scale), reverse
        self.low, self.high = 0.0, self.scale

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        place = precise(t) / self.scale
        clean, noise = (place, 1 - place) if self.reverse else (1 - place, place)
        below = 1 + (self.shift - 1) * noise
        return clean / below, self.shift * noise / below

    def derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = self.shift / (self.scale * (1 + (self.shift - 1) * self.level(t)) ** 2)
        return (slope, -slope) if self.reverse else (-slope, slope)

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(precise(t))
        return -one, one

    @property
    def noise_first(self) -> bool:
        return self.reverse

    def __repr__(self) -> str:
        return f"Linear(shift={self.shift:g}, scale={self.scale:g}{', reverse=True' if self.reverse else ''})"


class Cosine(Schedule):
    """The quarter circle: alpha = cos(π t / 2), sigma = sin(π t / 2), t from 0 (clean) to 1 (noise), exact at both ends."""

    low, high = 0.0, 1.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = precise(t)
        return torch.sin((1 - t) * (math.pi / 2)), torch.sin(t * (math.pi / 2))

    def derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = precise(t)
        return -math.pi / 2 * torch.cos((1 - t) * (math.pi / 2)), math.pi / 2 * torch.cos(t * (math.pi / 2))

    def __repr__(self) -> str:
        return "Cosine()"


class EDM(Schedule):
    """Noise added to unscaled data: alpha = 1, sigma = t (Karras et al. 2022). The time *is* sigma, any positive number.

    Ranks follow the training distribution ln sigma ~ N(p_mean, p_std²), within [sigma_min, sigma_max].

    Args:
        sigma_min: the smallest sigma that is drawn.
        sigma_max: the largest sigma that is drawn.
        p_mean: mean of ln sigma.
        p_std: standard deviation of ln sigma.
    """

    def __init__(
        self, *, sigma_min: float = 0.002, sigma_max: float = 80.0, p_mean: float = -1.2, p_std: float = 1.2
    ) -> None:
        _numbers(sigma_min=sigma_min, sigma_max=sigma_max, p_mean=p_mean, p_std=p_std)
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"`sigma_min` is {sigma_min!r} and `sigma_max` {sigma_max!r}, expected 0 < sigma_min < sigma_max."
            )
        if not (math.isfinite(p_mean) and 0 < p_std < math.inf):
            raise ValueError(f"`p_mean` is {p_mean!r} and `p_std` {p_std!r}, expected a number and a positive number.")
        self.sigma_min, self.sigma_max, self.p_mean, self.p_std = sigma_min, sigma_max, p_mean, p_std
        self.low, self.high = 1e-6, 1e6

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = precise(t)
        return torch.ones_like(sigma), sigma

    def derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(precise(t))
        return torch.zeros_like(one), one

    def at(self, rank: Tensor) -> Tensor:
        sigma: Tensor = (self.p_mean + self.p_std * torch.special.ndtri(rank)).exp()
        return sigma.clamp(self.sigma_min, self.sigma_max)

    def rank(self, t: Tensor) -> Tensor:
        rank: Tensor = torch.special.ndtr((precise(t).log() - self.p_mean) / self.p_std)
        return rank

    @property
    def drawn(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def ranks(self, low: float | None = None, high: float | None = None) -> tuple[float, float]:
        first, last = super().ranks(low, high)  # what is drawn beyond the ends is clamped to them
        return 0.0 if low in (None, self.sigma_min) else first, 1.0 if high in (None, self.sigma_max) else last

    def level(self, t: Tensor) -> Tensor:
        raise ValueError("the time of an EDM schedule is sigma, which has no level between 0 (clean) and 1 (noise).")

    def grid(self) -> Tensor:
        return torch.logspace(math.log10(self.sigma_min), math.log10(self.sigma_max), 1001, dtype=torch.float64)

    def _unit(self) -> str:
        return "The time of an EDM schedule is sigma itself, not ln(sigma) / 4 and not an index."

    def __repr__(self) -> str:
        return f"EDM(sigma_min={self.sigma_min:g}, sigma_max={self.sigma_max:g}, p_mean={self.p_mean:g}, p_std={self.p_std:g})"


class Interpolant(Schedule):
    """Any smooth path x_t = alpha(t) x_0 + sigma(t) ε; either end may be the noise (SiT has its data at t = 1).

    Args:
        alpha: signal scale of times (B,), differentiable by autograd, shape (B,).
        sigma: noise scale, likewise.
        low: the smallest time.
        high: the largest time.

    Raises:
        ValueError: a scale is not finite or has a wrong shape, or the SNR is not monotone.
    """

    def __init__(self, alpha: TimeFunction, sigma: TimeFunction, *, low: float = 0.0, high: float = 1.0) -> None:
        if not (callable(alpha) and callable(sigma)):
            raise TypeError(
                "`alpha` and `sigma` must be callables of times of shape (B,), such as `lambda t: 1 - t` and `lambda t: t`."
            )
        _numbers(low=low, high=high)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"`low` is {low!r} and `high` {high!r}, expected two numbers, low < high.")
        self.alpha, self.sigma = alpha, sigma
        self.low, self.high = float(low), float(high)
        _check_snr(self)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = precise(t)
        return self.alpha(t), self.sigma(t)

    def derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _slope(self.alpha, t), _slope(self.sigma, t)

    def __repr__(self) -> str:
        return f"Interpolant(low={self.low:g}, high={self.high:g})"


def _slope(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """D function / dt by autograd, shape (B,); 0 where the function does not depend on t."""
    with torch.inference_mode(False), torch.enable_grad():
        at = precise(t).clone().detach().requires_grad_()
        value = function(at)
        if not value.requires_grad:
            return torch.zeros_like(at).detach()
        (slope,) = torch.autograd.grad(value.sum(), at)
    return slope
