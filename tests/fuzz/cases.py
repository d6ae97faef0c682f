"""Objectives of tiny models of several kinds, with the same loss by Algorithm 1."""

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from algorithm1 import algorithm1, freeze
from models import MLP, ConvNet, TwoStreams, conditional_unet, unet
from paper import PaperObjective

from perceptual_diffusion import SelfPerceptualObjective, schedules
from perceptual_diffusion.adapters._explained import Explained

TABLE = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
QUARTER = math.pi / 2
DEFAULTS = {"distance": "normalised", "mse_weight": 1.0}
"""What the library's own defaults have to be where t' is given: they are not handed to it."""
SCHEDULES = {
    "index": (schedules.Discrete.scaled_linear, lambda t: (TABLE[t.long()].sqrt(), (1 - TABLE[t.long()]).sqrt())),
    "straight": (schedules.Linear, lambda t: (1 - t.double(), t.double())),
    "circle": (schedules.Cosine, lambda t: (torch.cos(QUARTER * t.double()), torch.sin(QUARTER * t.double()))),
    "sigma": (schedules.EDM, lambda t: (torch.ones_like(t, dtype=torch.float64), t.double())),
}
"""A schedule of the package, and its scales written out by hand."""


def unit(case, t):
    """The time that the tiny models are given."""
    return t.float() / 1000 if case.schedule == "index" else t.float()


@dataclass
class Case:
    """A model, how it is noised, and the shape of one sample."""

    model: Any
    layers: tuple
    shape: Any
    schedule: str = "straight"
    kind: str = "v_prediction"
    cond: Any = dict
    call: Any = None
    how: dict = field(default_factory=dict)
    least: int = 0
    family: bool = False  # known to the package, which calls it as `call` does

    def __post_init__(self):
        torch.manual_seed(1)
        self.student = self.model()
        self.frozen = freeze(self.student)
        self.call = self.call or (lambda model, x_t, t, cond: model(x_t, unit(self, t), **cond))
        make, self.scales = SCHEDULES[self.schedule]
        kind, how = (SelfPerceptualObjective, {}) if self.how is DEFAULTS else (PaperObjective, self.how)
        self.objective = kind.wrap(
            self.student,
            make(),
            prediction=self.kind,
            layers=list(self.layers),
            call=None if self.family else Explained(self.call),
            seed=0,
            **how,
        )
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.mul_(1.1)
        given = self.arguments(2, 0)  # the first pass, after which the copy holds what it needs
        self.objective.loss(self.predict(given), **given)

    @property
    def modules(self):
        return self.student, self.objective.teacher.module

    def arguments(self, batch, seed):
        """A valid call of `loss`, without its prediction."""
        generator = torch.Generator().manual_seed(seed)

        def draw(shape):
            if isinstance(shape, dict):
                return {key: draw(value) for key, value in shape.items()}
            return torch.randn(batch, *shape, generator=generator)

        low, high = {"index": (1, 999), "sigma": (0.1, 5.0)}.get(self.schedule, (0.1, 0.9))
        place, apart = torch.rand(2, batch, generator=generator)
        # far apart, else the two steps of Algorithm 1 round the small difference away
        t, t_prime = (low + (high - low) * x for x in (place, (place + 0.1 + 0.8 * apart) % 1))
        if self.schedule == "index":
            t, t_prime = t.long(), t_prime.long()
        given = {"clean": draw(self.shape), "noise": draw(self.shape), "t": t, "t_prime": t_prime}
        return given | {"cond": self.cond(batch) if self.cond is not dict else None, "reduction": "none"}

    def predict(self, given):
        """The student's prediction for the arguments, by hand."""
        alpha, sigma = self.scales(given["t"])
        return self.call(
            self.student, mix(given["clean"], given["noise"], alpha, sigma), given["t"], given["cond"] or {}
        )

    def expected(self, predicted, given):
        """The losses by Algorithm 1, (B,)."""
        flat = {name: flatten(given[name]).float() for name in ("clean", "noise")}
        shapes = given["clean"]

        def call(model, x, t, cond):
            return self.call(model, unflatten(x, shapes), t, cond)

        cond = {k: widened(value) for k, value in (given["cond"] or {}).items()}
        loss = algorithm1(
            self.frozen, self.layers, call, cond, **flat, model_output=flatten(predicted).float(),
            t_prime=given["t_prime"], at_t=self.scales(given["t"]), at_t_prime=self.scales(given["t_prime"]), kind=self.kind,
            **{name: self.how[name] for name in ("formulation", "distance") if name in self.how},
        )  # fmt: skip
        if weight := self.how.get("mse_weight"):
            alpha, sigma = (s.float().view(-1, *[1] * (flat["clean"].ndim - 1)) for s in self.scales(given["t"]))
            target = {"v_prediction": alpha * flat["noise"] - sigma * flat["clean"], "epsilon": flat["noise"]}[
                self.kind
            ]
            loss = loss + weight * (flatten(predicted).float() - target).square().flatten(1).mean(1)
        return loss


def widened(value):
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def mix(clean, noise, alpha, sigma):
    if isinstance(clean, dict):
        return {key: mix(clean[key], noise[key], alpha, sigma) for key in clean}
    each = [scale.to(clean.dtype).view(-1, *[1] * (clean.ndim - 1)) for scale in (alpha, sigma)]
    return each[0] * clean + each[1] * noise


def flatten(x):
    return torch.cat([part.flatten(1) for part in x.values()], 1) if isinstance(x, dict) else x


def unflatten(x, like):
    if not isinstance(like, dict):
        return x
    sizes = [math.prod(part.shape[1:]) for part in like.values()]
    parts = zip(x.split(sizes, 1), like.items(), strict=True)
    return {key: part.reshape(len(part), *value.shape[1:]) for part, (key, value) in parts}


class Shifted(ConvNet):
    """A ConvNet with a condition."""

    def forward(self, x, t, shift, scale=1.0):
        return super().forward(x * scale + shift.view(-1, 1, 1, 1), t)


CASES = {
    "maps": lambda: Case(ConvNet, ("body",), (3, 5, 4)),
    "maps, split": lambda: Case(ConvNet, ("stem", "body"), (3, 4, 4), how={"formulation": "split"}),
    "maps, autograd": lambda: Case(ConvNet, ("body",), (3, 4, 4), "index", "epsilon", how={"micro_batch": None}),
    "maps, one by one": lambda: Case(ConvNet, ("body",), (3, 4, 4), "circle", how={"micro_batch": 1}),
    "maps, defaults": lambda: Case(ConvNet, ("body",), (3, 4, 4), how=DEFAULTS),
    "vectors": lambda: Case(MLP, ("middle",), (5,), "sigma", "sample"),
    "condition": lambda: Case(Shifted, ("body",), (3, 4, 4), cond=lambda b: {"shift": torch.arange(float(b))}),
    "two streams": lambda: Case(TwoStreams, ("join",), {"image": (3, 4, 4), "sound": (4,)}),
    "classes": lambda: Case(
        unet, ("mid_block",), (3, 8, 8), "index", "epsilon",
        cond=lambda b: {"class_labels": torch.arange(b)},
        call=lambda model, x_t, t, cond: model(x_t, t, **cond).sample, least=1, family=True,
    ),
    "classes, defaults": lambda: Case(
        unet, ("mid_block",), (3, 8, 8), "index", "epsilon",
        cond=lambda b: {"class_labels": torch.arange(b)},
        call=lambda model, x_t, t, cond: model(x_t, t, **cond).sample, least=1, how=DEFAULTS, family=True,
    ),
    "text": lambda: Case(
        conditional_unet, ("mid_block",), (4, 8, 8), "index",
        cond=lambda b: {"encoder_hidden_states": torch.linspace(-1, 1, b * 24).view(b, 3, 8)},
        call=lambda model, x_t, t, cond: model(x_t, t, **cond).sample, least=1,
    ),
}  # fmt: skip


@cache
def case(name):
    with torch.random.fork_rng(devices=[]):
        return CASES[name]()
