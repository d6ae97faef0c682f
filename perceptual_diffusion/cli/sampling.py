"""Sample class-conditional models with diffusers' DDIM scheduler: trailing spacing, from the last timestep."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perceptual_diffusion.cli._errors import UserError


def device(name: str) -> torch.device:
    """Give the device of a name, tried out; "auto" is a GPU if there is one.

    Raises:
        UserError: it cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(1, device=found).add(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device is {name!r}, which cannot be used here: {str(error).splitlines()[0]}. Use cpu."
        ) from error
    return found


@torch.no_grad()
def sample(
    model: Any,
    scheduler: Any,
    noise: Tensor,
    labels: Tensor,
    *,
    steps: int = 25,
    guidance: float = 1.0,
    null: int | None = None,
    batch: int = 128,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample a model from given noise.

    Args:
        model: a UNet2DModel.
        scheduler: a DDIMScheduler with trailing spacing.
        noise: x_T, shape (N, C, H, W).
        labels: class indices, shape (N,).
        steps: number of DDIM steps.
        guidance: scale of classifier-free guidance; 1 is none.
        null: the class index that means no condition; needed for guidance.
        batch: how many samples are made at once.
        progress: called with the number of samples finished.

    Returns:
        x_0, shape (N, C, H, W).
    """
    done = []
    for part, label in zip(noise.split(batch), labels.split(batch), strict=True):
        x, _ = _run(model, scheduler, part, label, steps, guidance, null)
        done.append(x)
        if progress is not None:
            progress(len(part))
    return torch.cat(done) if done else noise


@torch.no_grad()
def trajectory(
    model: Any, scheduler: Any, noise: Tensor, labels: Tensor, *, steps: int = 25, keep: int = 8
) -> tuple[Tensor, list[int]]:
    """Give x̂_0 along the sampling trajectory (Lin & Yang, figure 5).

    Args:
        model: a UNet2DModel.
        scheduler: a DDIMScheduler with trailing spacing.
        noise: x_T, shape (N, C, H, W).
        labels: class indices, shape (N,).
        steps: number of DDIM steps.
        keep: at how many of them x̂_0 is kept, evenly spaced, first and last included.

    Returns:
        x̂_0, shape (keep, N, C, H, W), and the timesteps it belongs to.
    """
    _, clean = _run(model, scheduler, noise, labels, steps, 1.0, None)
    index = torch.linspace(0, len(clean) - 1, keep).round().long().tolist()
    return torch.stack([clean[i][1] for i in index]), [clean[i][0] for i in index]


def _run(
    model: Any, scheduler: Any, x: Tensor, labels: Tensor, steps: int, guidance: float, null: int | None
) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    if guidance != 1 and null is None:
        raise ValueError("`null` is missing: guidance needs the class index that means no condition.")
    training = model.training
    model.eval()
    scheduler.set_timesteps(steps)
    clean = []
    for t in scheduler.timesteps.tolist():
        times = torch.full((len(x),), t, device=x.device)
        output = model(x, times, class_labels=labels).sample
        if guidance != 1:
            free = model(x, times, class_labels=torch.full_like(labels, null or 0)).sample
            output = free + guidance * (output - free)
        step = scheduler.step(output, t, x)
        x = step.prev_sample
        clean.append((t, step.pred_original_sample))
    model.train(training)
    return x, clean
