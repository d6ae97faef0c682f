"""The batch of one training step: data, condition, noise and times, drawn as training draws them."""

import copy
import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from perceptual_diffusion._checking.numbers import rounded_to_bf16
from perceptual_diffusion._checking.report import SetupError
from perceptual_diffusion._checking.watch import same_randomness
from perceptual_diffusion._shapes import first, map_leaves, map_tensors
from perceptual_diffusion.parameterizations import System
from perceptual_diffusion.renoising import mix_samples
from perceptual_diffusion.types import Cond, Sample

DRAWS = 64
"""How many times are drawn to look at a sampler."""


class Batch:
    """One batch of an objective and a student, with noise and times.

    Args:
        objective: the objective.
        model: the student.
        clean: the data, shape (B, *) or nested; the batch has a copy of its own.
        cond: the model's keyword arguments; likewise.
        generator: draws noise and times.

    Raises:
        SetupError: a sampler draws wrong times.
    """

    def __init__(self, objective: Any, model: nn.Module, clean: Sample, cond: Cond, generator: torch.Generator) -> None:
        self.objective, self.model, self.generator = objective, model, generator
        self._samplers = {name: _apart(getattr(objective, name)) for name in ("t", "t_prime")}
        self.clean, self.cond = map_leaves(_own, clean), map_tensors(_own, dict(cond))
        self.like = first(self.clean)
        self.noise = map_leaves(self._normal, self.clean)
        self.t, self.t_prime = self._draw()
        self.system = System.of(objective.schedule, objective.prediction, self.t)
        self.x_t = mix_samples(self.clean, self.noise, (self.system.alpha, self.system.sigma))
        self.x_tt = mix_samples(self.clean, self.noise, objective.schedule(self.t_prime))
        self.warnings: list[str] = []

    def run(self, x_t: Sample, t: Tensor) -> Sample:
        """Give the student's prediction."""
        with same_randomness():
            output = self.objective.call(self.model, x_t, t, self.cond)
            return cast(Sample, self.objective.output(output, self.clean))

    def disturbed(self, sample: Sample) -> Sample:
        """Give a sample with noise of its own size added."""
        return map_leaves(lambda x: x + (0.1 + x.std(correction=0)) * self._normal(x), sample)

    def _normal(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=self.generator)

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Draw t and t', and many more of them to look at."""
        objective = self.objective
        pairs = []
        with same_randomness():
            for _ in range(max(2, math.ceil(DRAWS / max(1, len(self.like))))):
                t = self._times("t", None, objective.t_range)
                pairs.append((t, self._times("t_prime", t, (None, None))))
        for name, drawn in zip(("t", "t_prime"), zip(*pairs, strict=True), strict=True):
            if rounded_to_bf16(torch.cat(drawn)):
                raise SetupError(
                    "time",
                    f"the times that `{name}` draws are rounded to bfloat16, which keeps 507 of 1000 indices. Draw them as "
                    "int64 or float32.",
                )
        apart = [(t, t_prime) for t, t_prime in pairs if bool((t != t_prime).any())]
        if not apart and objective.formulation == "joint":
            raise SetupError("time", "`t_prime` draws t itself, where the loss is 0. Draw others, such as 'uniform'.")
        return (apart or pairs)[0]

    def _times(self, name: str, t: Tensor | None, bounds: tuple[Any, Any]) -> Tensor:
        schedule = self.objective.schedule
        drawn = self._samplers[name](schedule, self.like, t=t, generator=self.generator)
        try:
            schedule.check(name, drawn, len(self.like), self.like.device, *bounds)
        except (TypeError, ValueError) as error:
            raise SetupError("time", f"the sampler of `{name}` draws wrong times: {error}") from error
        return cast(Tensor, drawn)


def _apart(sampler: Any) -> Any:
    """A copy, so that a sampler that counts or draws from a stream of its own goes on in training where it was."""
    try:
        return copy.deepcopy(sampler)
    except Exception:  # whatever it holds may refuse in its own way
        return sampler


def _own(x: Tensor) -> Tensor:
    return x.detach().clone()
