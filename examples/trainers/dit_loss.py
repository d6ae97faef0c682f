"""DiT (facebookresearch/DiT): `diffusion.training_losses` with the self-perceptual loss of the ε half added.

Put this file beside DiT's train.py and apply dit.patch, or add two lines to it after the model has its trained weights:

    from dit_loss import PerceptualDiffusion
    diffusion = PerceptualDiffusion(diffusion, model)

The MSE and the bound that trains the variance stay what DiT computes them to be; the variance half gets no gradient of L_sp.
"""

from typing import Any

import torch
from torch import Tensor, nn

from perceptual_diffusion import SelfPerceptualObjective, schedules

PREDICTIONS = {"EPSILON": "epsilon", "START_X": "sample"}
"""What `diffusion.model_mean_type` is called here."""


class PerceptualDiffusion:
    """A diffusion of DiT or guided-diffusion whose loss is L_mse + L_vb + L_sp. All else is the diffusion's own.

    Args:
        diffusion: what `create_diffusion(timestep_respacing="")` gives.
        model: the DiT with its trained weights, also inside DDP; the teacher is a frozen copy of it.
        options: of `SelfPerceptualObjective.wrap`.
    """

    def __init__(self, diffusion: Any, model: nn.Module, **options: Any) -> None:
        self.diffusion = diffusion
        self.objective = SelfPerceptualObjective.wrap(
            model,
            schedules.Discrete(torch.as_tensor(diffusion.alphas_cumprod)),
            prediction=PREDICTIONS[diffusion.model_mean_type.name],
            **{"mse_weight": 0.0} | options,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["diffusion"], name)

    def training_losses(
        self,
        model: Any,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Give the terms of DiT's loss, each (B,), with "sp" beside them and in "loss"."""
        noise = torch.randn_like(x_start) if noise is None else noise
        outputs = []

        def watched(x_t: Tensor, times: Tensor, **kwargs: Any) -> Tensor:
            outputs.append(model(x_t, times, **kwargs))
            return outputs[-1]

        terms = self.diffusion.training_losses(watched, x_start, t, model_kwargs, noise)
        sp = self.objective.loss(outputs[0], clean=x_start, noise=noise, t=t, cond=model_kwargs, reduction="none")
        return {**terms, "sp": sp, "loss": terms["loss"] + sp}
