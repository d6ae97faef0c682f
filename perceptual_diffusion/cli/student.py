"""The student of `perceptual-diffusion train`, and the objective made of it while its weights are the MSE-trained ones."""

from typing import Any, cast

import torch

from perceptual_diffusion import SelfPerceptualObjective
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.cli.config import Config
from perceptual_diffusion.cli.pipelines import LORA_LAYERS, Pipeline
from perceptual_diffusion.renoising import Formulation
from perceptual_diffusion.staged import MicroBatch


def wrap(config: Config, loaded: Pipeline) -> SelfPerceptualObjective:
    """Make the objective, and the denoiser ready to be trained: LoRA layers, checkpointing, training mode.

    Raises:
        UserError: the model or the scheduler does not fit what the config says.
    """
    training, asked, model = config.training, config.objective, loaded.denoiser
    dtype = None if asked.teacher_dtype == "model" else getattr(torch, asked.teacher_dtype)
    torch.manual_seed(training.seed)  # of the LoRA layers, alike in all processes
    if asked.teacher == "lora":
        _add_lora(model, training.lora_rank)
    try:
        objective = SelfPerceptualObjective.wrap(
            model,
            loaded.pipeline.scheduler,
            layers=list(asked.layers) or None,
            teacher=asked.teacher,
            t_prime=asked.t_prime,
            distance=asked.distance,
            formulation=cast(Formulation, asked.formulation),
            mse_weight=asked.mse_weight,
            weight=asked.weight,
            t_range=(asked.t_range[0], asked.t_range[1]) if asked.t_range else None,
            seed=training.seed,
            micro_batch=None if asked.micro_batch == "none" else cast(MicroBatch, asked.micro_batch),
            teacher_dtype=dtype,
            compile=asked.compile,
        )
        if training.lora_rank and asked.teacher != "lora":
            _add_lora(model, training.lora_rank)
        if training.gradient_checkpointing:
            model.enable_gradient_checkpointing()
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    model.train()
    return objective


def _add_lora(model: Any, rank: int) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError(
            "`lora_rank` needs peft, which is not installed. Run `pip install 'perceptual-diffusion[train]'`."
        ) from error
    if not hasattr(model, "add_adapter"):
        raise UserError(f"diffusers adds no LoRA layers to {type(model).__name__}. Set `lora_rank` to 0.")
    model.requires_grad_(False)
    try:
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=sorted(LORA_LAYERS))
        )
    except ValueError as error:
        raise UserError(
            f"LoRA layers cannot be added to {type(model).__name__}: {error}. Set `lora_rank` to 0."
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
