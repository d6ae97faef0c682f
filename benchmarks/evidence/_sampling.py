"""Sample a base with its scheduler, with and without guidance, from given noise."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def guided(cond: Tensor, free: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance; `rescale` of it brought back to the size of the conditional output (arXiv 2305.08891, eqs. 14 to 16)."""
    output = free + scale * (cond - free)
    if not rescale:
        return output
    dims = list(range(1, cond.ndim))
    back = output * (cond.std(dims, keepdim=True) / output.std(dims, keepdim=True))
    return rescale * back + (1 - rescale) * output


@torch.no_grad()
def trajectory(
    model: nn.Module, scheduler: Any, noise: Tensor, labels: Tensor, *,
    steps: int, null: int, guidance: float = 1.0, rescale: float = 0.0,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Sample, and give each x_t with the model's output there; the last x_t is the sample, with no output.

    Args:
        model: in eval mode; called as `model(x_t, timestep, class_labels=labels).sample`.
        scheduler: a diffusers scheduler.
        noise: x at the end of the schedule, shape (B, C, H, W).
        labels: classes, shape (B,).
        steps: steps of the sampler; with guidance each takes two passes.
        null: the class that means none.
        guidance: its scale; 1 is none.
        rescale: how much of it is rescaled.
    """
    if (
        "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    ):  # of flow matching: its own end with an empty step
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    else:
        scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        time = t.expand(len(x)).to(x.device)
        output = model(x, time, class_labels=labels).sample
        if guidance != 1:
            free = model(x, time, class_labels=torch.full_like(labels, null)).sample
            output = guided(output, free, guidance, rescale)
        yield x, output
        x = scheduler.step(output, t, x).prev_sample
    yield x, x


def sample(
    model: nn.Module, scheduler: Any, noise: Tensor, labels: Tensor, *, batch: int = 250, **options: Any
) -> Tensor:
    """Sample in batches: x_0, shape (N, C, H, W). `options` are those of `trajectory`."""
    made = []
    training = model.training
    model.eval()
    for part, label in zip(noise.split(batch), labels.split(batch), strict=True):
        for x, _ in trajectory(model, scheduler, part, label, **options):
            last = x
        made.append(last)
    model.train(training)
    return torch.cat(made)
