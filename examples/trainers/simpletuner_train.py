"""SimpleTuner: training with the self-perceptual loss added. Takes every option of SimpleTuner's.

    accelerate launch simpletuner_train.py      # in place of simpletuner/train.py, with the same environment and config

`ModelFoundation.loss` computes the loss of most families; this adds L_sp to it. A family with a loss of its own is named in a
warning: it gets L_sp only if it calls that of ModelFoundation.
"""

import copy
import logging
import runpy
from typing import Any

from torch import Tensor, nn

from perceptual_diffusion import SelfPerceptualObjective, schedules

logger = logging.getLogger("perceptual_diffusion")


def prepare(foundation: Any, **options: Any) -> SelfPerceptualObjective:
    """Build the objective of a model family, before its model goes through `accelerator.prepare`."""
    flow, model = foundation.PREDICTION_TYPE.is_flow_prediction, foundation.unwrap_model(foundation.model)
    if type(model).__name__ == "SD3Transformer2DModel":  # SimpleTuner's runs the parts of its blocks, not the blocks
        options = {"layers": f"transformer_blocks.{len(model.transformer_blocks) // 2}.ff"} | options

    def call(model: nn.Module, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        twin = copy.copy(foundation)
        twin.model = model
        batch = {**cond, "noisy_latents": x_t, "timesteps": t}
        if "sigmas" in cond and flow:
            batch["sigmas"] = (t / 1000).to(cond["sigmas"]).view(-1, *[1] * (cond["sigmas"].ndim - 1))
        prediction: Tensor = twin.model_predict(prepared_batch=batch)["model_prediction"]
        return prediction

    return SelfPerceptualObjective.wrap(
        model,
        schedules.Linear(scale=1000) if flow else foundation.noise_schedule,
        prediction="flow_prediction" if flow else foundation.PREDICTION_TYPE.value,
        teacher="lora" if foundation.config.model_type == "lora" else "copy",
        call=call,
        **{"mse_weight": 0.0} | options,
    ).to(foundation.accelerator.device)


def install(foundation: type, **options: Any) -> None:
    """Add L_sp to the loss of SimpleTuner's `ModelFoundation`; `options` go to `SelfPerceptualObjective.wrap`."""
    loss_of, before = foundation.loss, foundation.before_accelerator_prepare

    def before_accelerator_prepare(self: Any) -> None:
        before(self)
        self.self_perceptual = prepare(self, **options)
        if type(self).loss is not loss:
            logger.warning(
                "%s has a loss of its own: L_sp is added only to what it takes from ModelFoundation.",
                type(self).__name__,
            )

    def loss(
        self: Any, prepared_batch: dict[str, Any], model_output: Any, apply_conditioning_mask: bool = True
    ) -> Tensor:
        own: Tensor = loss_of(self, prepared_batch, model_output, apply_conditioning_mask)
        if prepared_batch.get("target") is not None:  # a sample that keeps the base's prediction
            return own
        sp = self.self_perceptual.loss(
            model_output["model_prediction"],
            clean=prepared_batch["latents"],
            noise=prepared_batch["noise"],
            t=prepared_batch["timesteps"],
            x_t=prepared_batch["noisy_latents"],
            cond=prepared_batch,
        )
        return own + sp

    foundation.loss, foundation.before_accelerator_prepare = loss, before_accelerator_prepare


if __name__ == "__main__":
    from simpletuner.helpers.models.common import ModelFoundation

    install(ModelFoundation)
    runpy.run_module("simpletuner.train", run_name="__main__")
