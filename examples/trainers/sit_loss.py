"""SiT (willisma/SiT): `transport.training_losses` with the self-perceptual loss added.

Put this file beside SiT's train.py and apply sit.patch, or add two lines to it after the model has its trained weights:

    from sit_loss import PerceptualTransport
    transport = PerceptualTransport(transport, model)

SiT's words: `x1` is the clean sample and `x0` the noise, t = 0 is noise and t = 1 is data, the velocity is data - noise.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_diffusion import SelfPerceptualObjective, parameterizations, schedules

PATHS = {
    "ICPlan": lambda: (schedules.Linear(reverse=True), "-flow_prediction"),
    "GVPCPlan": lambda: (
        schedules.Interpolant(lambda t: torch.sin(t * math.pi / 2), lambda t: torch.cos(t * math.pi / 2)),
        "flow_prediction",
    ),
}
"""By the class of `transport.path_sampler`: the schedule, and what a velocity of SiT is on it."""
PREDICTIONS = {"NOISE": "epsilon", "SCORE": parameterizations.SCORE}
"""What the other kinds of `transport.model_type` are called here."""


class PerceptualTransport:
    """A transport of SiT whose loss is SiT's + L_sp. All else is the transport's own.

    Args:
        transport: what `create_transport` gives, of the path "Linear" or "GVP".
        model: the SiT with its trained weights, also inside DDP; the teacher is a frozen copy of it.
        options: of `SelfPerceptualObjective.wrap`.

    Raises:
        ValueError: the path is another.
    """

    def __init__(self, transport: Any, model: nn.Module, **options: Any) -> None:
        path = type(transport.path_sampler).__name__
        if path not in PATHS:
            raise ValueError(
                f"`transport` follows {path}, expected one of {', '.join(PATHS)}. Add its schedule to `PATHS`."
            )
        schedule, velocity = PATHS[path]()
        self.transport = transport
        if transport.model_type.name != "VELOCITY":  # the ends of the path say nothing of the clean sample then
            options.setdefault("t_range", transport.check_interval(transport.train_eps, transport.sample_eps))
        self.objective = SelfPerceptualObjective.wrap(
            model,
            schedule,
            prediction=PREDICTIONS.get(transport.model_type.name, velocity),
            **{"mse_weight": 0.0} | options,
        )
        draw = transport.sample

        def sample(x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            self.drawn = draw(x1)
            return self.drawn

        transport.sample = sample

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["transport"], name)

    def training_losses(self, model: Any, x1: Tensor, model_kwargs: dict[str, Any] | None = None) -> dict[str, Tensor]:
        """Give the terms of SiT's loss, "loss" (B,) and "pred", with "sp" beside them and in "loss"."""
        terms = self.transport.training_losses(model, x1, model_kwargs)
        t, noise, clean = self.drawn
        sp = self.objective.loss(terms["pred"], clean=clean, noise=noise, t=t, cond=model_kwargs, reduction="none")
        return {**terms, "sp": sp, "loss": terms["loss"] + sp}
