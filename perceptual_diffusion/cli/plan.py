"""What `perceptual-diffusion train` says before a run (--dry-run) and after it (the card in model/README.md)."""

import json
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from perceptual_diffusion import __version__
from perceptual_diffusion.cli import inspect, loading
from perceptual_diffusion.cli._errors import UserError, plain
from perceptual_diffusion.cli.config import Config
from perceptual_diffusion.cli.tuning import Tuning
from perceptual_diffusion.inspection import StepCost, weights_held

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def plan(config: Config, tuning: Tuning, warnings: list[str]) -> str:
    """Give the plan of a run as text; nothing is written."""
    training, objective, folder = config.training, tuning.objective, tuning.folder
    model, processes = tuning.loaded.denoiser, tuning.accelerator.num_processes
    teacher: Any = objective.teacher
    number = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in tuning.trained)
    samples = training.batch * training.accumulate * processes
    held, size = weights_held([teacher.module], beside=[model])
    flops = "could not be counted"
    if (cost := _cost(tuning)) is not None:
        mse = cost.mse * samples / training.batch
        flops = f"{mse:.3g} with MSE alone, {mse * cost.ratio:.3g} with the objective ({cost.ratio:.2f} times)"
        if config.objective.teacher == "copy" and cost.held < held:  # the first pass cuts the rest off
            held, size = cost.held, size * cost.held // held
    rows = {
        "model": f"{config.model} ({type(tuning.loaded.pipeline).__name__}, {type(model).__name__})",
        "parameters": f"{number:,}, of which {trained:,} are trained{f' (LoRA, rank {training.lora_rank})' if training.lora_rank else ''}",
        "schedule": repr(objective.schedule),
        "prediction": objective.prediction.name,
        "layers": ", ".join(teacher.layers),
        "loss": recipe(config),
        "data": f"{config.data}: {len(folder.items)} pictures{_classes(tuning)}, {tuning.side} x {tuning.side} pixels; {len(folder.left_out)} left out",
        "steps": f"{training.steps} of {samples} samples ({training.batch} x {training.accumulate} accumulated x {processes} processes): "
        f"{training.steps * samples / len(folder.items):.3g} times the data",
        "device": f"{tuning.accelerator.device}, precision {training.precision}",
        "FLOPs of a step": flops,
        "teacher": f"{config.objective.teacher}, holds {held:,} weights, {size / 2**20:,.1f} MiB",
        "out": f"{config.out}: log.jsonl, tensorboard/, samples/, state/, model/",
    }
    lines = [f"{name:<16} {plain(value)}" for name, value in rows.items()]
    lines += [f"left out         {plain(name)}" for name in folder.left_out[:20]]
    return "\n".join([*lines, *(f"warning          {plain(warning)}" for warning in warnings)])


def recipe(config: Config) -> str:
    """Give the loss as a formula in words."""
    objective = config.objective
    mse = f"{objective.mse_weight:g} L_mse + " if objective.mse_weight else ""
    return f"{mse}L_sp, distance {objective.distance}, t' {objective.t_prime}, {objective.formulation}, weight {objective.weight}"


def card(config: Config, tuning: Tuning, command: str) -> str:
    """Give the README.md of the model that was made."""
    training, folder = config.training, tuning.folder
    samples = training.batch * training.accumulate * tuning.accelerator.num_processes
    teacher: Any = tuning.objective.teacher
    base = _code(config.model if not Path(config.model).is_absolute() else Path(config.model).name)
    lora = f", as LoRA layers of rank {training.lora_rank}" if training.lora_rank else ""
    settings = {"training": vars(training), "objective": vars(config.objective)}
    return f"""---
library_name: diffusers
tags: [perceptual-diffusion]
---

# {type(tuning.loaded.pipeline).__name__} fine-tuned with perceptual-diffusion

{base}, fine-tuned{lora} with the self-perceptual objective of Lin & Yang (arXiv 2401.00110). The weights are the running average.

| | |
|---|---|
| loss | {recipe(config)} |
| layers | {", ".join(teacher.layers)} |
| data | {len(folder.items)} pictures{_classes(tuning)}, {tuning.side} x {tuning.side} pixels; {len(folder.left_out)} files left out |
| steps | {tuning.done} of {samples} samples |
| seed | {training.seed} |
| command | {_code(command)} |
| versions | {_versions()} |

What this did to the samples has not been measured here: compare with the base, for example by `perceptual-diffusion evaluate`. The licence is that of the base and of the data.

```json
{json.dumps(settings, indent=1)}
```
"""


def _code(text: str) -> str:
    """A name or a command as code in Markdown, in which it cannot be anything else."""
    return f"`{plain(text).replace('`', '’').replace('|', '¦')}`"


def _classes(tuning: Tuning) -> str:
    classes, texts = tuning.folder.classes, tuning.captions is not None
    return f" of {len(classes)} classes" if classes else " with captions" if texts else ""


def _versions() -> str:
    found = [f"perceptual-diffusion {__version__}", f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _cost(tuning: Tuning) -> StepCost | None:
    """The operations of a step on one batch, or None where they cannot be counted."""
    model, objective = tuning.loaded.denoiser, tuning.objective
    teacher: Any = objective.teacher
    make: Callable[[bool], Any] = lambda weights: model  # noqa: E731
    target = loading.Target(make=make, scheduler=None, inputs=None, from_config=False)
    clean, cond = tuning.example()
    t = objective.schedule.at(torch.full((len(clean),), 0.5, dtype=torch.float64)).to(clean.device)
    t = t if objective.schedule.discrete else t.float()
    given = inspect._Pass(call=objective.call, x_t=clean, t=t, cond=cond)
    try:
        faked, mode = inspect._build(target)
        return inspect._measure(target, given, tuple(teacher.layers), faked, mode)[1]
    except UserError:
        return None
