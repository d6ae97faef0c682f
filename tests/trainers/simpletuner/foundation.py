"""Stands in for `ModelFoundation` of SimpleTuner 4.10.1 (helpers/models/common.py) and two of its families. Own code.

`train` imitates the order of `Trainer`: LoRA, `before_accelerator_prepare`, prepare, then model_predict, loss and backward.
"""

import enum

import torch
from accelerate import Accelerator


class PredictionTypes(enum.Enum):
    EPSILON = "epsilon"
    FLOW_MATCHING = "flow_matching"

    @property
    def is_flow_prediction(self):
        return self is PredictionTypes.FLOW_MATCHING


class ModelFoundation:
    PREDICTION_TYPE = PredictionTypes.EPSILON

    def __init__(self, config, model, noise_schedule):
        self.config, self.model, self.noise_schedule = config, model, noise_schedule
        self.accelerator = Accelerator(cpu=True)

    def unwrap_model(self, model=None):
        return self.accelerator.unwrap_model(self.model if model is None else model)

    def before_accelerator_prepare(self):
        pass

    def set_prepared_model(self, model):
        self.model = model

    def prepare_batch(self, batch):
        noise = torch.randn_like(batch["latents"])
        batch = {
            **batch,
            "noise": noise,
            "input_noise": noise + self.config.input_perturbation * torch.randn_like(noise),
        }
        if self.PREDICTION_TYPE.is_flow_prediction:
            sigmas = torch.rand(len(noise))
            batch["timesteps"], batch["sigmas"] = sigmas * 1000, sigmas.view(-1, 1, 1, 1)
            batch["noisy_latents"] = (1 - batch["sigmas"]) * batch["latents"] + batch["sigmas"] * batch["input_noise"]
        else:
            batch["timesteps"] = torch.randint(0, 1000, (len(noise),))
            batch["noisy_latents"] = self.noise_schedule.add_noise(
                batch["latents"], batch["input_noise"], batch["timesteps"]
            )
        return batch

    def loss(self, prepared_batch, model_output, apply_conditioning_mask=True):
        target = prepared_batch.get("target")
        if target is None:
            flow = self.PREDICTION_TYPE.is_flow_prediction
            target = prepared_batch["noise"] - (prepared_batch["latents"] if flow else 0)
        return torch.nn.functional.mse_loss(model_output["model_prediction"], target)


class StableDiffusion1(ModelFoundation):
    def model_predict(self, prepared_batch):
        prediction = self.model(
            prepared_batch["noisy_latents"],
            prepared_batch["timesteps"],
            prepared_batch["encoder_hidden_states"],
            return_dict=False,
        )[0]
        return {"model_prediction": prediction, "hidden_states_buffer": None}


class Flow(StableDiffusion1):
    """Takes its time from the sigmas, as some families do."""

    PREDICTION_TYPE = PredictionTypes.FLOW_MATCHING

    def model_predict(self, prepared_batch):
        times = prepared_batch["sigmas"].flatten() * 1000
        return super().model_predict({**prepared_batch, "timesteps": times})


class OwnLoss(StableDiffusion1):
    def loss(self, prepared_batch, model_output, apply_conditioning_mask=True):
        return model_output["model_prediction"].mean()


def train(foundation, batches, watch, lr=1e-2):
    foundation.before_accelerator_prepare()
    weights = [p for p in foundation.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr)
    model, optimizer = foundation.accelerator.prepare(foundation.model, optimizer)
    foundation.set_prepared_model(model)
    for batch in batches:
        prepared_batch = foundation.prepare_batch(batch)
        output = foundation.model_predict(prepared_batch=prepared_batch)
        loss = foundation.loss(prepared_batch=prepared_batch, model_output=output, apply_conditioning_mask=True)
        watch(prepared_batch, output["model_prediction"], loss)
        foundation.accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
